"""Blended Latent Diffusion: a prompt paints what a mask shows, and the rest of the picture stays (Avrahami et
al., arXiv 2206.02779; the Textual Inversion paper, figure 9).

The sampler walks from noise to picture as always. After each step, what lies outside the mask is replaced by
the latents of the photo, at the noise level that has been reached:

    x_t = m * x_t + (1 - m) * (sqrt(a_t) z0 + sqrt(1 - a_t) eps)

so that inside and outside are always equally noisy and the model makes them fit; after the last step the
outside is z0 itself. A grey cell of the mask joins m late: one of value g is painted only in the last share g
of the steps (Levin and Fried, arXiv 2306.00950), so it changes little. A UNet made for inpainting needs none
of this: it is shown the mask and the photo without what is masked.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..model.stable_diffusion import Predict, StableDiffusion


@torch.no_grad()
def paint(
    sd: StableDiffusion,
    photo: Tensor,
    mask: Tensor,
    prompt: str,
    seeds: Sequence[int],
    *,
    steps: int = 50,
    strength: float = 1.0,
    fixed_noise: bool = False,
    dilate: int = 0,
    **options: Any,
) -> Iterator[Tensor]:
    """Paint the masked part of a photo anew, one candidate for each seed, yielding every x_t on the way.

    Args:
        photo: (1, 3, H, W) float32 in [-1, 1].
        mask: (1, 1, H, W) float32 in [0, 1], see the top of this file.
        strength: the share of the steps that is walked. At 1 they begin with noise, otherwise with a noisy
            photo, of which something shows through.
        fixed_noise: mix the photo with the first noise of each candidate at all levels, as diffusers does,
            instead of with fresh noise at every step.
        dilate: begin with a mask that is this many cells wider and shrink it to the given one, so that there
            is room to paint under a thin mask. A cell is one latent, 8 x 8 pixels in most models.
        options: `guidance_scale` and others of `StableDiffusion.denoise`.

    Yields:
        (B, C, h, w) float32; the last are the finished latents.

    Raises:
        InputError: no step remains at this strength.
    """
    path = sd.schedule.timesteps(steps)
    path = path[len(path) - int(steps * strength) :]
    if not path:
        raise InputError(f"strength {strength}: none of {steps} steps remain; raise it")
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    for_inpainting = sd.unet.config.in_channels > sd.vae.config.latent_channels
    cells = F.max_pool2d(mask, sd.vae.config.downscale).to(sd.device)  # (1, 1, h, w)

    # The order of random draws is that of diffusers, so that a seed gives the same picture.
    z0 = None if for_inpainting and strength == 1 else encode(sd, photo, generators)
    start = noise = draw((1, sd.vae.config.latent_channels, *cells.shape[2:]), generators).to(sd.device)
    if strength < 1:
        start = sd.schedule.q_sample(z0, noise, path[0][0])
    beside = []  # what a UNet for inpainting sees beside x_t
    if for_inpainting:
        hidden = encode(sd, photo * (mask == 0), generators)
        beside = [(cells > 0).float().expand(len(seeds), -1, -1, -1), hidden]

    def sampler(predict: Predict, _: Tensor) -> Iterator[Tensor]:
        x = start
        for i, (t, t_prev) in enumerate(path):
            x = sd.schedule.ddim_step(predict(torch.cat([x, *beside], dim=1), t), x, t, t_prev, 0.0, x)
            if not for_inpainting:
                is_last, background = i == len(path) - 1, z0
                if not is_last:
                    eps = noise if fixed_noise else draw(noise[:1].shape, generators).to(noise)
                    background = sd.schedule.q_sample(z0, eps, path[i + 1][0])
                wide = widen(cells, (len(path) - 1 - i) * (dilate + 1) // len(path))
                x = torch.where(wide > 1 - (i + 1) / len(path), x, background)
            yield x

    size = (photo.shape[3], photo.shape[2])
    yield from sd.denoise([prompt] * len(seeds), seeds, steps=steps, size=size, sampler=sampler, **options)


def encode(sd: StableDiffusion, pixels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw latents of one picture, (1, 3, H, W) in [-1, 1], for each generator: (B, C, h, w) float32."""
    moments = sd.vae.encode(pixels.to(sd.device, sd.vae.dtype))
    return torch.cat([moments.sample(g) for g in generators]).float() * sd.vae.config.scaling_factor


def draw(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise, (1, C, h, w) of each generator, together (B, C, h, w) on the CPU."""
    return torch.cat([torch.randn(shape, generator=g) for g in generators])


def widen(cells: Tensor, by: int) -> Tensor:
    """A mask, (1, 1, h, w), that spreads by so many cells in all directions."""
    return F.max_pool2d(cells, 2 * by + 1, 1, by)
