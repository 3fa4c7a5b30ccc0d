"""Opening the CLIP that judges pictures: its encoders, its tokenizer, and how a picture becomes its input.

Four layouts are known: a transformers folder of a CLIPModel; OpenAI's own file, as a state dict or as the
TorchScript archive it was published in; an open_clip file with its `open_clip_config.json` beside it; a
Stable Diffusion folder with an `image_encoder` that shares the space of its text encoder, as weights/tiny.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..model.clip import CLIPTextModel
from ..model.config import TextConfig
from ..model.image_encoder import CLIPVisionModel
from ..model.tokenizer import PROMPT_LENGTH, Tokenizer
from . import configs, shapes_to_config
from .checkpoint import find_tokenizer
from .folder import current_snapshot, find_weights, folder_part
from .json_checks import REQUIRED, Check, Table, flag, read_json, read_keys, whole
from .keymap import OPENAI_LAYERS, Origin, find_origins, openai_image_blocks, openai_text_blocks
from .kinds import kind_of_keys
from .load_plan import PartPlan, refuse_problems, unclaimed_keys
from .preprocess import Preprocess
from .reading import naming
from .weightfile import WeightFile


@dataclass
class ClipParts:
    """A loaded CLIP."""

    text_encoder: CLIPTextModel
    image_encoder: CLIPVisionModel
    tokenizer: Tokenizer
    preprocess: Preprocess


def load_clip(path: str | Path, *, device: torch.device, tokenizer: str | Path | None = None) -> ClipParts:
    """Open a CLIP, in float32.

    Raises:
        InputError: it is none, or does not fit; the message names the file and the key.
    """
    path = current_snapshot(Path(path))
    folder = path if path.is_dir() else path.parent
    if not path.exists() and not path.is_symlink():
        raise InputError(f"{path}: does not exist; give the folder or file of a CLIP")
    if (path / "image_encoder").is_dir():
        folder = path / "image_encoder"
        text, image, unexpected = _plan_pair(path)
    elif (path / "config.json").exists():
        text, image, unexpected = _plan_transformers(path)
    elif path.is_dir() and not (path / "open_clip_config.json").is_file():
        raise InputError(
            f"{path}: has neither an image_encoder nor CLIP's config.json; give the folder of a CLIP with "
            "--clip (`python tools/download.py clip-b32 weights/clip-b32` gets one)"
        )
    else:
        text, image, unexpected = _plan_file(path)
    config: TextConfig = text.module.config
    width = config.projection_dim or config.hidden_size
    problems = [*text.problems(), *image.problems(), *(f"unexpected key {key}" for key in unexpected)]
    if width != image.module.config.projection_dim:
        problems.append(f"texts become {width} numbers and pictures {image.module.config.projection_dim}")
    if config.max_position_embeddings < PROMPT_LENGTH:
        problems.append(
            f"{config.max_position_embeddings} positions, prompts are {PROMPT_LENGTH} tokens long"
        )
    refuse_problems(path, problems)
    return ClipParts(
        tokenizer=find_tokenizer(path, config, tokenizer, flag="--clip-tokenizer"),
        preprocess=Preprocess.read(folder, image.module.config.image_size),
        text_encoder=text.load(torch.float32, device),
        image_encoder=image.load(torch.float32, device),
    )


Planned = tuple[PartPlan, PartPlan, list[str]]  # text encoder, image encoder, keys that neither claims


def _plan_pair(path: Path) -> Planned:
    source = path / "image_encoder" / "config.json"
    if not read_json(source).get("shares_text_space"):
        raise InputError(f"{source}: shares no space with the text encoder; give another CLIP with --clip")
    text = folder_part(path / "text_encoder", configs.text_config, CLIPTextModel, "model")
    image = folder_part(path / "image_encoder", configs.vision_config, CLIPVisionModel, "model")
    return text, image, [*unclaimed_keys([text]), *unclaimed_keys([image])]


# What transformers leaves out of a config because it is the default there.
TEXT_DEFAULTS = {"vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
VISION_DEFAULTS = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "patch_size": 32}


def _plan_transformers(path: Path) -> Planned:
    source = path / "config.json"
    raw = read_json(source)
    if not all(isinstance(raw.get(key), dict) for key in ("text_config", "vision_config")):
        raise InputError(f"{source}: describes no CLIPModel (no text_config and vision_config in it)")

    def config(half: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
        # The oldest configs repeat the half that counts under another name.
        told = {**raw[half], **(raw.get(f"{half}_dict") or {})}
        told["projection_dim"] = raw.get("projection_dim", 512)
        return {"num_hidden_layers": 12, **defaults, **told}

    with naming(source, "a whole CLIP model"), torch.device("meta"):
        if raw.get("model_type", "clip") != "clip":
            raise InputError(f"{source}: describes a {str(raw['model_type'])[:60]}, not a CLIP; give a CLIP")
        text_config = configs.text_config(config("text_config", TEXT_DEFAULTS), str(source), projected=True)
        vision_config = configs.vision_config(config("vision_config", VISION_DEFAULTS), str(source))
        text, image = CLIPTextModel(text_config), CLIPVisionModel(vision_config)
    files = [WeightFile(file) for file in find_weights(path, "model")[0]]
    parts = [
        PartPlan(module, {key: Origin(key) for key in module.state_dict()}, files) for module in (text, image)
    ]
    return *parts, unclaimed_keys(parts)


# `model_cfg` of open_clip_config.json, and its halves; the weights tell the sizes, too.
ANY: Check = lambda value: value  # noqa: E731
SIZES = ("layers", "width", "patch_size", "image_size", "context_length", "vocab_size", "mlp_ratio")
OPEN_CLIP: Table = {
    "embed_dim": (None, ANY),
    "quick_gelu": (False, flag),
    "vision_cfg": (REQUIRED, ANY),
    "text_cfg": (REQUIRED, ANY),
}
OPEN_CLIP_HALF: Table = {key: (None, ANY) for key in SIZES} | {
    "heads": (8, whole(1, configs.WIDTH)),
    "head_width": (64, whole(1, configs.WIDTH)),
}


def _plan_file(path: Path) -> Planned:
    """A file of OpenAI's, which says all sizes, or one of open_clip, whose config says the rest."""
    source = (path if path.is_dir() else path.parent) / "open_clip_config.json"
    if path.is_dir():
        path = find_weights(path, "open_clip_(?:model|pytorch_model)")[0][0]
    file = WeightFile(path)
    if any(key.startswith("vision_model.") for key in file.shapes):
        raise InputError(f"{path}: is from a transformers folder; give that folder, with its config.json")
    if any(key.startswith("visual.layer1.") for key in file.shapes):
        raise InputError(
            f"{path}: is a CLIP with a ResNet; use one with a vision transformer, such as ViT-B/32"
        )
    if "visual.proj" not in file.shapes and (kind := kind_of_keys(file.shapes)):
        raise InputError(f"{path}: is not a CLIP; it seems to be {kind}")
    constants = {"input_resolution", "context_length", "vocab_size"}  # of OpenAI's program, as tensors
    with naming(path, "a whole CLIP model"), torch.device("meta"):
        text = shapes_to_config.openai_text_config(file.shapes)
        vision = shapes_to_config.openai_vision_config(file.shapes)
        if source.is_file():
            with naming(source, "the config of an open_clip model"):
                # What shapes do not tell: the activation and the number of heads.
                model = read_keys(read_json(source)["model_cfg"], OPEN_CLIP, str(source))
                seen = read_keys(model["vision_cfg"], OPEN_CLIP_HALF, str(source))
                read = read_keys(model["text_cfg"], OPEN_CLIP_HALF, str(source))
                act = "quick_gelu" if model["quick_gelu"] else "gelu"
                heads = vision.hidden_size // seen["head_width"]
                text = replace(text, hidden_act=act, num_attention_heads=read["heads"])
                vision = replace(vision, hidden_act=act, num_attention_heads=heads)
        elif not (file.is_script or constants <= file.shapes.keys()):
            raise InputError(
                f"{path}: may be OpenAI's or open_clip's, which compute differently; put "
                "open_clip_config.json beside it, or use OpenAI's own file, or a transformers folder"
            )
        pairs = (
            (CLIPTextModel(text), openai_text_blocks(text)),
            (CLIPVisionModel(vision), openai_image_blocks(vision)),
        )
    parts = [
        PartPlan(module, find_origins(module.state_dict(), blocks, OPENAI_LAYERS, ""), [file])
        for module, blocks in pairs
    ]
    return *parts, [k for k in unclaimed_keys(parts) if not file.is_script and k not in constants]
