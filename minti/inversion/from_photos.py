"""Learning a word from photos, in one call."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import InputError, check_number
from ..formats.concept import Concept
from ..formats.photos import Photo, load_photos, upright_rgb
from ..formats.views import make_views
from ..model.fitting import prepare
from ..model.stable_diffusion import StableDiffusion
from .batches import Settings, Word
from .inversion import Inversion
from .latents import encode_views
from .start import initial_rows
from .templates import load_templates


@dataclass(frozen=True)
class Picture(Photo):
    """A photo that is in memory already."""

    image: Image.Image | None = None

    def open(self) -> Image.Image:
        return upright_rgb(self.image, self.path)


def _as_photo(image: str | Path | Image.Image) -> Photo:
    if isinstance(image, Image.Image):
        return Picture(Path("a picture"), image=image)
    if isinstance(image, str | Path):
        return Photo(Path(image))
    raise InputError(f"images: {type(image).__name__} is neither a path nor a picture of PIL")


def learn(
    sd: StableDiffusion,
    images: str | Path | Sequence[str | Path | Image.Image],
    placeholder: str,
    init_word: str,
    *,
    num_vectors: int = 1,
    per_layer: bool = False,
    output_embedding: bool = False,
    lr: float = 5e-3,
    seed: int = 0,
    size: int | None = None,
    templates: str = "object",
    replace: bool = False,
    on_step: Callable[[int, float], None] | None = None,
    **settings: Any,
) -> Concept:
    """Learn a word from a few photos.

    Args:
        sd: a loaded checkpoint; it knows the word afterwards.
        images: folder with three to five photos, or a list of files or pictures.
        placeholder: the new word, such as "<toy>".
        init_word: a coarse description of the concept, such as "toy".
        num_vectors: how many vectors the word stands for.
        per_layer: give each cross-attention layer of the UNet vectors of its own, see `TextEncoderPerLayer`.
        output_embedding: learn vectors that replace the text encoder's output, see `TextEncoderWithOutputs`.
        lr: learning rate of AdamW.
        seed: decides everything random.
        size: pixels to train at; by default what the model was trained on.
        templates: "object", "style", or a file, see `templates.load_templates`.
        replace: allow a placeholder that means something already, for instance one that was learned before.
        on_step: called after every step with its number, from 1, and the loss.
        settings: fields of `Settings`, such as `steps` and `batch_size`.

    Returns:
        The word, also usable with `sd` at once.

    Raises:
        InputError: photos or arguments that cannot be used; `sd` is as it was then.
        Diverged: the loss became infinite.
    """
    check_number("num_vectors", num_vectors, int, 1, 75)
    check_number("lr", lr, float, 0)
    check_number("seed", seed, int, 0)
    options = Settings(**settings)
    if options.objective != "diffusion":
        raise InputError("objective: minti.learn learns with diffusion only; python -m minti.train has clip")
    if size is not None:
        check_number("size", size, int, 1)  # photos are learned as squares
    if not isinstance(images, str | Path | list | tuple):
        raise InputError("images should be a folder, or a list of files and pictures")
    photos = load_photos(images) if isinstance(images, str | Path) else [_as_photo(x) for x in images]
    if not photos:
        raise InputError("images is empty; three to five photos of one concept are best")
    views = make_views(photos, sd.check_size(size)[0], flip=True, seed=seed)
    latents, captions = encode_views(sd, views), [photo.caption for photo in photos]
    kind = {"per_layer": per_layer, "output_embedding": output_embedding}
    before = sd.text_encoder  # which words of a special kind would change for good
    own = copy.deepcopy(before) if any(kind.values()) else before
    sd.text_encoder = prepare(own, sd.unet, **kind)
    try:
        rows = initial_rows(sd, "word", init_word, num_vectors)
        word = Word(placeholder, rows, latents, load_templates(templates), captions, lr, seed)
        inversion = Inversion(sd, [word], options, replace=replace)
    except InputError:
        sd.text_encoder = before
        raise
    for step in range(options.steps):
        loss = inversion.step()
        if on_step:
            on_step(step + 1, loss.item())
    inversion.check()
    inversion.freeze()
    return inversion.concept(0)
