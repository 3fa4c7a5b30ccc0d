"""The decoder alone, for longer: the encoder stays as it is, and with it all latents already computed."""

from pathlib import Path

import torch
from torch import Tensor

from minti.formats import configs
from minti.model.vae import VAE

from . import models
from .data import Pictures
from .training import Run, ema_of, train
from .vae import Preview, reconstruction_loss


def load_vae(work: Path, scaling_factor: float = 1.0) -> VAE:
    """The autoencoder, with the decoder of this stage if that was run."""
    stage = "decoder" if (work / "decoder" / "state.pt").is_file() else "vae"
    vae = VAE(configs.vae_config({**models.VAE, "scaling_factor": scaling_factor}, "vae"))
    vae.load_state_dict(ema_of(work, stage)["vae"])
    return vae.eval()


def stage(run: Run) -> None:
    from .latents import stored_latents  # which needs the autoencoder itself

    stored = stored_latents(run.work)
    pictures, preview = Pictures(run.work, len(stored)), Preview(run)
    model = load_vae(run.work).to(run.device, memory_format=torch.channels_last)
    model.encoder.requires_grad_(False)
    model.quant_conv.requires_grad_(False)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        indices = pictures.indices(step, run.batch, run.seed)
        pixels = pictures.batch(indices).to(run.device).contiguous(memory_format=torch.channels_last)
        with run.autocast():
            result = model.decode(torch.from_numpy(stored[indices]).float().to(run.device))
        return reconstruction_loss(result.float(), pixels), {}

    train(run, {"vae": model}, loss_of, lambda ema, step: preview(ema["vae"], step))
