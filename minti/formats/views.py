"""Square views of photos, as a model sees them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import InputError
from .photos import Photo

CROPS = ("center", "random", "none", "squash")
RANDOM_CROPS = 8  # of each photo


@dataclass(frozen=True)
class View:
    """A photo as the model sees it.

    Attributes:
        pixels: (3, S, S) float32 in [-1, 1].
        weight: (1, S, S) float32 in [0, 1], how much each pixel counts.
        photo: index of the photo.
        sizes: what SDXL is told, in pixels: height and width of the photo; top and left of the view in the
            photo resized to match; height and width of the view.
    """

    pixels: Tensor
    weight: Tensor
    photo: int
    sizes: tuple[int, ...]


def make_views(
    photos: Sequence[Photo], size: int, *, crop: str = "center", flip: bool, seed: int = 0
) -> Iterator[View]:
    """Cut every photo to squares of `size` pixels; one photo at a time is in memory.

    Args:
        crop: "center"; "random": eight squares, each 0.7 to 1 of the shorter side wide; "none": the whole
            photo, with empty margins that do not count; "squash": the whole photo, distorted.
        flip: follow each view by its mirror image; not for text or faces.
        seed: decides where the random squares lie. Those in which nothing counts are left out.

    Raises:
        InputError: a photo or mask cannot be read, or nothing of a photo counts.
    """
    if crop not in CROPS:
        raise InputError(f"crop {crop!r}: choose from {', '.join(CROPS)}")
    rng = np.random.default_rng(seed)
    for index, photo in enumerate(photos):
        image, is_empty = photo.open(), True
        mask, (width, height) = photo.open_mask(image.size), image.size
        if crop == "none" and min(width, height) * size < max(width, height):
            raise InputError(f"{photo.path}: {width}x{height} is too narrow to be shown whole; crop it")
        for place in rng.random((RANDOM_CROPS, 3)) if crop == "random" else [(0.5, 0.5, 1.0)]:
            cut = _cut(image.size, crop, place)
            pixels = _square(image, size, crop, cut) / 127.5 - 1
            weight = _square(mask, size, crop, cut) / 255
            if weight.any():
                is_empty = False
                scale = size / (cut[2] - cut[0])
                left, top, right, _ = (round(edge * scale) for edge in cut)
                yield View(pixels, weight, index, (height, width, top, left, size, size))
                if flip:  # the mirrored view begins where the other one ends
                    left = round(width * scale) - right
                    sizes = (height, width, top, left, size, size)
                    yield View(pixels.flip(2), weight.flip(2), index, sizes)
        if is_empty:
            raise InputError(f"{photo.path}: its mask is black in all that is cut out of it; change the mask")


def _cut(size: tuple[int, int], crop: str, place: Sequence[float]) -> tuple[float, ...]:
    """(left, top, right, bottom) of what is shown; `place` is left, top and side of a cut, each in [0, 1]."""
    if crop in ("squash", "none"):
        return (0, 0, *size)
    side = (0.7 + 0.3 * place[2]) * min(size)
    left, top = (place[i] * (size[i] - side) for i in (0, 1))
    return (left, top, left + side, top + side)


def _square(image: Image.Image, size: int, crop: str, cut: tuple[float, ...]) -> Tensor:
    """(channels, size, size) float32, 0 to 255."""
    if crop == "squash":
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    elif crop == "none":
        image = ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC, color=0)
    else:
        image = image.resize((size, size), Image.Resampling.BICUBIC, cut)
    pixels = torch.from_numpy(np.atleast_3d(np.asarray(image)).astype(np.float32))
    return pixels.permute(2, 0, 1)  # (S, S, C) -> (C, S, S)
