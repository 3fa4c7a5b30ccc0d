"""The estimate of memory, against what is really remembered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import minti
from minti.runs.memory import training_memory

from .oracles import save_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("memory")
    return {family: save_folder(base / family, family) for family in ("small", "sd1", "sd2")}


def measured(sd: minti.StableDiffusion, batch: int, width: int, height: int) -> int:
    """Bytes that a real forward pass of the UNet keeps for the backward pass, besides the weights."""
    kept: dict[int, torch.Tensor] = {}
    weights = {p.untyped_storage().data_ptr() for p in sd.unet.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no address is used twice
        return tensor

    f, config = sd.vae.config.downscale, sd.unet.config
    x = torch.randn(batch, config.in_channels, height // f, width // f, dtype=sd.dtype)
    context = torch.randn(batch, 77, config.cross_attention_dim, dtype=sd.dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = sd.unet(x, torch.arange(batch), context)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    output.sum().backward()
    assert context.grad.abs().max() > 0
    return total


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_what_the_backward_pass_needs(family: str, checkpointing: bool, folders: dict[str, Path]) -> None:
    """Five per cent: attention may keep a little more or less for each kind of processor."""
    sd = minti.load(folders[family], device="cpu")
    sd.unet.gradient_checkpointing = checkpointing
    _, estimate = training_memory(sd, 3, (64, 96))
    assert estimate == pytest.approx(measured(sd, 3, 64, 96), rel=0.05)


def test_less_with_checkpointing_and_in_half_precision(folders: dict[str, Path]) -> None:
    sd = minti.load(folders["small"], device="cpu")
    weights, whole = training_memory(sd, 2, (64, 64))
    sd.unet.gradient_checkpointing = True
    assert training_memory(sd, 2, (64, 64))[1] < 0.7 * whole
    half = minti.load(folders["small"], device="cpu", dtype="bfloat16")
    half_weights, half_whole = training_memory(half, 2, (64, 64))
    assert half_weights * 2 == weights
    assert half_whole == pytest.approx(whole / 2, rel=0.15)
    assert torch.get_default_dtype() == torch.float32


def test_weights_of_all_parts(folders: dict[str, Path]) -> None:
    """As many bytes as the files hold, headers aside."""
    sd = minti.load(folders["small"], device="cpu")
    size = sum(path.stat().st_size for path in folders["small"].rglob("*.safetensors"))
    assert training_memory(sd, 1, (16, 16))[0] == pytest.approx(size, rel=0.05)
    assert training_memory(sd, 1, (16, 16))[0] < size


def test_nothing_is_computed(folders: dict[str, Path]) -> None:
    """A batch that would take terabytes is estimated, and the model stays as it was."""
    sd = minti.load(folders["small"], device="cpu")
    assert training_memory(sd, 10_000, (4096, 4096))[1] > 1e13
    assert all(p.device.type == "cpu" and p.grad is None for p in sd.unet.parameters())
