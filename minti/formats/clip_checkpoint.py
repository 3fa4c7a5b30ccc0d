"""Opening the CLIP that judges pictures: its encoders, its tokenizer, and how a picture becomes its input.

Three layouts are known: a transformers folder of a CLIPModel; OpenAI's own file, as a state dict or as the
TorchScript archive it was published in; and a Stable Diffusion folder with an `image_encoder` that shares the
space of its text encoder, such as weights/tiny.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import InputError
from ..model.clip import CLIPTextModel
from ..model.config import TextConfig
from ..model.image_encoder import CLIPVisionModel
from ..model.tokenizer import PROMPT_LENGTH, Tokenizer
from . import configs, shapes_to_config
from .checkpoint import find_tokenizer
from .folder import current_snapshot, explained, find_weights, folder_part
from .json_checks import read_json
from .keymap import IGNORED, OPENAI_LAYERS, Origin, find_origins, openai_image_blocks, openai_text_blocks
from .load_plan import Part
from .torchscript import TorchScriptFile, is_torchscript
from .weightfile import WeightFile

# Of the pixels of CLIP's training pictures, in red, green and blue.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocess:
    """A picture as the image encoder takes it: the square in its middle, in fixed size and normalised.

    Attributes:
        resize: pixels of the shorter side before the square is cut out.
        crop: side of the square.
    """

    resize: int = 224
    crop: int = 224
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    @classmethod
    def read(cls, path: Path, image_size: int) -> Preprocess:
        """From a `preprocessor_config.json`; without one, as CLIP does it."""
        if not path.is_file():
            return cls(image_size, image_size)
        raw = read_json(path)
        steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
        resize, crop = raw.get("size", image_size), raw.get("crop_size", image_size)
        resize = resize.get("shortest_edge") if isinstance(resize, dict) else resize
        crop = crop.get("height") if isinstance(crop, dict) else crop
        mean, std = (
            tuple(raw.get(key, default)) for key, default in (("image_mean", MEAN), ("image_std", STD))
        )
        if (
            any(raw.get(step, True) is not True for step in steps)
            or raw.get("resample", 3) != 3
            or not isinstance(resize, int)
            or crop != image_size
            or resize < crop
            or not len(mean) == len(std) == 3
        ):
            raise InputError(
                f"{path}: asks for something else than a bicubic resize of the shorter side to at least "
                f"{image_size} pixels, the middle {image_size} of them, and a mean and a std for each colour"
            )
        return cls(resize, crop, mean, std)

    def __call__(self, image: Image.Image) -> Tensor:
        """An RGB picture of any size -> (3, crop, crop) float32.

        Pillow's bicubic filter widens as the picture shrinks, so fine patterns do not alias. Of an odd number
        of surplus rows one more goes at the end, as in transformers; in OpenAI's code sometimes at the start.
        """
        short = min(image.size)
        image = image.resize(
            [int(self.resize * side / short) for side in image.size], Image.Resampling.BICUBIC
        )
        left, top = ((side - self.crop) // 2 for side in image.size)
        image = image.crop((left, top, left + self.crop, top + self.crop))
        pixels = (
            torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255
        )  # (H, W, 3) -> (3, H, W)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std


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
    if path.is_dir():
        pair = (path / "image_encoder").is_dir()
        text, image, unexpected = _plan_pair(path) if pair else _plan_transformers(path)
        settings = path / ("image_encoder" if pair else ".") / "preprocessor_config.json"
    elif path.exists() or path.is_symlink():
        text, image, unexpected = _plan_openai(path)
        settings = path.with_name("preprocessor_config.json")
    else:
        raise InputError(f"{path}: does not exist; give the folder or file of a CLIP")
    config: TextConfig = text.module.config
    width = config.projection_dim or config.hidden_size
    problems = [*text.problems(), *image.problems(), *(f"unexpected key {key}" for key in unexpected)]
    if width != image.module.config.projection_dim:
        problems.append(f"texts become {width} numbers and pictures {image.module.config.projection_dim}")
    if config.max_position_embeddings < PROMPT_LENGTH:
        problems.append(
            f"{config.max_position_embeddings} positions, prompts are {PROMPT_LENGTH} tokens long"
        )
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise InputError(f"{path}: does not fit; {'; '.join(problems[:3])}{more}")
    return ClipParts(
        tokenizer=find_tokenizer(path, config, tokenizer, flag="--clip-tokenizer"),
        preprocess=Preprocess.read(settings, image.module.config.image_size),
        text_encoder=text.load(torch.float32, device),
        image_encoder=image.load(torch.float32, device),
    )


Planned = tuple[Part, Part, list[str]]  # text encoder, image encoder, keys that neither claims


def _plan_pair(path: Path) -> Planned:
    text = folder_part(path / "text_encoder", configs.text_config, CLIPTextModel, "model")
    config: TextConfig = text.module.config
    source = path / "text_encoder" / "config.json"
    if config.projection_dim is None and read_json(source).get("projection_dim") != config.hidden_size:
        raise InputError(f"{source}: shares no space with pictures; give another CLIP with --clip")
    image = folder_part(path / "image_encoder", configs.vision_config, CLIPVisionModel, "model")
    return text, image, [*_unclaimed([text]), *_unclaimed([image])]


# What transformers leaves out of a config because it is the default there.
TEXT_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
}
VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 32,
}


def _plan_transformers(path: Path) -> Planned:
    source = path / "config.json"
    if not source.exists():
        raise InputError(
            f"{path}: has neither an image_encoder nor CLIP's config.json; give the folder of a CLIP with "
            "--clip (`python tools/download.py clip-b32 weights/clip-b32` gets one)"
        )
    raw = read_json(source)
    if not all(isinstance(raw.get(key), dict) for key in ("text_config", "vision_config")):
        raise InputError(f"{source}: describes no CLIPModel (no text_config and vision_config in it)")
    shared = {"projection_dim": raw.get("projection_dim", 512)}

    def config(half: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
        # The oldest configs repeat the half that counts under another name.
        return {**defaults, **raw[half], **(raw.get(f"{half}_dict") or {}), **shared}

    with explained(source, "CLIP"), torch.device("meta"):
        text = CLIPTextModel(
            configs.text_config(config("text_config", TEXT_DEFAULTS), str(source), projected=True)
        )
        vision = configs.vision_config(config("vision_config", VISION_DEFAULTS), str(source))
        image = CLIPVisionModel(vision)
    files = [WeightFile(file) for file in find_weights(path, "model", None)]
    parts = [
        Part(module, {key: Origin(key) for key in module.state_dict()}, files) for module in (text, image)
    ]
    return *parts, _unclaimed(parts)


def _plan_openai(path: Path) -> Planned:
    script = is_torchscript(path)
    file = TorchScriptFile(path) if script else WeightFile(path)
    if any(key.startswith("vision_model.") for key in file.shapes):
        raise InputError(f"{path}: is from a transformers folder; give that folder, with its config.json")
    if any(key.startswith("visual.layer1.") for key in file.shapes):
        raise InputError(
            f"{path}: is a CLIP with a ResNet; use one with a vision transformer, such as ViT-B/32"
        )
    with explained(path, "CLIP"), torch.device("meta"):
        text = CLIPTextModel(shapes_to_config.openai_text_config(file.shapes))
        image = CLIPVisionModel(shapes_to_config.openai_vision_config(file.shapes))
    parts = [
        Part(module, find_origins(module.state_dict(), blocks, OPENAI_LAYERS, ""), [file])
        for module, blocks in (
            (text, openai_text_blocks(text.config)),
            (image, openai_image_blocks(image.config)),
        )
    ]
    sizes = {"input_resolution", "context_length", "vocab_size"}  # numbers of the program, kept as tensors
    return *parts, [key for key in _unclaimed(parts) if not script and key not in sizes]


def _unclaimed(parts: list[Part]) -> list[str]:
    """The keys of some files that none of the parts in them claims."""
    claimed = {origin.key for part in parts for origin in part.origins.values()}
    keys = (key for file in parts[0].files for key in file.shapes)
    return [key for key in keys if key not in claimed and not IGNORED.fullmatch(key)]
