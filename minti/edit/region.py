"""Pixels: the mask, the part of a photo that the model works on, and the result put back into the photo."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from ..errors import InputError

BLACK = 8  # of 255; JPEG makes black pixels up to about so bright
CONTEXT = 2  # the part that is worked on is so many times as wide as the mask, if the photo is


def prepare_mask(mask: Image.Image, grow: int = 0) -> Image.Image:
    """The mask as it is used: what is nearly black is black, and all else spreads `grow` pixels.

    Args:
        mask: mode L. White: to be edited; grey: the darker, the less (see `blending.py`); black: to be kept.

    Raises:
        InputError: all of the mask is black.
    """
    values = torch.from_numpy(np.where(np.asarray(mask) < BLACK, 0, np.asarray(mask)).astype(np.float32))
    if not values.any():
        raise InputError("the mask is empty: paint what is to be edited white")
    for kernel in ((1, 2 * grow + 1), (2 * grow + 1, 1)):
        values = F.max_pool2d(values[None], kernel, 1, (kernel[0] // 2, kernel[1] // 2))[0]
    return Image.fromarray(values.numpy().astype(np.uint8))


def opacity(mask: Image.Image, blur: int) -> Image.Image:
    """How much of the result is seen at each pixel, mode L: 0 where the mask is black, 255 well inside.

    Args:
        blur: width in pixels of the transition, which lies inside the mask.

    Raises:
        InputError: the mask is too thin to have such an edge.
    """
    inside = mask.point(lambda value: 255 if value else 0)
    if blur == 0:
        return inside
    # A blurred straight edge is half of white at the edge itself.
    soft = inside.filter(ImageFilter.GaussianBlur(blur / 2)).point(lambda value: max(0, 2 * value - 255))
    soft.paste(0, mask=inside.point(lambda value: 255 - value))
    if soft.getextrema()[1] < 128:
        raise InputError(f"--blur {blur}: the mask is thinner than that; lower it, or --grow the mask")
    return soft


def as_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as (1, 3, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.asarray(image).astype(np.float32) / 127.5 - 1)
    return pixels.permute(2, 0, 1)[None]  # (H, W, 3) -> (1, 3, H, W)


@dataclass(frozen=True)
class Region:
    """The part of a photo that the model works on.

    Attributes:
        box: left, top, right and bottom in pixels of the photo.
        size: width and height at which the model sees it, multiples of the autoencoder's factor.
    """

    box: tuple[int, int, int, int]
    size: tuple[int, int]

    def cut(self, photo: Image.Image) -> Tensor:
        """The part as the model sees it, (1, 3, H, W) float32 in [-1, 1]."""
        part = photo.crop(self.box)
        if part.size != self.size:
            part = part.resize(self.size, Image.Resampling.LANCZOS)
        return as_tensor(part)

    def cut_mask(self, mask: Image.Image) -> Tensor:
        """The mask as the model sees it, (1, 1, H, W) float32 in [0, 1]; no part is too small to be seen."""
        values = torch.from_numpy(np.asarray(mask.crop(self.box)).astype(np.float32) / 255)
        return F.adaptive_max_pool2d(values[None, None], self.size[::-1])

    def put_back(
        self, photo: Image.Image, result: Image.Image, opacity: Image.Image | None = None
    ) -> Image.Image:
        """The photo with the result in its place; where the opacity is 0, each pixel is the photo's."""
        left, top, right, bottom = self.box
        if result.size != (right - left, bottom - top):
            result = result.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        edited = photo.copy()
        edited.paste(result, (left, top), None if opacity is None else opacity.crop(self.box))
        return edited


def whole(photo: tuple[int, int], model: tuple[int, int], f: int) -> Region:
    """A photo as a whole, seen with about as many pixels as the model was trained on.

    Args:
        photo, model: width and height in pixels.
        f: what the sides have to be multiples of.
    """
    scale = math.sqrt(model[0] * model[1] / (photo[0] * photo[1]))
    width, height = (max(f, round(side * scale / f) * f) for side in photo)
    return Region((0, 0, *photo), (width, height))


def around(mask: Image.Image, model: tuple[int, int], f: int) -> Region:
    """The part of a photo around its mask, in the shape of the model's pictures if the photo is large enough.

    Args:
        mask: mode L, as large as the photo, not all black.
        model: width and height in pixels of the pictures that the model was trained on; the part has at least
            as many pixels, if the photo has.
        f: what the sides that the model sees have to be multiples of.
    """
    left, top, right, bottom = mask.getbbox()
    scale = max(1, CONTEXT * (right - left) / model[0], CONTEXT * (bottom - top) / model[1])
    box = []
    for low, high, side, most in zip((left, top), (right, bottom), model, mask.size, strict=True):
        length = min(most, round(side * scale))
        start = min(max(0, (low + high - length) // 2), most - length)
        box.append((start, start + length))
    (left, right), (top, bottom) = box
    return Region((left, top, right, bottom), whole((right - left, bottom - top), model, f).size)
