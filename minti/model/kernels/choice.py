"""Which attention computes: PyTorch's scaled_dot_product_attention (SDPA), or the kernel of this package.

The setting is the process's, as PyTorch's own are. With "auto", each shape is timed once, both ways. The two
round differently and a close race may end either way, so the results of "auto" can differ in the last bits
from one run to the next, and those of a resumed run from an uninterrupted one. Hence "sdpa" is the default.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from operator import index
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError

log = logging.getLogger(__name__)

METHODS = ("auto", "sdpa", "triton")

_method, _device = "sdpa", torch.device("cpu")
_kernel: ModuleType | None = None  # the module `launch`, imported when wanted, since it needs Triton
_is_faster: dict[tuple, bool] = {}


def use(method: str, device: torch.device) -> None:
    """Choose how `minti.attention.attention` computes from now on.

    Args:
        method: "sdpa", "triton", or "auto": for each shape, whichever is faster. What the kernel does not do
            (see `kernels.launch.supports`) stays with SDPA.
        device: where the model is.

    Raises:
        InputError: "triton" without Triton or without a GPU that it supports; "auto" is "sdpa" there.
    """
    global _method, _device
    if method not in METHODS:
        raise InputError(f"attention {method!r}: choose from {', '.join(METHODS)}")
    problem = None if method == "sdpa" else _import_kernel(device)
    if problem and method == "triton":
        raise InputError(f"attention 'triton' {problem}; or use --attention sdpa")
    _method, _device = "sdpa" if problem else method, device


def _import_kernel(device: torch.device) -> str | None:
    """Get the kernel ready. Returns what is missing."""
    global _kernel
    try:
        _kernel = importlib.import_module(".launch", __package__)
    except ImportError as error:
        return f"needs the package triton ({error}): pip install triton"
    torch.compiler.assume_constant_result(_measure)  # torch.compile runs it as it is, while it compiles
    if not _kernel.runs_on(device):
        return f"needs a CUDA GPU of compute capability 8.0 or more, and the model is on {str(device)!r}"
    return None


def chosen(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `flash_attention` is to be used for q (B, heads, N, d) and k, v (B, heads, M, d)."""
    if _method == "sdpa" or q.device.type != _device.type or not _kernel.supports(q, k, v):
        return False
    if _method == "triton":
        return True
    gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    shape, keys = (
        tuple(map(index, q.shape)),
        index(k.shape[2]),
    )  # numbers also where torch.compile has symbols
    return _measure(shape, keys, q.dtype, q.device, gradients)


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The kernel, see `kernels.launch.flash_attention`; only where `chosen` says so."""
    return _kernel.flash_attention(q, k, v)


def _measure(
    shape: tuple[int, ...], keys: int, dtype: torch.dtype, device: torch.device, gradients: bool
) -> bool:
    """Whether the kernel is faster, measured once. Never while a CUDA graph is being captured: then, no."""
    case = (shape, keys, dtype, device, gradients)
    if case not in _is_faster:
        if torch.cuda.is_current_stream_capturing():
            return False
        # In a thread of its own, out of reach of the caller's autocast, tracing and checkpointing.
        with ThreadPoolExecutor(1) as thread:
            try:
                seconds = thread.submit(timings, *case).result()
            except torch.OutOfMemoryError:
                return _is_faster.setdefault(case, False)
        _is_faster[case] = seconds["triton"] < seconds["sdpa"]
        texts = ", ".join(f"{name} {1e3 * t:.3f} ms" for name, t in seconds.items())
        log.info("attention of %s to %d: %s", "x".join(map(str, shape)), keys, texts)
    return _is_faster[case]


def timings(
    shape: tuple[int, ...],
    keys: int,
    dtype: torch.dtype,
    device: torch.device,
    gradients: bool,
    milliseconds: int = 50,
) -> dict[str, float]:
    """How long SDPA and the kernel take on a GPU, in seconds: medians.

    Args:
        shape: of the queries, (B, heads, N, d).
        keys: M, how many keys and values there are.
        gradients: with the backward pass.
        milliseconds: how long to repeat each of the two.
    """
    from triton.testing import do_bench

    from . import launch

    B, H, N, D = shape
    with torch.cuda.device(device):
        generator = torch.Generator(device).manual_seed(0)  # leaves everybody else's random numbers alone

        def random(length: int) -> Tensor:
            x = torch.randn(B, length, H * D, dtype=dtype, device=device, generator=generator)
            return x.unflatten(-1, (H, D)).transpose(1, 2)  # (B, length, H*D) -> (B, H, length, D)

        q, k, v = (random(n).requires_grad_(gradients) for n in (N, keys, keys))
        do = random(N)

        def run(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
            o = function(q, k, v)
            if gradients:
                torch.autograd.grad(o, (q, k, v), do)

        candidates = {"sdpa": F.scaled_dot_product_attention, "triton": launch.flash_attention}
        return {
            name: 1e-3 * do_bench(lambda f=f: run(f), rep=milliseconds, return_mode="median")
            for name, f in candidates.items()
        }
