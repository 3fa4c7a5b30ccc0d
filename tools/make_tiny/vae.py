"""The autoencoder: pictures to 16 x 16 x 4 latents of even spread, and back without blur."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minti.formats import configs
from minti.model.vae import VAE

from . import models
from .data import TEST_SEED, Pictures, picture_at, to_pictures, to_pixels
from .draw import sheet
from .training import Run, read, train

KL_WEIGHT, SPREAD_WEIGHT, EDGE_WEIGHT = 1e-4, 0.1, 0.5

TESTS = 128  # pictures that previews look at


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def spread_loss(mean: Tensor) -> Tensor:
    """How far the latents' channels are from zero mean, unit variance and no correlation.

    The published `scaling_factor` is one number for all channels, so they had better be alike.
    """
    z = mean.transpose(0, 1).flatten(1)  # (B, C, h, w) -> (C, Bhw)
    centre = z.mean(dim=1, keepdim=True)
    covariance = (z - centre) @ (z - centre).T / z.shape[1]
    return centre.square().mean() + (covariance - torch.eye(len(z), device=z.device)).square().mean()


def reconstruction_loss(result: Tensor, pixels: Tensor) -> Tensor:
    """Differences of pixels and of edges; and the logarithm of each picture's own mean square, which is what
    decibels count, so that no picture is given up for another."""
    decibels = (result - pixels).square().mean(dim=(1, 2, 3)).add(1e-6).log().mean()
    edge = sum(F.l1_loss(a, b) for a, b in zip(edges(result), edges(pixels), strict=True))
    return F.l1_loss(result, pixels) + 2 * F.mse_loss(result, pixels) + EDGE_WEIGHT * edge + 0.02 * decibels


class Preview:
    """Says how well held-out pictures come back, and shows some."""

    def __init__(self, run: Run) -> None:
        self.run = run
        pictures = np.stack([picture_at(i, TEST_SEED) for i in range(TESTS)])
        self.pixels = to_pixels(pictures).to(run.device)

    @torch.no_grad()
    def __call__(self, vae: VAE, step: int) -> None:
        mean = vae.encode(self.pixels).mean
        result = vae.decode(mean)
        mse = (result.clamp(-1, 1) - self.pixels).square().mean(dim=(1, 2, 3))
        decibels = (10 * (4 / mse).log10()).mean()
        even = [round(value, 2) for value in mean.transpose(0, 1).flatten(1).std(dim=1).tolist()]
        text = f"{decibels:.2f} dB on held-out pictures, latents' std {even}"
        print(f"{self.run.name} step {step}: {text}", flush=True)
        parts = [x[16 * k : 16 * k + 16] for k in range(3) for x in (self.pixels, result)]
        folder = self.run.folder / "previews"
        folder.mkdir(exist_ok=True)
        sheet([p for x in parts for p in to_pictures(x)], 16).save(folder / f"step-{step:06d}.png")


def stage(run: Run) -> None:
    pictures, preview = Pictures(run.work), Preview(run)
    torch.manual_seed(run.seed)
    model = VAE(configs.vae_config(models.VAE, "vae"))
    if run.start:
        model.load_state_dict(read(run.start / "vae" / "diffusion_pytorch_model.safetensors"))
    model = model.to(run.device, memory_format=torch.channels_last)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        pixels = pictures.batch(pictures.indices(step, run.batch, run.seed)).to(run.device)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        noise_of = torch.Generator(run.device).manual_seed(run.seed * 1_000_003 + step)
        with run.autocast():
            moments = model.encode(pixels)
            mean, std = moments.mean.float(), moments.std.float()
            noise = torch.randn(mean.shape, generator=noise_of, device=run.device)
            result = model.decode(mean + std * noise)
        result = result.float()
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
        spread = spread_loss(mean)
        loss = reconstruction_loss(result, pixels) + KL_WEIGHT * kl + SPREAD_WEIGHT * spread
        psnr = 10 * math.log10(4 / F.mse_loss(result, pixels).item())
        return loss, {"psnr": psnr, "spread": spread.item(), "std": std.mean().item()}

    train(run, {"vae": model}, loss_of, lambda ema, step: preview(ema["vae"], step))
