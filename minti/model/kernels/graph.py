"""A step of the model as one compiled graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def compile_for(device: torch.device, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of tensors as one compiled graph, which a GPU then replays without being told each step."""
    return torch.compile(function, fullgraph=True, mode="reduce-overhead" if device.type == "cuda" else None)
