"""The model that the options of a command ask for."""

from __future__ import annotations

import argparse

from ..formats.checkpoint import load
from ..model import kernels
from ..model.stable_diffusion import StableDiffusion

# Options that must be the same where a word is learned and where it is used.
OF_A_MODEL = ("tokenizer", "variant", "ema", "vae", "schedule", "prediction_type", "clip_skip")


def load_model(args: argparse.Namespace) -> StableDiffusion:
    """The model that the options of `Options.add_model` ask for."""
    sd = load(args.checkpoint, **{key: getattr(args, key) for key in (*OF_A_MODEL, "device", "dtype")})
    kernels.use(args.attention, sd.device)
    sd.vae.tile = args.vae_tile and args.vae_tile // sd.vae.config.downscale
    return sd
