"""The latents of all pictures, computed once: the UNet's training never runs the autoencoder."""

from pathlib import Path

import numpy as np
import torch

from minti.cli.progress import Progress

from .data import LATENT, Pictures, append, records
from .decoder import load_vae
from .training import Run


def stored_latents(work: Path) -> np.ndarray:
    """(N, 4, 16, 16) float16."""
    return records(work / "latents" / "latents.f16", LATENT, np.float16)


def scaling_factor(latents: np.ndarray) -> float:
    """One over the latents' standard deviation over all channels, as published models have it."""
    return 1 / float(np.asarray(latents[:2000], dtype=np.float32).std())


@torch.no_grad()
def stage(run: Run) -> None:
    """Goes on with the first picture that has no latents; `run.steps` of them, or all."""
    pictures = Pictures(run.work, run.steps or None)
    vae = load_vae(run.work).to(run.device, memory_format=torch.channels_last)
    run.folder.mkdir(parents=True, exist_ok=True)
    path, done = run.folder / "latents.f16", len(stored_latents(run.work))
    progress = Progress(-(-max(0, len(pictures) - done) // run.batch), "part")
    run.catch_signals()
    while done < len(pictures) and not run.out_of_time():
        indices = np.arange(done, min(done + run.batch, len(pictures)))
        pixels = pictures.batch(indices).to(run.device, memory_format=torch.channels_last)
        with run.autocast():
            append(path, LATENT, vae.encode(pixels).mean.float().cpu().numpy().astype(np.float16))
        done += len(indices)
        progress.step()
    progress.close()
    latents = stored_latents(run.work)
    print(f"{len(latents)} latents, scaling factor {scaling_factor(latents):.4f}", flush=True)
