"""The latents of all pictures, computed once: the UNet's training never runs the autoencoder."""

import numpy as np
import torch

from minti.cli.progress import Progress

from .data import Pictures
from .decoder import load_vae
from .training import Run


def scaling_factor(latents: np.ndarray) -> float:
    """One over the latents' standard deviation over all channels, as published models have it."""
    return 1 / float(np.asarray(latents[:: max(1, len(latents) // 2000)], dtype=np.float32).std())


@torch.no_grad()
def stage(run: Run) -> None:
    pictures = Pictures(run.work, run.steps or None)
    vae = load_vae(run.work).to(run.device, memory_format=torch.channels_last)
    run.folder.mkdir(parents=True, exist_ok=True)
    part, path = run.folder / "latents.part.npy", run.folder / "latents.npy"
    latents = np.lib.format.open_memmap(part, "w+", np.float16, (len(pictures), 4, 16, 16))
    progress = Progress(-(-len(pictures) // run.batch), "batch")
    run.catch_signals()
    for start in range(0, len(pictures), run.batch):
        if run.out_of_time():
            return
        indices = np.arange(start, min(start + run.batch, len(pictures)))
        pixels = pictures.batch(indices).to(run.device).contiguous(memory_format=torch.channels_last)
        with run.autocast():
            latents[indices] = vae.encode(pixels).mean.float().cpu().numpy()
        progress.step()
    latents.flush()
    part.replace(path)
    spread = np.asarray(latents[:2000], dtype=np.float32).std(axis=(0, 2, 3)).round(2)
    print(
        f"latents: channels' std {spread.tolist()}, scaling factor {scaling_factor(latents):.4f}", flush=True
    )
