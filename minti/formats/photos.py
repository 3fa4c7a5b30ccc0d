"""The photos of a concept: read with care, cut to size, and turned into latents once and for all."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import InputError

log = logging.getLogger(__name__)

# What Pillow raises for damaged pictures, depending on their format.
DAMAGED = (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Photo:
    """One picture of the concept.

    Attributes:
        image: RGB, upright.
        mask: L, of the same size; white where the picture counts. None: everywhere.
        caption: a template of its own with {} for the word, or None.
    """

    path: Path
    image: Image.Image
    mask: Image.Image | None = None
    caption: str | None = None


def open_image(path: Path, background: str = "white") -> Image.Image:
    """Any picture Pillow can read, as RGB: turned upright by its EXIF tag, 16 bit to 8.

    Args:
        background: colour that shows where it is transparent.

    Raises:
        InputError: it is not a picture, or is truncated.
    """
    try:
        image = Image.open(path)
        image.load()
        image = ImageOps.exif_transpose(image)
    except DAMAGED as error:
        raise InputError(f"{path}: cannot be read as a picture ({error}); remove or repair it") from None
    if image.mode.startswith("I"):  # 16-bit greyscale; Pillow's own conversion would clip it
        image = Image.fromarray((np.asarray(image).astype(np.int64) // 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def load_photos(folder: str | Path) -> list[Photo]:
    """All pictures of a folder, by name, with what lies beside them: `a.jpg`, `a.mask.png`, `a.txt`.

    A caption in `a.txt` is a prompt with {} in the place of the word. What is white in a mask counts, what is
    black or transparent does not. Other files are passed over with a notice.

    Raises:
        InputError: no such folder, no pictures in it, a mask of another size, a caption without {}.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: is not a folder; put the photos of one concept into a folder")
    photos, beside = [], []
    paths = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    for path in paths:
        if _lies_beside(path):
            continue
        try:
            Image.open(path).close()
        except UnidentifiedImageError:
            log.info("%s: not a picture, skipped", path)
            continue
        except DAMAGED:
            # A picture, but a bad one: open_image says what is wrong. Or a text that begins like a picture.
            if path.suffix.lower() not in Image.registered_extensions():
                log.info("%s: not a picture, skipped", path)
                continue
        image = open_image(path)
        mask_path, caption_path = path.with_name(f"{path.stem}.mask.png"), path.with_suffix(".txt")
        beside += [mask_path, caption_path]
        mask = open_image(mask_path, "black").convert("L") if mask_path.exists() else None
        if mask and mask.size != image.size:
            raise InputError(f"{mask_path}: has size {mask.size}, the photo {image.size}; make them equal")
        caption = None
        if caption_path.exists():
            caption = caption_path.read_text(encoding="utf-8-sig", errors="replace").strip()
            if caption.count("{}") != 1 or "\N{REPLACEMENT CHARACTER}" in caption:
                raise InputError(f"{caption_path}: should be text with exactly one {{}} where the word goes")
        photos.append(Photo(path, image, mask, caption))
    if not photos:
        raise InputError(f"{folder}: no pictures in it; three to five photos of one concept are best")
    for path in paths:
        if _lies_beside(path) and path not in beside:
            log.info("%s: no photo has this name, skipped; for a.jpg it would be a.txt, a.mask.png", path)
    return photos


def _lies_beside(path: Path) -> bool:
    return path.suffix == ".txt" or path.name.endswith(".mask.png")
