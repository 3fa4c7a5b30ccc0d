"""The layouts of public checkpoints: folders of the diffusers library, and single files of the CompVis code.

Either is turned into a plan (`plan.py`) that says where every weight is to be found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from . import infer
from .clip import CLIPTextModel
from .config import InputError, ScheduleConfig, TextConfig, UNetConfig, VAEConfig, read_json
from .diffusion import Schedule
from .keymap import (
    FOLDER_ALIASES,
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
from .plan import Part, Plan
from .tokenizer import END
from .unet import UNet
from .vae import VAE
from .weightfile import WeightFile


def plan_folder(path: Path, variant: str | None) -> Plan:
    """Plan for a folder, also of huggingface_hub's cache; `variant` as in `model.fp16.safetensors`."""
    path = current_snapshot(path)
    index = path / "model_index.json"
    kind = read_json(index).get("_class_name", "") if index.is_file() else ""
    if "XL" in kind or (not kind and (path / "text_encoder_2").is_dir()):
        raise InputError(
            f"{path}: SDXL needs two text encoders at once, which minti's pipeline does not have"
        )
    missing = [name for name in ("unet", "vae", "text_encoder", "scheduler") if not (path / name).is_dir()]
    other = bool(kind) and "StableDiffusion" not in kind
    if missing or other:
        what = f"a {kind}" if other else f"no {', no '.join(missing)} folder"
        files = [p.name for p in sorted(path.glob("*")) if p.suffix in (".safetensors", ".ckpt")]
        hint = f"; did you mean {path / files[0]}?" if files else ""
        raise InputError(f"{path}: is not a whole Stable Diffusion folder ({what}){hint}")

    stem = "diffusion_pytorch_model"
    parts = {
        "text_encoder": folder_part(path / "text_encoder", TextConfig, CLIPTextModel, "model", variant),
        "unet": folder_part(path / "unet", UNetConfig, UNet, stem, variant),
        "vae": folder_part(path / "vae", VAEConfig, VAE, stem, variant),
    }
    unexpected = []
    for name, p in parts.items():
        claimed = {origin.key for origin in p.origins.values()}
        keys = [key for file in p.files for key in file.shapes]
        unexpected += [f"{name}/{key}" for key in keys if key not in claimed and not IGNORED.fullmatch(key)]
    source = path / "scheduler" / "scheduler_config.json"
    with explained(source):
        schedule = ScheduleConfig.from_json(read_json(source), str(source))
        Schedule(schedule)
    return Plan(path, "diffusers", parts, schedule, unexpected=unexpected)


def current_snapshot(path: Path) -> Path:
    """The folder itself; of the cache of huggingface_hub, where it is two levels below, the current one."""
    if not (path / "snapshots").is_dir():
        return path
    snapshots = sorted((path / "snapshots").iterdir(), key=lambda p: p.stat().st_mtime)
    main = path / "refs" / "main"
    current = path / "snapshots" / (main.read_text().strip() if main.is_file() else "-")
    return current if current.is_dir() else snapshots[-1] if snapshots else path


def folder_part(folder: Path, config: type, module: type, stem: str, variant: str | None = None) -> Part:
    """The module that a folder's `config.json` describes, its weights under our own names or an alias."""
    source = folder / "config.json"
    with explained(source), torch.device("meta"):
        built = module(config.from_json(read_json(source), str(source)))
    files = [WeightFile(file) for file in find_weights(folder, stem, variant)]
    keys = {key for file in files for key in file.shapes}
    origins = {key: Origin(find_alias(key, keys)) for key in built.state_dict()}
    return Part(built, origins, files)


@contextmanager
def explained(source: Path, model: str = "Stable Diffusion") -> Iterator[None]:
    """Numbers that make no model (text, negative widths, ...) fail in many ways. Say where they came from."""
    try:
        yield
    except InputError as error:
        raise error if str(source) in str(error) else InputError(f"{source}: {error}") from None
    except KeyError as error:
        raise InputError(f"{source}: is not a whole {model} model (no {error.args[0]})") from None
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError, AttributeError) as error:
        raise InputError(f"{source}: does not describe a {model} model ({error})") from None


def find_alias(key: str, keys: set[str]) -> str:
    names = [key, *(key.replace(ours, theirs, 1) for ours, theirs in FOLDER_ALIASES)]
    return next((name for name in names if name in keys), key)


def find_weights(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """The files with the weights of one part: safetensors before .bin, whole before sharded."""
    for wanted in [variant] if variant else ["", "fp16", "non_ema"]:
        dot = f".{wanted}" if wanted else ""
        for name, suffix in ((stem, "safetensors"), (stem, "bin"), (f"pytorch_{stem}", "bin")):
            whole = folder / f"{name}{dot}.{suffix}"
            if whole.exists() or whole.is_symlink():
                return [whole]
            for index in (
                folder / f"{name}.{suffix}.index{dot}.json",
                folder / f"{name}{dot}.{suffix}.index.json",
            ):
                if index.exists():
                    shards = read_json(index).get("weight_map")
                    if not shards or not isinstance(shards, dict) or {*map(type, shards.values())} != {str}:
                        raise InputError(f"{index}: lists no files of weights; download it again")
                    return [folder / shard for shard in sorted(set(shards.values()))]
    there = sorted(p.name for p in folder.glob("*") if p.suffix in (".safetensors", ".bin"))
    raise InputError(
        f"{folder}: no weights{f' of variant {variant!r}' if variant else ''} (looked for {stem}.safetensors "
        f"and the like); {'there are: ' + ', '.join(there) if there else 'download the whole folder'}"
    )


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
        unet = UNet(infer.unet_config(_below(UNET_PREFIX, shapes)))
        vae = VAE(infer.vae_config(_below(VAE_PREFIX, shapes)))
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
        text = CLIPTextModel(infer.openclip_text_config(shapes))
        origins = find_origins(
            text.state_dict(), openclip_blocks(text.config), OPENCLIP_LAYERS, OPENCLIP_PREFIX
        )
        last = re.escape(f"{OPENCLIP_PREFIX}transformer.resblocks.{text.config.num_hidden_layers}.")
        return Part(text, origins, [file], ignored=f"{last}.*"), True
    prefix = next(
        (p for p in CLIP_PREFIXES if any(key.startswith(p) for key in file.shapes)), CLIP_PREFIXES[0]
    )
    text = CLIPTextModel(infer.text_config(_below(prefix, file.shapes, "text_model.")))
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
