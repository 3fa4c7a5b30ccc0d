"""The kernels as operators of PyTorch: launched, differentiable, and known to torch.compile."""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from .flash_attention import HEAD_DIMS, _backward_kv, _backward_q, _forward

PROGRAMS = 256  # enough to keep a large GPU busy
INTERPRETED = triton.knobs.runtime.interpret  # with TRITON_INTERPRET=1 from the start, on any device


def _options(q: Tensor, M: int, block_n: int, block_m: int, **options: int) -> dict[str, Any]:
    """What all launches share. Blocks are such that the tiles fit in registers and 99 KB of shared memory."""
    N, D = q.shape[2:]
    largest = 32 if q.dtype == torch.float32 else 128
    block_n, block_m = (
        min(block, largest, max(16, triton.next_power_of_2(size)))
        for block, size in ((block_n, N), (block_m, M))
    )
    constants = {"N": N, "M": M, "D": D, "TILES": HEAD_DIMS[D], "BLOCK_N": block_n, "BLOCK_M": block_m}
    return {**constants, "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True, **options}


def _strides(*tensors: Tensor) -> list[tuple[int, ...]]:
    return [x.stride() for x in tensors]


def _empty_like(x: Tensor) -> Tensor:
    """(B, heads, N, d), but (B, N, heads, d) in memory, where merging the heads is free."""
    B, H, N, D = x.shape
    return x.new_empty(B, N, H, D).transpose(1, 2)


@torch.library.custom_op("minti::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    (B, H, N, D), M = q.shape, k.shape[2]
    if D > 80:
        options = _options(q, M, 64, 32)
    elif M <= 128:
        options = _options(q, M, 64, 128)
    else:
        options = _options(q, M, 128, 64, num_stages=3)
    o, lse = _allocate(q, k, v)
    with torch.cuda.device_of(q):
        grid = (triton.cdiv(N, options["BLOCK_N"]), H, B)
        _forward[grid](q, k, v, o, lse, *_strides(q, k, v, o), **options)
    return o, lse


@_attention.register_fake
def _allocate(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("minti::attention_backward", mutates_args=())
def _attention_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (B, H, N, D), M = q.shape, k.shape[2]
    wide = D > 80
    dq, delta = _empty_like(q), torch.empty_like(lse)
    with torch.cuda.device_of(q):
        options = _options(q, M, 64, 32 if wide else 64)
        grid = (triton.cdiv(N, options["BLOCK_N"]), H, B)
        _backward_q[grid](q, k, v, o, do, lse, delta, dq, *_strides(q, k, v, o, do, dq), **options)

        # A prompt has keys for one or two blocks only: let several programs share the queries, then add up.
        options = _options(q, M, 32 if wide else 64, 64, num_warps=8 if wide else 4)
        blocks_n, blocks_m = triton.cdiv(N, options["BLOCK_N"]), triton.cdiv(M, options["BLOCK_M"])
        parts = math.gcd(blocks_n, triton.next_power_of_2(triton.cdiv(PROGRAMS, B * H * blocks_m)))
        dk, dv = (
            q.new_empty(B, parts, M, H, D, dtype=torch.float32 if parts > 1 else q.dtype) for _ in range(2)
        )
        views = [x.permute(0, 3, 2, 4, 1) for x in (dk, dv)]  # (B, parts, M, H, D) -> (B, H, M, D, parts)
        _backward_kv[blocks_m * parts, H, B](
            q,
            k,
            v,
            do,
            lse,
            delta,
            *views,
            *_strides(q, k, v, do, views[0]),
            PART=blocks_n // parts * options["BLOCK_N"],
            **options,
        )
    # (B, parts, M, H, D) -> (B, M, H, D)
    dk, dv = (x.sum(1).to(q.dtype) if parts > 1 else x[:, 0] for x in (dk, dv))
    return dq, dk.transpose(1, 2), dv.transpose(1, 2)


@_attention_backward.register_fake
def _gradients(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(q), _empty_like(k), _empty_like(v)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor, ...]:
    return _attention_backward(*ctx.saved_tensors, do)


_attention.register_autograd(_backward, setup_context=_setup_context)


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run there: on GPUs of 2020 (Ampere) and later, or on any device if interpreted."""
    return INTERPRETED or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0))


def supports(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `flash_attention` can take these tensors; see there for the shapes."""
    return (
        (q.is_cuda or INTERPRETED)
        and q.shape[3] in HEAD_DIMS
        and q.shape[3] == k.shape[3]
        and q.shape[:2] == k.shape[:2]
        and k.shape == v.shape
        and q.dtype == k.dtype == v.dtype
        and q.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and all(x.shape[2] * x.stride(2) < 2**31 for x in (q, k, v))
    )


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v on the GPU.

    Args:
        q: (B, heads, N, d), anywhere in memory; d is 40, 64, 80 or 160.
        k, v: (B, heads, M, d), of the same dtype: bfloat16, float16, or, much slower, float32.

    Returns:
        (B, heads, N, d), in memory as (B, N, heads, d).
    """
    return _attention(q, k, v)[0]
