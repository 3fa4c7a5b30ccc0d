"""The model that the options of a command ask for."""

from __future__ import annotations

import argparse

from ..formats.checkpoint import load
from ..model import kernels
from ..model.stable_diffusion import StableDiffusion


def load_model(args: argparse.Namespace) -> StableDiffusion:
    """The model that the options of `Options.add_model` ask for."""
    keys = ("tokenizer", "variant", "ema", "vae", "schedule", "prediction_type", "device", "dtype")
    sd = load(args.checkpoint, **{key: getattr(args, key) for key in keys})
    kernels.use(args.attention, sd.device)
    sd.vae.tile = args.vae_tile and args.vae_tile // sd.vae.config.downscale
    return sd
