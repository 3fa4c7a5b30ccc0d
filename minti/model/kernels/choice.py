"""Which attention computes: PyTorch's scaled_dot_product_attention (SDPA), or the kernel of this package."""

import importlib
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError

METHODS = ("sdpa", "triton")

_operator: ModuleType | None = None  # the module `operator` where the kernel was chosen


def use(method: str, device: torch.device) -> None:
    """Choose how attention is computed from now on, in the whole process.

    Args:
        method: "sdpa", the default, or "triton". What the kernel does not do (see `operator.supports`) stays
            with SDPA.
        device: where the model is.

    Raises:
        InputError: "triton" without Triton, or without a GPU that it supports.
    """
    global _operator
    if method not in METHODS:
        raise InputError(f"attention {method!r}: choose from {', '.join(METHODS)}")
    _operator = _import_operator(device) if method == "triton" else None


def _import_operator(device: torch.device) -> ModuleType:
    remedy = "or use --attention sdpa"
    try:
        operator = importlib.import_module(".operator", __package__)
    except ImportError as error:
        text = f"attention 'triton' needs the package triton ({error}): pip install triton; {remedy}"
        raise InputError(text) from None
    if not operator.runs_on(device):
        text = f"needs a CUDA GPU of compute capability 8.0 or more, and the model is on {str(device)!r}"
        raise InputError(f"attention 'triton' {text}; {remedy}")
    return operator


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v as `use` has chosen: q (B, heads, N, d), k and v (B, heads, M, d)."""
    if _operator is None or is_causal or not _operator.supports(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    return _operator.flash_attention(q, k, v)
