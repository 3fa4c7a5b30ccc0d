"""softmax(q k^T / sqrt(d)) v without ever writing down the (N, M) matrix in the middle, forward and backward.

The algorithm is FlashAttention-2 (Dao, arXiv 2307.08691). A program of the forward kernel holds a block of
queries and walks along the keys, block by block. The softmax needs the largest logit and the sum of all
exponentials, which are known only at the end; so the program keeps those of the keys seen so far and, when a
larger logit turns up, shrinks what it has summed up until then. For each query it leaves one number behind,
lse = log(sum of exponentials), from which the backward pass computes the weights p again:

    s = q k^T / sqrt(d),  p = exp(s - lse),  o = p v
    dv = p^T do,  ds = p * (do v^T - delta),  delta = rowsum(do * o)
    dq = ds k / sqrt(d),  dk = ds^T q / sqrt(d)

What is special here is the width of Stable Diffusion's heads: 40, 80 or 160 channels. The sides of a tile are
powers of two, and rounding up to 64, 128 and 256 would waste over a third of all products. So d columns are
held as two tiles side by side, 40 = 32 + 8 (of 16), 80 = 64 + 16, 160 = 128 + 32, which the functions before
the kernels hide. Exponentials and lse are in base 2, which is what the hardware has; log2(e) and 1/sqrt(d)
are one factor. Matrices are read and written where they lie, by their strides. Strides and sizes are
constants to the compiler, which leaves out masks where blocks fit. Sums are in float32, always in one order.
"""

import math

import triton
import triton.language as tl
from triton.language import constexpr

HEAD_DIMS = {40: ((0, 32), (32, 16)), 64: ((0, 64),), 80: ((0, 64), (64, 16)), 160: ((0, 128), (128, 32))}
"""First column and width of each tile, for every width of heads there is."""

LOG2_E = constexpr(math.log2(math.e))


@triton.jit
def _addresses(x, strides: constexpr, rows, columns):
    """Where these rows and columns lie of the matrix that is this program's sample and head."""
    sample, head = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    matrix = x + sample * strides[0] + head * strides[1]
    return matrix + (rows[:, None] * strides[2] + columns[None, :] * strides[3])


@triton.jit
def _load(x, strides: constexpr, start, BLOCK: constexpr, SIZE: constexpr, D: constexpr, TILES: constexpr):
    """BLOCK rows from `start` of a (SIZE, D) matrix, zeros past its end, in tiles side by side."""
    rows = start + tl.arange(0, BLOCK)
    tiles = ()
    for i in tl.static_range(len(TILES)):
        columns = TILES[i][0] + tl.arange(0, TILES[i][1])
        addresses = _addresses(x, strides, rows, columns)
        if SIZE % BLOCK == 0 and TILES[i][0] + TILES[i][1] <= D:
            tiles += (tl.load(addresses),)
        else:
            exists = (rows < SIZE)[:, None] & (columns < D)[None, :]
            tiles += (tl.load(addresses, mask=exists, other=0.0),)
    return tiles


@triton.jit
def _store(
    x, strides: constexpr, start, BLOCK: constexpr, SIZE: constexpr, D: constexpr, TILES: constexpr, tiles
):
    """The reverse of `_load`."""
    rows = start + tl.arange(0, BLOCK)
    for i in tl.static_range(len(TILES)):
        columns = TILES[i][0] + tl.arange(0, TILES[i][1])
        exists = (rows < SIZE)[:, None] & (columns < D)[None, :]
        tl.store(_addresses(x, strides, rows, columns), tiles[i].to(x.dtype.element_ty), mask=exists)


@triton.jit
def _product(a, b):
    """a b^T, in float32: (A, d) and (B, d) -> (A, B)."""
    c = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    for i in tl.static_range(1, len(a)):
        c = tl.dot(a[i], tl.trans(b[i]), c, input_precision="ieee")
    return c


@triton.jit
def _add_product(sums, a, b):
    """sums + a b: (A, d), (A, B) and (B, d) -> (A, d)."""
    tiles = ()
    for i in tl.static_range(len(b)):
        tiles += (tl.dot(a.to(b[i].dtype), b[i], sums[i], input_precision="ieee"),)
    return tiles


@triton.jit
def _scale(tiles, factor):
    scaled = ()
    for i in tl.static_range(len(tiles)):
        scaled += (tiles[i] * factor,)
    return scaled


@triton.jit
def _zeros_like(tiles):
    zeros = ()
    for i in tl.static_range(len(tiles)):
        zeros += (tl.zeros(tiles[i].shape, tl.float32),)
    return zeros


@triton.jit
def _vector(x, N: constexpr):
    """Where the row of this program's sample and head begins in a tensor (B, heads, N)."""
    return x + (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * N


@triton.jit
def _forward(
    q,
    k,
    v,
    o,
    lse,
    q_strides: constexpr,
    k_strides: constexpr,
    v_strides: constexpr,
    o_strides: constexpr,
    N: constexpr,
    M: constexpr,
    D: constexpr,
    TILES: constexpr,
    BLOCK_N: constexpr,
    BLOCK_M: constexpr,
):
    """Grid: (blocks of queries, heads, samples). Each program walks along the keys."""
    factor = LOG2_E * D**-0.5
    first = tl.program_id(0) * BLOCK_N
    rows = first + tl.arange(0, BLOCK_N)
    q_block = _load(q, q_strides, first, BLOCK_N, N, D, TILES)
    largest = tl.full([BLOCK_N], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    out = _zeros_like(q_block)
    for start in range(0, M, BLOCK_M):
        k_block = _load(k, k_strides, start, BLOCK_M, M, D, TILES)
        s = _product(q_block, k_block)  # (BLOCK_N, BLOCK_M)
        if M % BLOCK_M != 0:
            s = tl.where((start + tl.arange(0, BLOCK_M) < M)[None, :], s, -float("inf"))
        larger = tl.maximum(largest, tl.max(s, 1) * factor)
        shrink = tl.exp2(largest - larger)
        p = tl.exp2(s * factor - larger[:, None])
        v_block = _load(v, v_strides, start, BLOCK_M, M, D, TILES)
        out = _add_product(_scale(out, shrink[:, None]), p, v_block)
        total = total * shrink + tl.sum(p, 1)
        largest = larger
    _store(o, o_strides, first, BLOCK_N, N, D, TILES, _scale(out, (1 / total)[:, None]))
    tl.store(_vector(lse, N) + rows, largest + tl.log2(total), mask=rows < N)


@triton.jit
def _backward_q(
    q,
    k,
    v,
    o,
    do,
    lse,
    delta,
    dq,
    q_strides: constexpr,
    k_strides: constexpr,
    v_strides: constexpr,
    o_strides: constexpr,
    do_strides: constexpr,
    dq_strides: constexpr,
    N: constexpr,
    M: constexpr,
    D: constexpr,
    TILES: constexpr,
    BLOCK_N: constexpr,
    BLOCK_M: constexpr,
):
    """Grid: (blocks of queries, heads, samples). Each program walks along the keys; leaves delta behind."""
    factor = LOG2_E * D**-0.5
    first = tl.program_id(0) * BLOCK_N
    rows = first + tl.arange(0, BLOCK_N)
    q_block = _load(q, q_strides, first, BLOCK_N, N, D, TILES)
    o_block = _load(o, o_strides, first, BLOCK_N, N, D, TILES)
    do_block = _load(do, do_strides, first, BLOCK_N, N, D, TILES)
    delta_block = tl.zeros([BLOCK_N], tl.float32)
    for i in tl.static_range(len(TILES)):
        delta_block += tl.sum(do_block[i].to(tl.float32) * o_block[i].to(tl.float32), 1)
    tl.store(_vector(delta, N) + rows, delta_block, mask=rows < N)
    lse_block = tl.load(_vector(lse, N) + rows, mask=rows < N, other=0.0)
    sums = _zeros_like(q_block)
    for start in range(0, M, BLOCK_M):
        k_block = _load(k, k_strides, start, BLOCK_M, M, D, TILES)
        v_block = _load(v, v_strides, start, BLOCK_M, M, D, TILES)
        s = _product(q_block, k_block)  # (BLOCK_N, BLOCK_M)
        p = tl.exp2(s * factor - lse_block[:, None])
        if M % BLOCK_M != 0:
            p = tl.where((start + tl.arange(0, BLOCK_M) < M)[None, :], p, 0.0)
        ds = p * (_product(do_block, v_block) - delta_block[:, None])
        sums = _add_product(sums, ds, k_block)
    _store(dq, dq_strides, first, BLOCK_N, N, D, TILES, _scale(sums, D**-0.5))


@triton.jit
def _backward_kv(
    q,
    k,
    v,
    do,
    lse,
    delta,
    dk,
    dv,
    q_strides: constexpr,
    k_strides: constexpr,
    v_strides: constexpr,
    do_strides: constexpr,
    out_strides: constexpr,
    N: constexpr,
    M: constexpr,
    D: constexpr,
    TILES: constexpr,
    BLOCK_N: constexpr,
    BLOCK_M: constexpr,
    PART: constexpr,
):
    """Grid: (blocks of keys * parts, heads, samples). Each program walks along PART of the queries."""
    PARTS: constexpr = (N + PART - 1) // PART
    factor = LOG2_E * D**-0.5
    part, first = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS * BLOCK_M
    k_block = _load(k, k_strides, first, BLOCK_M, M, D, TILES)
    v_block = _load(v, v_strides, first, BLOCK_M, M, D, TILES)
    k_sums, v_sums = _zeros_like(k_block), _zeros_like(v_block)
    for i in range(0, PART, BLOCK_N):
        start = part * PART + i
        rows = start + tl.arange(0, BLOCK_N)
        q_block = _load(q, q_strides, start, BLOCK_N, N, D, TILES)
        do_block = _load(do, do_strides, start, BLOCK_N, N, D, TILES)
        lse_block = tl.load(_vector(lse, N) + rows, mask=rows < N, other=0.0)
        delta_block = tl.load(_vector(delta, N) + rows, mask=rows < N, other=0.0)
        s = _product(k_block, q_block)  # (BLOCK_M, BLOCK_N), transposed here, like p and ds
        p = tl.exp2(s * factor - lse_block[None, :])
        v_sums = _add_product(v_sums, p, do_block)
        ds = p * (_product(v_block, do_block) - delta_block[None, :])
        k_sums = _add_product(k_sums, ds, q_block)
    _store(dk + part * out_strides[4], out_strides, first, BLOCK_M, M, D, TILES, _scale(k_sums, D**-0.5))
    _store(dv + part * out_strides[4], out_strides, first, BLOCK_M, M, D, TILES, v_sums)
