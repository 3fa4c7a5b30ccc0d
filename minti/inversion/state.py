"""The state of an optimizer and a gradient scaler as tensors, which a file can hold and no code hides in."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import InputError

COUNTS = ("growth_interval", "_growth_tracker")  # whole numbers in the state of a GradScaler


def entry(state: Mapping[str, Tensor], key: str, like: Tensor) -> Tensor:
    """A tensor of a saved state. Raises InputError unless it has the shape and dtype of `like`."""
    value = state.get(key)
    if value is None or value.shape != like.shape or value.dtype != like.dtype:
        raise InputError(f"the saved state is damaged or of another run: {key} is missing or does not fit")
    return value


def pack(step: int, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> dict[str, Tensor]:
    """Count of steps, parameters ("0.0.rows" is the first of the first group), their moments, the scaler."""
    state = {"step": torch.tensor(step)}
    for i, group in enumerate(optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            state[f"{i}.{j}.rows"] = p.detach()
            state |= {f"{i}.{j}.{key}": value for key, value in optimizer.state[p].items()}
    return state | {f"scaler.{key}": torch.tensor(float(v)) for key, v in scaler.state_dict().items()}


@torch.no_grad()
def unpack(
    state: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> int:
    """Restore what `pack` gave, and return the count of steps.

    Raises:
        InputError: a tensor is missing, or is not like the parameter it belongs to.
    """

    step = int(entry(state, "step", torch.tensor(0)))
    for i, group in enumerate(optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            rows = entry(state, f"{i}.{j}.rows", p)
            # AdamW keeps its count of steps on the CPU.
            likes, moments = {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p}, {}
            # It has nothing to keep of a parameter without a gradient so far: the model may not use it, and
            # with a scaled loss the first steps may have been left out.
            if any(f"{i}.{j}.{key}" in state for key in likes):
                found = {key: entry(state, f"{i}.{j}.{key}", like) for key, like in likes.items()}
                moments = {key: value.to(likes[key].device) for key, value in found.items()}
            p.copy_(rows)
            optimizer.state[p] = moments
    if scaler.is_enabled():
        keys = scaler.state_dict().keys()
        found = {key: entry(state, f"scaler.{key}", torch.zeros(())).item() for key in keys}
        scaler.load_state_dict(found | {key: int(found[key]) for key in COUNTS})
    return step
