"""The attention kernels without a GPU; `test_kernels.py` runs this file in a process with TRITON_INTERPRET=1.

Triton's interpreter executes the kernels as they are written, with NumPy. It is slow, so everything is small.
"""

import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from triton.runtime.interpreter import InterpreterBuilder

from minti.model import kernels
from minti.model.attention import Attention, attention
from minti.model.kernels import operator
from minti.model.kernels.operator import flash_attention

from .test_kernels import assert_same, inputs, reference, with_gradients

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter has no bfloat16 products: it would multiply bit patterns. Give it the exact ones."""
    product = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return product(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture
def triton_chosen() -> None:
    kernels.use("triton", CPU)
    yield
    kernels.use("sdpa", CPU)


# (N, M): an odd number of pixels, a prompt of 77 words, and whole blocks, which need no masks. The kernels
# treat widths and lengths apart from each other, so that not every pair is needed.
@pytest.mark.parametrize(
    ("D", "N", "M"),
    [
        (40, 35, 77),
        (160, 35, 77),
        (80, 64, 32),
        *(
            pytest.param(*shape, marks=pytest.mark.slow)
            for shape in ((64, 35, 77), (80, 35, 77), (40, 35, 35))
        ),
    ],
)
def test_float32(D: int, N: int, M: int) -> None:
    # Rounding of float32 (6e-8) in sums of at most 160 terms, in another order than SDPA's.
    x = inputs(N, M, D, H=1)
    assert_same(with_gradients(flash_attention, *x), reference(*x), 5e-6)


@pytest.mark.parametrize(
    ("D", "N", "M", "dtype"),
    [
        (40, 150, 150, torch.bfloat16),  # several blocks of keys and queries
        (160, 70, 77, torch.bfloat16),
        (160, 70, 77, torch.float16),
        (40, 70, 77, torch.float16),
    ],
)
def test_half_precision(D: int, N: int, M: int, dtype: torch.dtype) -> None:
    # The inputs are exact. Weights and results are rounded once each, by half a unit in the last place or
    # 2^-9 (2^-12), and gradients of logits too: 2 units in all leave room for all three. SDPA has as much.
    x = inputs(N, M, D, dtype, H=1)
    actual = with_gradients(flash_attention, *x)
    assert all(y.dtype == dtype for y in actual)
    assert_same(actual, reference(*x), 2 * torch.finfo(dtype).eps)


def test_samples_and_heads_are_told_apart() -> None:
    x = inputs(9, 11, 40, B=2, H=3)
    assert_same(with_gradients(flash_attention, *x), reference(*x), 5e-6)


def test_large_logits_do_not_overflow() -> None:
    """All around 250 or -250: without a shift, exp is infinite for the ones and no number at all is left of
    the others, whose lse makes it infinite again for keys beyond the end."""
    q, k, v, do = inputs(33, 40, 40)
    sign = torch.tensor([1.0, -1.0])[:, None, None]  # of each head
    x = 60 * sign * q.abs(), k.abs(), v, do
    # Logits are good to 250 * 6e-8, and so are their exponentials, relatively.
    assert_same(with_gradients(flash_attention, *x), reference(*x), 1e-4)


def test_one_key() -> None:
    q, k, v, _ = inputs(7, 1, 64)
    torch.testing.assert_close(flash_attention(q, k, v), v.expand(-1, -1, 7, -1))


def test_memory_may_be_laid_out_in_any_way() -> None:
    q, k, v, do = inputs(9, 18, 80, B=2)
    expected = with_gradients(flash_attention, q, k, v, do)
    slices = torch.cat([F.pad(x.transpose(1, 2).flatten(2), (8, 0)) for x in (k, v)], dim=-1)
    k2, v2 = (slices[..., i : i + 160].unflatten(-1, (2, 80)).transpose(1, 2) for i in (8, 176))
    reordered = q.contiguous(), k2, v2, do.mT.contiguous().mT
    assert all(a.stride() != b.stride() for a, b in zip((q, k, v, do), reordered, strict=True))
    for actual, same in zip(with_gradients(flash_attention, *reordered), expected, strict=True):
        assert torch.equal(actual, same)


def test_expanded_memory() -> None:
    q, k, v, _ = inputs(5, 6, 40, B=2)
    x = q, k[:1].expand_as(k), v[:1].expand_as(v), torch.ones(()).expand_as(q)
    assert_same(with_gradients(flash_attention, *x), reference(*x), 5e-6)


def test_heads_are_merged_for_free() -> None:
    for y, x in zip(with_gradients(flash_attention, *inputs(5, 6, 40)), "qqkv", strict=True):
        assert y.transpose(1, 2).is_contiguous(), x


@pytest.mark.parametrize("N,parts", [pytest.param(128, 1, marks=pytest.mark.slow), (100, 4)])
def test_parts_add_up(N: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that share the queries of a block of keys, here 4 blocks of them."""
    monkeypatch.setattr(operator, "PROGRAMS", parts)
    x = inputs(N, 16, 40, H=1)
    actual = with_gradients(flash_attention, *x)
    assert_same(actual, reference(*x), 5e-6)
    assert all(torch.equal(a, b) for a, b in zip(actual, with_gradients(flash_attention, *x), strict=True))


@pytest.mark.slow
def test_opcheck() -> None:
    q, k, v, do = inputs(5, 6, 40)
    x = [y.clone().requires_grad_() for y in (q, k, v)]
    torch.library.opcheck(torch.ops.minti.attention.default, x)
    o, lse = torch.ops.minti.attention(q, k, v)
    torch.library.opcheck(torch.ops.minti.attention_backward.default, (q, k, v, o, lse, do))


def test_compiled_to_one_graph(triton_chosen: None) -> None:
    compiled = torch.compile(
        lambda q, k, v: 2 * kernels.scaled_dot_product_attention(q, k, v),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for N in (5, 9):
        x = inputs(N, 6, 40)
        eager = with_gradients(lambda q, k, v: 2 * flash_attention(q, k, v), *x)
        assert all(torch.equal(a, b) for a, b in zip(with_gradients(compiled, *x), eager, strict=True))


def test_chosen_by_attention(triton_chosen: None) -> None:
    def merged(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)  # (B, heads, N, d) -> (B, N, heads*d)

    heads = inputs(9, 9, 64)[:3]
    q, k, v = map(merged, heads)
    assert torch.equal(attention(q, k, v, 2), merged(flash_attention(*heads)))
    for other in ({"causal": True}, {"upcast": True}):
        o = attention(q, k, v, 2, **other)
        expected = F.scaled_dot_product_attention(*heads, is_causal="causal" in other)
        assert torch.equal(o, merged(expected))
        assert not torch.equal(o, merged(flash_attention(*heads)))
    for D in (8, 48, 512):  # widths it does not have
        heads = inputs(9, 9, D)[:3]
        expected = merged(F.scaled_dot_product_attention(*heads))
        assert torch.equal(attention(*map(merged, heads), 2), expected)


@pytest.mark.parametrize("context", [pytest.param(None, marks=pytest.mark.slow), 7])
def test_checkpointing(context: int | None, triton_chosen: None) -> None:
    torch.manual_seed(0)
    module = Attention(80, 80, heads=2)
    x = torch.randn(2, 9, 80, requires_grad=True)
    words = [torch.randn(2, context, 80, requires_grad=True) for _ in range(2)] if context else []

    def forward(x: Tensor, *words: Tensor) -> Tensor:
        return module(x, words or None)

    plain = torch.autograd.grad(forward(x, *words).square().sum(), (x, *words))
    again = torch.autograd.grad(
        checkpoint(forward, x, *words, use_reentrant=False).square().sum(), (x, *words)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    kernels.use("sdpa", CPU)
    expected = torch.autograd.grad(forward(x, *words).square().sum(), (x, *words))
    for a, b in zip(again, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-6 * b.abs().max().item())
