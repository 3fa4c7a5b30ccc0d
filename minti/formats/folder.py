"""The layouts of public checkpoints: folders of the diffusers library, and single files of the CompVis code.

Either is turned into a plan (`plan.py`) that says where every weight is to be found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import InputError
from ..model.clip import CLIPTextModel
from ..model.diffusion import Schedule
from ..model.unet import UNet
from ..model.vae import VAE
from . import configs
from .json_checks import read_json
from .keymap import FOLDER_ALIASES, IGNORED, Origin
from .load_plan import Part, Plan
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
        "text_encoder": folder_part(
            path / "text_encoder", configs.text_config, CLIPTextModel, "model", variant
        ),
        "unet": folder_part(path / "unet", configs.unet_config, UNet, stem, variant),
        "vae": folder_part(path / "vae", configs.vae_config, VAE, stem, variant),
    }
    unexpected = []
    for name, p in parts.items():
        claimed = {origin.key for origin in p.origins.values()}
        keys = [key for file in p.files for key in file.shapes]
        unexpected += [f"{name}/{key}" for key in keys if key not in claimed and not IGNORED.fullmatch(key)]
    source = path / "scheduler" / "scheduler_config.json"
    with explained(source):
        schedule = configs.schedule_config(read_json(source), str(source))
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


def folder_part(folder: Path, config: Callable, module: type, stem: str, variant: str | None = None) -> Part:
    """The module that a folder's `config.json` describes, its weights under our own names or an alias."""
    source = folder / "config.json"
    with explained(source), torch.device("meta"):
        built = module(config(read_json(source), str(source)))
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
