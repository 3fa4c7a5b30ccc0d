"""Attention kernels for NVIDIA GPUs, written in Triton, and the choice between them and PyTorch's own.

`flash_attention.py` holds the kernels, `operator.py` makes a differentiable operator of PyTorch out of them,
and `choice.py` decides which one computes. Only the first two need Triton, so that minti works without it.
`graph.py` compiles whole steps.
"""

from .choice import METHODS, scaled_dot_product_attention, use
from .graph import compile_denoiser, compile_for

__all__ = ["METHODS", "compile_denoiser", "compile_for", "scaled_dot_product_attention", "use"]
