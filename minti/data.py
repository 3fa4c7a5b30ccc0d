"""The photos of a concept: read with care, cut to size, and turned into latents once and for all."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .config import InputError
from .pipeline import StableDiffusion, image_grid

log = logging.getLogger(__name__)

CROPS = ("center", "random", "none", "squash")
RANDOM_CROPS = 8  # of each photo
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


@dataclass(frozen=True)
class View:
    """A photo as the model sees it.

    Attributes:
        pixels: (3, S, S) float32 in [-1, 1].
        weight: (1, S, S) float32 in [0, 1], how much each pixel counts.
        photo: index of the photo.
    """

    pixels: Tensor
    weight: Tensor
    photo: int


def make_views(
    photos: Sequence[Photo], size: int, *, crop: str = "center", flip: bool, seed: int = 0
) -> list[View]:
    """Every photo as a square of `size` pixels, and its mirror image.

    Args:
        crop: "center"; "random": eight squares, each 0.7 to 1 of the shorter side wide; "none": the whole
            photo, with empty margins that do not count; "squash": the whole photo, distorted.
        flip: add the mirror images; not for text or faces.
        seed: where the random squares lie. Those in which nothing counts are left out.

    Raises:
        InputError: nothing of a photo counts, because of its mask.
    """
    if crop not in CROPS:
        raise InputError(f"crop {crop!r}: choose from {', '.join(CROPS)}")
    rng = np.random.default_rng(seed)
    views = []
    for index, photo in enumerate(photos):
        before, mask = len(views), photo.mask or Image.new("L", photo.image.size, 255)
        for _ in range(RANDOM_CROPS if crop == "random" else 1):
            draws = tuple(rng.random(3)) if crop == "random" else (0.5, 0.5, 1.0)
            pixels = torch.from_numpy(_square(photo.image, size, crop, draws)) / 127.5 - 1
            weight = torch.from_numpy(_square(mask, size, crop, draws)) / 255
            pixels, weight = pixels.permute(2, 0, 1), weight.permute(2, 0, 1)  # (S, S, C) -> (C, S, S)
            if not weight.any():
                continue
            views.append(View(pixels, weight, index))
            if flip:
                views.append(View(pixels.flip(2), weight.flip(2), index))
        if len(views) == before:
            remedy = "paint white what is to be learned, or take another --crop"
            raise InputError(f"{photo.path}: its mask is black in all that is cut out of it; {remedy}")
    return views


def _square(image: Image.Image, size: int, crop: str, draws: tuple[float, float, float]) -> np.ndarray:
    """(size, size, channels) float32, 0 to 255; `draws` in [0, 1] place and scale a square cut out."""
    if crop == "squash":
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    elif crop == "none":
        image = ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC, color=0)
    else:
        side = (0.7 + 0.3 * draws[2]) * min(image.size)
        left, top = (draws[i] * (image.size[i] - side) for i in (0, 1))
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.atleast_3d(np.asarray(image)).astype(np.float32)


@dataclass(frozen=True)
class Latents:
    """The views of a concept, encoded; V of them.

    Attributes:
        mean, std: (V, C, h, w) float32, of unit variance about, on the device of the model.
        weight: (V, 1, h, w) float32, how much each latent counts in the loss.
        photo: (V,) int64 on the CPU, the photo each view shows.
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    photo: Tensor


@torch.no_grad()
def encode_views(sd: StableDiffusion, views: Sequence[View]) -> Latents:
    """Encode each view once, so that training needs no encoder: it draws from these distributions."""
    scale, f = sd.vae.config.scaling_factor, sd.vae.config.downscale
    moments = [sd.vae.encode(view.pixels[None].to(sd.device, sd.dtype)) for view in views]
    weight = torch.stack([view.weight for view in views])
    return Latents(
        mean=torch.cat([m.mean for m in moments]).float() * scale,
        std=torch.cat([m.std for m in moments]).float() * scale,
        weight=torch.nn.functional.avg_pool2d(weight, f).to(sd.device),  # (V, 1, S, S) -> (V, 1, h, w)
        photo=torch.tensor([view.photo for view in views]),
    )


def contact_sheet(views: Sequence[View], columns: int = 8) -> Image.Image:
    """The views as trained, side by side; what does not count is greyed out."""

    def picture(view: View) -> Image.Image:
        pixels = (view.pixels * view.weight + 1) * 127.5
        return Image.fromarray(pixels.permute(1, 2, 0).round().byte().numpy())  # (3, S, S) -> (S, S, 3)

    return image_grid([picture(view) for view in views], columns)
