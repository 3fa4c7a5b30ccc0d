"""Bipartite DDIM inversion: the noise that a photo would have come from, and other prompts for that noise
(Dhariwal and Nichol, arXiv 2105.05233, appendix F; the Textual Inversion paper, appendix A).

A DDIM step splits x_t into a clean picture and noise and puts them together again at an earlier time. The
same formula, walked from z0 to later times, leads to an x_T. Sampling from that x_T with the prompt that was
used leads back to the photo, nearly: the step towards t needs the UNet's output at x_t, which is not known
yet, and uses the output at the x before. Guidance makes this error larger at every step, until the structure
of the photo is lost.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..model.diffusion import Schedule
from ..model.stable_diffusion import Predict, StableDiffusion


def invert(
    schedule: Schedule,
    predict: Predict,
    x0: Tensor,
    steps: int,
    *,
    at_current: bool = False,
) -> Iterator[Tensor]:
    """Walk from a clean latent to noise, yielding every x_t on the way.

    Args:
        predict: (x, t) -> the UNet's output, (B, C, h, w).
        x0: (B, C, h, w) float32.
        steps: how many steps `Schedule.ddim_sample` will take back.
        at_current: as the authors of the paper did, tell the UNet the time that x is at, and take x0 for the
            x of the first time; otherwise tell it the time that the step leads to, as on the way back.

    Yields:
        (B, C, h, w) float32, `steps` times, or one time less with `at_current`; the last is x_T.

    Raises:
        InputError: the model predicts x0, so that a clean latent says nothing about the noise.
    """
    if schedule.config.prediction_type == "sample":
        raise InputError(
            "the model predicts x0, for which there is no DDIM inversion; use another checkpoint"
        )
    path = [(t_prev, t) for t, t_prev in schedule.timesteps(steps)][::-1]
    if at_current:
        path = list(pairwise(t for _, t in path))
    x = x0
    for here, there in path:
        prediction = predict(x, here if at_current else there).float()
        x = schedule.ddim_step(prediction, x, here, there, 0.0, x)
        yield x


def invert_photo(
    sd: StableDiffusion, z0: Tensor, prompt: str, *, steps: int, at_current: bool = False, **options: Any
) -> Iterator[Tensor]:
    """The way from the latents of a photo, (1, C, h, w), to the x_T from which `prompt` leads to it.

    Args:
        steps, at_current: see `invert`.
        options: `guidance_scale` and others of `StableDiffusion.denoise`.
    """
    options["sampler"] = lambda predict, _: invert(sd.schedule, predict, z0, steps, at_current=at_current)
    return sd.denoise([prompt], [0], steps=steps, size=pixels_of(sd, z0), **options)


def sample_from(
    sd: StableDiffusion, x_T: Tensor, prompt: str, *, steps: int, **options: Any
) -> Iterator[Tensor]:
    """Back from an x_T, (1, C, h, w), to the latents of a picture that a prompt describes."""
    options["sampler"] = lambda predict, _: sd.schedule.ddim_sample(predict, x_T, steps)
    return sd.denoise([prompt], [0], steps=steps, size=pixels_of(sd, x_T), **options)


def pixels_of(sd: StableDiffusion, latents: Tensor) -> tuple[int, int]:
    """Width and height of the pictures that latents, (B, C, h, w), stand for."""
    height, width = (side * sd.vae.config.downscale for side in latents.shape[2:])
    return width, height


@torch.no_grad()
def encode_mean(sd: StableDiffusion, pixels: Tensor) -> Tensor:
    """The latents of a picture, (1, 3, H, W) in [-1, 1], without chance: (1, C, h, w) float32."""
    mean = sd.vae.encode(pixels.to(sd.device, sd.vae.dtype)).mean
    return mean.float() * sd.vae.config.scaling_factor
