"""What is going to be loaded: for every weight of every module, the file, name and form it is found in.

A plan is checked as a whole (`Plan.problems`) before anything is read; then each module, built without memory
of its own, takes its weights over straight from disk (`Part.load`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..model.config import ScheduleConfig, UNetConfig
from ..model.tokenizer import PROMPT_LENGTH
from .keymap import Origin, stored_shapes, to_ours
from .weightfile import WeightFile


@dataclass
class Part:
    """One module of the model, and where its weights are."""

    module: nn.Module  # on the meta device: shapes without memory
    origins: dict[str, Origin]
    files: Sequence[WeightFile]
    ignored: str = r"(?!)"  # keys of the files that belong to nobody, besides keymap.IGNORED

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


@dataclass
class Plan:
    """How a checkpoint will be loaded.

    Attributes:
        path: the folder or file.
        layout: "diffusers" or "single file".
        parts: "text_encoder", "unet" and "vae".
        schedule: noise schedule and prediction type.
        pad: the tokenizer's padding token, where the family fixes it.
        ask_prediction_type: nothing tells eps from v but the weights themselves.
        unexpected: keys that no part claims.
        notes: decisions a user should know of.
    """

    path: Path
    layout: str
    parts: dict[str, Part]
    schedule: ScheduleConfig
    pad: str | None = None
    ask_prediction_type: bool = False
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        """Everything that keeps it from being loaded, one line each; empty if all is well."""
        found = [f"{name}: {problem}" for name, part in self.parts.items() for problem in part.problems()]
        positions = self.parts["text_encoder"].module.config.max_position_embeddings
        if positions < PROMPT_LENGTH:
            found.append(f"text_encoder: has {positions} positions, prompts are {PROMPT_LENGTH} tokens long")
        channels = self.parts["unet"].module.config.in_channels
        latent = self.parts["vae"].module.config.latent_channels
        if channels not in (latent, 2 * latent + 1):
            found.append(
                f"unet: takes {channels} channels, neither those of a text-to-image model ({latent}) nor of "
                f"an inpainting model ({2 * latent + 1})"
            )
        return found + [f"unexpected key {key}" for key in self.unexpected]

    @property
    def family(self) -> str:
        """What a reader would call it."""
        unet: UNetConfig = self.parts["unet"].module.config
        name = {768: "SD 1.x", 1024: "SD 2.x"}.get(unet.cross_attention_dim, "Stable Diffusion, own size")
        return name + (" inpainting" if unet.in_channels == 9 else "")
