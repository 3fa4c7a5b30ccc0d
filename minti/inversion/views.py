"""From photos to what a word is learned from: square crops, and their latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import InputError
from ..formats.photos import Photo
from ..model.stable_diffusion import StableDiffusion

CROPS = ("center", "random", "none", "squash")
RANDOM_CROPS = 8  # of each photo


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
