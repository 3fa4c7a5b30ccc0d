"""Plans for folders in the layout of the diffusers library: each part has a folder with its config.json."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import InputError
from ..model.bert import BertTextModel
from ..model.clip import CLIPTextModel
from ..model.diffusion import Schedule
from ..model.image_encoder import CLIPVisionModel
from ..model.unclip import ImageNormalizer
from ..model.unet import UNet
from ..model.vae import VAE
from . import configs
from .json_checks import read_json
from .keymap import FOLDER_ALIASES, Origin
from .kinds import kind_of_folder
from .load_plan import CheckpointPlan, PartPlan, unclaimed_keys
from .reading import naming, read_bytes
from .weightfile import WeightFile

STEM = "diffusion_pytorch_model"  # how diffusers calls files of weights; transformers calls them "model"
PARTS = {  # name of the part and its folder -> reader of its config, module, name of its files
    "text_encoder": (configs.text_config, CLIPTextModel, "model"),
    "unet": (configs.unet_config, UNet, STEM),
    "vae": (configs.vae_config, VAE, STEM),
}
UNCLIP = "StableUnCLIPImg2ImgPipeline"
UNCLIP_PARTS = {
    "image_encoder": (configs.vision_config, CLIPVisionModel, "model"),
    "image_normalizer": (configs.normalizer_config, ImageNormalizer, STEM),
}
REFINER = "is the refiner of SDXL, which only finishes pictures; use stable-diffusion-xl-base-1.0"
PLAYGROUND = "was trained with EDM's noise levels, as Playground v2.5 and CosXL, which minti does not have"


def plan_folder(
    path: Path, variant: str | None, vae: PartPlan | None = None, *, as_published: bool = False
) -> CheckpointPlan:
    """Plan for a folder, also of huggingface_hub's cache.

    Args:
        variant: of which set of weights, as in `model.fp16.safetensors`; a part without it uses another.
        vae: an autoencoder from elsewhere, instead of the folder's own.
        as_published: believe the folder of the first latent diffusion model, whose noise schedule is wrong.
    """
    path = current_snapshot(path)
    index = path / "model_index.json"
    index_json = read_json(index) if index.is_file() else {}
    kind = index_json.get("_class_name") or ""
    if not isinstance(kind, str):
        raise InputError(f"{index}: _class_name = {str(kind)[:60]} should be the name of a pipeline")
    wanted, folders = dict(PARTS), {name: name for name in (*PARTS, "text_encoder_2", "scheduler")}
    if is_ldm := kind == "LDMTextToImagePipeline" or (path / "bert").is_dir():
        wanted["text_encoder"] = (configs.bert_config, BertTextModel, "model")
        folders |= {"text_encoder": "bert", "vae": "vqvae"}
    if (path / "text_encoder_2").is_dir():
        wanted["text_encoder_2"] = PARTS["text_encoder"]
        if not (path / "text_encoder").is_dir():
            raise InputError(f"{path}: {REFINER}")
    if is_unclip := kind == UNCLIP or (path / "image_normalizer").is_dir():
        wanted |= UNCLIP_PARTS
        folders |= {name: name for name in UNCLIP_PARTS}
    if vae:
        del wanted["vae"]
    missing = [folders[name] for name in (*wanted, "scheduler") if not (path / folders[name]).is_dir()]
    other = bool(kind) and "StableDiffusion" not in kind and not (is_ldm or kind == UNCLIP)
    if missing or other:
        what = f"a {kind}" if other else f"no {', no '.join(missing)} folder"
        files = [p.name for p in sorted(path.glob("*")) if p.suffix in (".safetensors", ".ckpt")]
        hint = f"did you mean {path / files[0]}?" if files else kind_of_folder(path)
        raise InputError(f"{path}: is not a whole Stable Diffusion folder ({what}); {hint}")

    source = path / "scheduler" / "scheduler_config.json"
    with naming(source, "the noise schedule of a Stable Diffusion"):
        raw = read_json(source)
        if str(raw.get("_class_name", "")).startswith("EDM"):
            raise InputError(f"{path}: {PLAYGROUND}")
        schedule = configs.schedule_config(raw, str(source))
        if not (is_ldm and as_published):
            # Whatever the config says, the pipeline of diffusers has taken 1 since it learned of the setting.
            schedule = replace(schedule, steps_offset=1)
        Schedule(schedule)
    parts, notes, chosen = {"vae": vae} if vae else {}, [], set()
    if is_ldm and not as_published and schedule.beta_schedule == "linear":
        schedule = replace(schedule, beta_schedule="scaled_linear", set_alpha_to_one=False)
        notes.append(
            "noise schedule: scaled_linear, with which the model was trained; the folder says linear "
            "(--schedule as-published takes that)"
        )
    for name, (config, module, stem) in wanted.items():
        parts[name] = folder_part(path / folders[name], config, module, stem, variant)
        chosen.add(used := find_weights(path / folders[name], stem, variant)[1])
        if used != (variant or ""):
            notes.append(f"{name}: no {variant or 'plain'} weights, using {parts[name].files[0].path.name}")
    if variant and variant not in chosen:
        raise InputError(f"{path}: no weights of variant {variant!r} in any part; leave out --variant")
    unexpected = [f"{name}/{key}" for name, part in parts.items() for key in unclaimed_keys([part])]
    plan = CheckpointPlan(path, "diffusers", parts, schedule, unexpected=unexpected, notes=notes)
    if is_unclip:
        source = path / "image_noising_scheduler" / "scheduler_config.json"
        with naming(source, "the schedule of the noise in unCLIP's pictures"):
            plan.image_noise = configs.schedule_config(read_json(source), str(source), configs.IMAGE_NOISE)
    plan.zero_empty_prompt = plan.is_sdxl and index_json.get("force_zeros_for_empty_prompt") is not False
    return plan


def current_snapshot(path: Path) -> Path:
    """The folder itself; of the cache of huggingface_hub, where it is two levels below, the current one."""
    if not (path / "snapshots").is_dir():
        return path
    folders = [p for p in (path / "snapshots").iterdir() if p.is_dir()]
    main = path / "refs" / "main"
    name = read_bytes(main, 1000).decode(errors="replace").strip() if main.is_file() else ""
    return max(folders, key=lambda p: (p.name == name, p.stat().st_mtime), default=path)


def folder_part(
    folder: Path, config: Callable, module: type, stem: str, variant: str | None = None
) -> PartPlan:
    """The module that a folder's `config.json` describes, its weights under our own names or an alias."""
    source = folder / "config.json"
    with naming(source, "the config of a Stable Diffusion"), torch.device("meta"):
        built = module(config(read_json(source), str(source)))
    files = [WeightFile(file) for file in find_weights(folder, stem, variant)[0]]
    keys = {key for file in files for key in file.shapes}
    origins = {key: Origin(find_alias(key, keys)) for key in built.state_dict()}
    return PartPlan(built, origins, files, has_config=True)


def find_alias(key: str, keys: set[str]) -> str:
    """The name under which a folder stores one of our weights: our own, or the first alias that is there."""
    names = [key, *(key.replace(ours, theirs, 1) for ours, theirs in FOLDER_ALIASES)]
    return next((name for name in names if name in keys), key)


def find_weights(folder: Path, stem: str, variant: str | None = None) -> tuple[list[Path], str]:
    """The files with the weights of one part, and their variant ("" for the plain ones).

    Of several sets the wanted variant comes first, then the plain one, then any other; within it safetensors
    before .bin, and one whole file before pieces, which are called `model-00001-of-00002.safetensors`.

    Raises:
        InputError: there are no weights, or not all pieces of them.
    """
    name = re.compile(
        rf"(pytorch_)?{stem}(\.(?P<before>\w+))?(?P<piece>-\d+-of-(?P<count>\d+))?(\.(?P<after>\w+))?"
        r"\.(?P<suffix>safetensors|bin)"
    )
    sets: dict[tuple, list[Path]] = {}
    for path in sorted(folder.glob("*")):
        if m := name.fullmatch(path.name):
            kind = m["before"] or m["after"] or ""
            order = [variant, "", "fp16", "non_ema"]
            place = order.index(kind) if kind in order else len(order)
            rank = (place, kind, m["suffix"] == "bin", bool(m["piece"]), path.name if not m["piece"] else "")
            sets.setdefault((*rank, int(m["count"] or 1)), []).append(path)
    if not sets:
        there = sorted(p.name for p in folder.glob("*") if p.suffix in (".safetensors", ".bin"))
        whole = folder.parent if (folder.parent / "model_index.json").is_file() else folder
        hint = f"there are: {', '.join(there[:5])}" if there else kind_of_folder(whole)
        raise InputError(f"{folder}: no weights (looked for {stem}.safetensors and the like); {hint}")
    (_, kind, *_, count), files = min(sets.items())
    if len(files) != count:
        raise InputError(f"{folder}: holds {len(files)} of the {count} pieces of its weights; get the others")
    return files, kind
