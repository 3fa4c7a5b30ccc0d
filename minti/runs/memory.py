"""How much memory learning a word will take, counted before it starts."""

from __future__ import annotations

import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..model.stable_diffusion import StableDiffusion
from ..model.unet import UNet


def training_memory(sd: StableDiffusion, batch: int, size: tuple[int, int]) -> tuple[int, int]:
    """Bytes that training will hold: (weights of all parts, what the UNet remembers for the backward pass).

    The second is counted, not measured: the UNet runs on tensors that have shapes but no memory, and all that
    it saves on the way is added up. Workspace and the text encoder come on top, some 10 percent.

    Args:
        batch: samples at a time, of all words together.
        size: (width, height) of the pictures.
    """
    modules = (sd.text_encoder, sd.unet, sd.vae)
    weights = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    saved: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
            kept.append(tensor)  # or another could take its place under the same key
        return tensor

    config, downscale = sd.unet.config, sd.vae.config.downscale
    default = torch.get_default_dtype()
    with FakeTensorMode():
        torch.set_default_dtype(sd.dtype)
        try:
            unet = UNet(config).requires_grad_(False)
        finally:
            torch.set_default_dtype(default)
        unet.gradient_checkpointing = sd.unet.gradient_checkpointing
        own = {p.untyped_storage()._cdata for p in unet.parameters()}
        x = torch.empty(batch, config.in_channels, size[1] // downscale, size[0] // downscale, dtype=sd.dtype)
        context = torch.empty(batch, 77, config.cross_attention_dim, dtype=sd.dtype, requires_grad=True)
        added = None
        if config.addition_time_embed_dim:
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            added = torch.empty(batch, pooled, dtype=sd.dtype, requires_grad=True), torch.empty(batch, 6)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            unet(x, torch.zeros(batch), context, added)
    return weights, sum(saved.values())


def peak_memory(device: torch.device) -> int:
    """Bytes held at most so far: on an NVIDIA GPU by tensors, elsewhere by the process; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # on Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
