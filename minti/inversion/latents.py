"""The latents of views of photos, which a word is learned from."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats.views import View
from ..model.stable_diffusion import StableDiffusion


@dataclass(frozen=True)
class Latents:
    """The distributions of the latents of V views, from which training draws.

    Attributes:
        mean, std: (V, C, h, w) float32, of about unit variance, on the device of the model.
        weight: (V, 1, h, w) float32, how much each latent counts in the loss.
        photo: (V,) int64 on the CPU, the photo that each view shows.
        sizes: (V, 6) float32 on the device of the model, `View.sizes`.
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    photo: Tensor
    sizes: Tensor


@torch.no_grad()
def encode_views(sd: StableDiffusion, views: Iterable[View]) -> Latents:
    """Encode each view once with the VAE, so that training needs no encoder."""
    scale, f = sd.vae.config.scaling_factor, sd.vae.config.downscale
    encoded = []
    for view in views:
        moments = sd.vae.encode(view.pixels[None].to(sd.device, sd.vae.dtype))
        weight = F.avg_pool2d(view.weight[None], f)  # (1, 1, S, S) -> (1, 1, h, w)
        mean, std = moments.mean.float() * scale, moments.std.float() * scale
        sizes = torch.tensor([view.sizes], dtype=torch.float32, device=sd.device)
        encoded.append((mean, std, weight.to(sd.device), torch.tensor([view.photo]), sizes))
    return Latents(*map(torch.cat, zip(*encoded, strict=True)))
