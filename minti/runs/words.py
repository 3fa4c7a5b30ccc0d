"""From the options of a word to what is learned: photos, latents, the vectors it starts from."""

from __future__ import annotations

import argparse
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..cli.images import image_grid
from ..errors import InputError
from ..formats.photos import Photo, load_photos
from ..inversion.batches import Word
from ..inversion.start import initial_rows
from ..inversion.templates import load_templates
from ..inversion.views import View, encode_views, make_views
from ..model.stable_diffusion import StableDiffusion
from .folder import Run

log = logging.getLogger(__name__)


def contact_sheet(views: Sequence[View], columns: int = 8) -> Image.Image:
    """The views as trained, side by side; what does not count is greyed out."""

    def picture(view: View) -> Image.Image:
        pixels = (view.pixels * view.weight + 1) * 127.5
        return Image.fromarray(pixels.permute(1, 2, 0).round().byte().numpy())  # (3, S, S) -> (S, S, 3)

    return image_grid([picture(view) for view in views], columns)


def fingerprint(views: Sequence[View], photos: Sequence[Photo], templates: Sequence[str]) -> Tensor:
    """What a word is learned from in 32 bytes, which tell whether it has changed; (32,) uint8."""
    digest = hashlib.sha256(repr([[photo.caption for photo in photos], list(templates)]).encode())
    for view in views:
        digest.update(view.pixels.numpy().tobytes() + view.weight.numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def load_word(
    sd: StableDiffusion, spec: dict[str, Any], args: argparse.Namespace, lr_scale: float, start: Tensor | None
) -> tuple[Run, Image.Image]:
    """Photos to latents, the init word to rows, unless they are known: `start`, that of a run to go on with.

    Also the contact sheet of the photos.
    """
    photos = load_photos(spec["images"])
    size = sd.check_size(args.size)[0]
    views = make_views(photos, size, crop=args.crop, flip=args.flip, seed=spec["seed"])
    if not spec["init_word"] and spec["init"] != "random":
        raise InputError("--init-word must be given: a coarse description such as toy (or --init random)")
    if start is None:
        start = initial_rows(sd, spec["init"], spec["init_word"], spec["num_vectors"], spec["seed"])
    templates = load_templates(spec["templates"])
    word = Word(
        spec["alias"],
        start,
        encode_views(sd, views),
        templates,
        [photo.caption for photo in photos],
        lr=spec["lr"] * lr_scale,
        seed=spec["seed"],
    )
    log.info("%s: %d photos, %d views of %d pixels", spec["placeholder"], len(photos), len(views), size)
    run = Run(
        word,
        spec["placeholder"],
        Path(args.out) / spec["name"],
        "" if spec["init"] == "random" else spec["init_word"],
        fingerprint(views, photos, templates),
    )
    return run, contact_sheet(views)
