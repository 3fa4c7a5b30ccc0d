"""From the options of a word to what is learned: photos, latents, the vectors it starts from."""

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..cli.images import image_grid
from ..errors import InputError
from ..formats.photos import Photo, load_photos
from ..formats.views import RANDOM_CROPS, View, make_views
from ..inversion.batches import Word
from ..inversion.latents import Latents, encode_views
from ..inversion.start import initial_rows
from ..inversion.templates import load_templates
from ..model.stable_diffusion import StableDiffusion
from .run_word import RunWord

log = logging.getLogger(__name__)

SHEET_COLUMNS, SHEET_PIXELS = 8, 2**24  # of the contact sheet: pictures in a row, and the most pixels


def view_picture(view: View, side: int) -> Image.Image:
    """A view as a picture of `side` pixels; what does not count is greyed out."""
    pixels = (view.pixels * view.weight + 1) * 127.5
    image = Image.fromarray(pixels.permute(1, 2, 0).round().byte().numpy())  # (3, S, S) -> (S, S, 3)
    return image if image.width <= side else image.resize((side, side))


def load_word(
    sd: StableDiffusion,
    spec: Mapping[str, Any],
    out: Path,
    *,
    size: int | None,
    crop: str,
    flip: bool,
    lr_scale: float = 1,
    start: Tensor | None = None,
) -> tuple[RunWord, Image.Image]:
    """Encode the photos of a word and find the vectors it starts from.

    Args:
        spec: the options of the word, see `options.word_specs`.
        out: the folder of the run.
        size, crop, flip: see `make_views`; by default the size that the model was trained on.
        lr_scale: factor of the learning rate.
        start: the vectors that a run to be resumed started from, (num_vectors, D).

    Returns:
        The word, and a contact sheet of the photos as they are trained.

    Raises:
        InputError: photos or options cannot be used.
    """
    if not spec["init_word"] and spec["init"] != "random":
        raise InputError("--init-word must be given: a coarse description such as toy (or --init random)")
    photos, templates = load_photos(spec["images"]), load_templates(spec["templates"])
    size = sd.check_size(size)[0]
    if start is None:
        start = initial_rows(sd, spec["init"], spec["init_word"], spec["num_vectors"], spec["seed"])
    how = {"crop": crop, "flip": flip, "seed": spec["seed"]}
    latents, photos_hash, sheet = encode_photos(sd, photos, templates, size, **how)
    captions, lr = [photo.caption for photo in photos], spec["lr"] * lr_scale
    word = Word(spec["learning_name"], start, latents, templates, captions, lr, spec["seed"])
    count = len(latents.photo)
    log.info("%s: %d photos, %d views of %d pixels", spec["placeholder"], len(photos), count, size)
    init_word = "" if spec["init"] == "random" else spec["init_word"]
    return RunWord(word, spec["placeholder"], out / spec["name"], init_word, photos_hash), sheet


def encode_photos(
    sd: StableDiffusion,
    photos: Sequence[Photo],
    prompts: Sequence[str],
    size: int,
    *,
    crop: str,
    flip: bool,
    seed: int,
) -> tuple[Latents, Tensor, Image.Image]:
    """Encode photos as they are trained on, `size` pixels wide and high; see `make_views`.

    Returns:
        The latents; a hash of the views, of their captions and of the prompts, (32,) uint8, which tells
        whether they have changed when a run is resumed; and a contact sheet of the views.
    """
    count = len(photos) * (RANDOM_CROPS if crop == "random" else 1) * (2 if flip else 1)
    side = min(size, math.isqrt(SHEET_PIXELS // count))
    digest = hashlib.sha256(repr([[photo.caption for photo in photos], list(prompts)]).encode())
    pictures = []

    def record(view: View) -> View:
        pictures.append(view_picture(view, side))
        digest.update(view.pixels.numpy().tobytes() + view.weight.numpy().tobytes())
        return view

    views = make_views(photos, size, crop=crop, flip=flip, seed=seed)
    latents = encode_views(sd, map(record, views))  # one view is in memory at a time
    photos_hash = torch.tensor(list(digest.digest()), dtype=torch.uint8)
    return latents, photos_hash, image_grid(pictures, SHEET_COLUMNS)
