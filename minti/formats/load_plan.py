"""What is going to be loaded: for every weight of every module, the file, name and form it is found in.

A plan is checked as a whole (`CheckpointPlan.problems`) before anything is read; then each module, built
without memory of its own, takes its weights over straight from disk (`PartPlan.load`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..model.config import ScheduleConfig, UNetConfig
from ..model.tokenizer import PROMPT_LENGTH
from .keymap import IGNORED, Origin, stored_shapes, to_ours
from .weightfile import WeightFile

UNCLIP_NOISE = ScheduleConfig(beta_schedule="squaredcos_cap_v2")


@dataclass
class PartPlan:
    """One module of the model, and where its weights are.

    Attributes:
        module: on the meta device, which has shapes without memory.
        origins: the name of each weight in the module -> its place in the files.
        files: the files that hold them.
        ignored: a pattern of keys in the files that belong to no module, besides `keymap.IGNORED`.
        has_config: the files come with a config; otherwise it was guessed from the shapes.
    """

    module: nn.Module
    origins: dict[str, Origin]
    files: Sequence[WeightFile]
    ignored: str = r"(?!)"
    has_config: bool = False

    def problems(self) -> list[str]:
        """What keeps the weights from fitting: missing keys, wrong shapes and types, one line each."""
        shapes = {key: shape for file in self.files for key, shape in file.shapes.items()}
        dtypes = {key: dtype for file in self.files for key, dtype in file.dtypes.items()}
        found = []
        for name, tensor in self.module.state_dict().items():
            origin = self.origins[name]
            expected = stored_shapes(tuple(tensor.shape), origin.form)
            if origin.key not in shapes:
                found.append(f"missing key {origin.key}")
            elif shapes[origin.key] not in expected:
                found.append(
                    f"{origin.key} has shape {shapes[origin.key]}, the config asks for {expected[0]}"
                )
            elif not dtypes[origin.key].is_floating_point:
                found.append(f"{origin.key} is {dtypes[origin.key]}; quantised checkpoints cannot be used")
        return found

    def load(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The module with its weights, frozen."""
        state: dict[str, Tensor] = {}
        for file in self.files:
            wanted: dict[str, list[str]] = {}
            for name, origin in self.origins.items():
                if origin.key in file.shapes:
                    wanted.setdefault(origin.key, []).append(name)
            # Where nothing needs converting, the weights stay what they are: views of the file.
            copied = device.type != "cpu" or any(file.dtypes[key] != dtype for key in wanted)
            for key, stored in file.read(list(wanted), copied=copied):
                for name in wanted[key]:
                    ours = to_ours(stored, self.origins[name].form).contiguous()
                    state[name] = ours.to(device, dtype, copy=copied)
        self.module.load_state_dict(state, strict=True, assign=True)
        return self.module.requires_grad_(False).eval()


def unclaimed_keys(parts: Sequence[PartPlan]) -> list[str]:
    """The keys in the files of some parts that none of these parts claims, and that may not be ignored."""
    claimed = {origin.key for part in parts for origin in part.origins.values()}
    ignored = re.compile("|".join([IGNORED.pattern, *(part.ignored for part in parts)]))
    keys = dict.fromkeys(key for part in parts for file in part.files for key in file.shapes)
    return [key for key in keys if key not in claimed and not ignored.fullmatch(key)]


def refuse_problems(path: Path, problems: Sequence[str]) -> None:
    """Raise InputError with the first few of the problems, if there are any."""
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise InputError(f"{path}: does not fit; {'; '.join(problems[:3])}{more}")


@dataclass
class CheckpointPlan:
    """How a checkpoint will be loaded.

    Attributes:
        path: the folder or file.
        layout: "diffusers" or "single file".
        parts: "text_encoder", "unet", "vae"; for SDXL "text_encoder_2"; for unCLIP "image_encoder" and, in a
            folder, "image_normalizer".
        schedule: noise schedule and prediction type.
        image_noise: for unCLIP, the schedule of the noise in its pictures.
        pad: the tokenizer's padding token, where the family fixes it.
        zero_empty_prompt: the model was trained with zeros for no prompt.
        ask_prediction_type: nothing tells eps from v but the weights themselves.
        unexpected: keys that no part claims.
        notes: decisions a user should know of.
    """

    path: Path
    layout: str
    parts: dict[str, PartPlan]
    schedule: ScheduleConfig
    pad: str | None = None
    zero_empty_prompt: bool = False
    ask_prediction_type: bool = False
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    image_noise: ScheduleConfig = UNCLIP_NOISE

    def problems(self) -> list[str]:
        """Everything that keeps it from being loaded, one line each; empty if all is well."""
        found = [f"{name}: {problem}" for name, part in self.parts.items() for problem in part.problems()]
        unet, vae = (self.parts[name].module.config for name in ("unet", "vae"))
        texts = {name: part.module.config for name, part in self.parts.items() if "text_encoder" in name}
        latent = vae.latent_channels
        for name, text in texts.items():
            if (positions := text.max_position_embeddings) < PROMPT_LENGTH:
                found.append(f"{name}: has {positions} positions, prompts are {PROMPT_LENGTH} tokens long")
        if unet.in_channels not in (latent, 2 * latent + 1):
            found.append(
                f"unet: takes {unet.in_channels} channels, neither those of a text-to-image model ({latent}) "
                f"nor of an inpainting model ({2 * latent + 1})"
            )
        if unet.out_channels != latent:
            found.append(f"unet: gives {unet.out_channels} channels, the autoencoder has {latent}")
        width = sum(text.hidden_size for text in texts.values())
        if unet.cross_attention_dim != width:
            found.append(
                f"unet: attends to vectors of {unet.cross_attention_dim}, the text encoder gives {width}"
            )
        pooled = getattr(texts.get("text_encoder_2"), "projection_dim", None)
        told = pooled and pooled + 6 * (unet.addition_time_embed_dim or 0)
        if self.is_unclip:
            shown = self.parts["image_encoder"].module.config.projection_dim
            told = 2 * shown  # with as many sinusoids of the noise level
            normalizer = self.parts.get("image_normalizer")
            if normalizer and (width := normalizer.module.config.embedding_dim) != shown:
                found.append(f"image_normalizer: is {width} wide, embeddings of pictures are {shown}")
        if (needed := unet.projection_class_embeddings_input_dim) != told:
            found.append(
                f"unet: needs more than a prompt ({needed or 0} numbers, of sizes as SDXL or of a picture as "
                f"unCLIP; the other parts give {told or 0})"
            )
        return found + [f"unexpected key {key}" for key in self.unexpected]

    @property
    def is_sdxl(self) -> bool:
        return "text_encoder_2" in self.parts

    @property
    def is_unclip(self) -> bool:
        return "image_encoder" in self.parts

    @property
    def family(self) -> str:
        """The name of the family of models, for people."""
        unet: UNetConfig = self.parts["unet"].module.config
        name = {768: "SD 1.x", 1024: "SD 2.x", 1280: "LDM", 2048: "SDXL"}.get(
            unet.cross_attention_dim, "Stable Diffusion, own size"
        )
        name += " unCLIP" if self.is_unclip else ""
        return name + (" inpainting" if unet.in_channels == 9 else "")
