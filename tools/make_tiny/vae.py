"""The autoencoder: pictures to 16 x 16 x 4 latents of even spread, and back without blur."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minti.config import VAEConfig
from minti.vae import VAE

from . import models
from .data import TEST_SEED, Pictures, picture_at, to_pictures, to_pixels
from .draw import sheet
from .training import Run, train

KL_WEIGHT, SPREAD_WEIGHT, EDGE_WEIGHT = 1e-4, 0.1, 0.5


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


def stage(run: Run) -> None:
    pictures = Pictures(run.work)
    torch.manual_seed(run.seed)
    model = VAE(VAEConfig.from_json(models.VAE, "vae")).to(run.device, memory_format=torch.channels_last)
    test = to_pixels(np.stack([picture_at(i, TEST_SEED) for i in range(128)])).to(run.device)

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
        mse, l1 = F.mse_loss(result, pixels), F.l1_loss(result, pixels)
        edge = sum(F.l1_loss(a, b) for a, b in zip(edges(result), edges(pixels), strict=True))
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
        spread = spread_loss(mean)
        loss = l1 + 2 * mse + EDGE_WEIGHT * edge + KL_WEIGHT * kl + SPREAD_WEIGHT * spread
        psnr = 10 * math.log10(4 / mse.item())
        return loss, {"psnr": psnr, "spread": spread.item(), "std": std.mean().item()}

    @torch.no_grad()
    def preview(ema: dict[str, nn.Module], step: int) -> None:
        vae: VAE = ema["vae"]
        mean = vae.encode(test).mean
        result = vae.decode(mean)
        mse = (result.clamp(-1, 1) - test).square().mean(dim=(1, 2, 3))
        spread = mean.transpose(0, 1).flatten(1).std(dim=1)
        decibels = (10 * (4 / mse).log10()).mean()
        even = [round(value, 2) for value in spread.tolist()]
        print(f"vae step {step}: {decibels:.2f} dB on held-out pictures, latents' std {even}", flush=True)
        rows = [p for k in range(3) for x in (test, result) for p in to_pictures(x[16 * k : 16 * k + 16])]
        (run.folder / "previews").mkdir(exist_ok=True)
        sheet(rows, 16).save(run.folder / "previews" / f"step-{step:06d}.png")

    train(run, {"vae": model}, loss_of, preview)
