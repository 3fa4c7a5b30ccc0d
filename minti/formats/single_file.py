"""Plans for single-file checkpoints: which tensor of the file belongs to which weight of the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from ..errors import InputError
from ..model.clip import CLIPTextModel
from ..model.config import ScheduleConfig
from ..model.tokenizer import END
from ..model.unet import UNet
from ..model.vae import VAE
from . import shapes_to_config
from .folder import explained
from .keymap import (
    IGNORED,
    OPENCLIP_LAYERS,
    UNET_LAYERS,
    VAE_LAYERS,
    Origin,
    ema_key,
    find_origins,
    openclip_blocks,
    unet_blocks,
    vae_blocks,
)
from .load_plan import Part, Plan
from .weightfile import WeightFile

# Single files ---

UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
OPENCLIP_PREFIX = "cond_stage_model.model."
CLIP_PREFIXES = ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.")


def plan_single_file(path: Path, ema: bool) -> Plan:
    """Plan for a file; `ema`: take the average of the UNet's weights that it holds beside the raw ones."""
    file = WeightFile(path)
    shapes = file.shapes
    if any(key.startswith("conditioner.embedders.") for key in shapes):
        raise InputError(
            f"{path}: SDXL needs two text encoders at once, which minti's pipeline does not have"
        )
    if "cond_stage_model.transformer.token_emb.weight" in shapes:
        raise InputError(f"{path}: has the BERT text encoder of the first latent diffusion model, not CLIP")
    with explained(path), torch.device("meta"):
        unet = UNet(shapes_to_config.unet_config(_below(UNET_PREFIX, shapes)))
        vae = VAE(shapes_to_config.vae_config(_below(VAE_PREFIX, shapes)))
        text, is_openclip = _single_file_text(file)
    parts = {
        "text_encoder": text,
        "unet": Part(
            unet, find_origins(unet.state_dict(), unet_blocks(unet.config), UNET_LAYERS, UNET_PREFIX), [file]
        ),
        "vae": Part(
            vae, find_origins(vae.state_dict(), vae_blocks(vae.config), VAE_LAYERS, VAE_PREFIX), [file]
        ),
    }
    claimed = {origin.key for part in parts.values() for origin in part.origins.values()}
    ignored = re.compile(f"{IGNORED.pattern}|{text.ignored}")
    plan = Plan(
        path,
        "single file",
        parts,
        ScheduleConfig(),
        pad="!" if is_openclip else END,
        unexpected=[key for key in shapes if key not in claimed and not ignored.fullmatch(key)],
    )
    _choose_ema(plan, file, ema)
    _read_yaml(plan, ask=is_openclip)
    return plan


def _below(prefix: str, shapes: Mapping[str, tuple[int, ...]], new: str = "") -> dict[str, tuple[int, ...]]:
    return {new + key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


def _single_file_text(file: WeightFile) -> tuple[Part, bool]:
    """The text encoder, and whether it is OpenCLIP's, as in SD 2.x."""
    shapes = _below(OPENCLIP_PREFIX, file.shapes)
    if shapes:
        text = CLIPTextModel(shapes_to_config.openclip_text_config(shapes))
        origins = find_origins(
            text.state_dict(), openclip_blocks(text.config), OPENCLIP_LAYERS, OPENCLIP_PREFIX
        )
        last = re.escape(f"{OPENCLIP_PREFIX}transformer.resblocks.{text.config.num_hidden_layers}.")
        return Part(text, origins, [file], ignored=f"{last}.*"), True
    prefix = next(
        (p for p in CLIP_PREFIXES if any(key.startswith(p) for key in file.shapes)), CLIP_PREFIXES[0]
    )
    text = CLIPTextModel(shapes_to_config.text_config(_below(prefix, file.shapes, "text_model.")))
    return Part(text, find_origins(text.state_dict(), {"text_model.": ""}, {}, prefix), [file]), False


def _choose_ema(plan: Plan, file: WeightFile, ema: bool) -> None:
    """Training keeps a running average beside the raw weights; some files have both."""
    origins = plan.parts["unet"].origins
    averaged = {name: Origin(ema_key(origin.key), origin.form) for name, origin in origins.items()}
    has_ema = all(origin.key in file.shapes for origin in averaged.values())
    if ema and not has_ema:
        raise InputError(f"{plan.path}: holds no EMA weights beside the others; leave out --ema")
    if ema:
        plan.parts["unet"].origins = averaged
    if has_ema:
        plan.notes.append(
            "UNet: averaged (EMA) weights" if ema else "UNet: raw weights (--ema for the averaged ones)"
        )


def _read_yaml(plan: Plan, ask: bool) -> None:
    """The config of the training code, where it lies beside the file, tells what the tensors do not."""
    path = plan.path.with_suffix(".yaml")
    if not path.is_file():
        plan.ask_prediction_type = ask
        return
    try:
        params = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["params"]
        kind = {"v": "v_prediction", "eps": "epsilon", "x0": "sample"}[params.get("parameterization", "eps")]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: is not the config of a latent diffusion model; fix or remove it") from None
    plan.schedule = replace(plan.schedule, prediction_type=kind)
    plan.notes.append(f"prediction type: {kind}, as {path.name} says")
