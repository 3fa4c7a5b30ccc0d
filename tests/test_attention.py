"""Attention against its formula in float64, and the module against diffusers."""

import pytest
import torch
from diffusers.models.attention_processor import Attention as Reference

from minti.model.attention import Attention, attention, merge_heads, split_heads

from .compare import assert_parity


def formula(q, k, v, causal=False):
    """softmax(q k^T / sqrt(d)) v, step by step in float64."""
    logits = q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5
    if causal:
        future = torch.ones(logits.shape[-2:]).triu(1).bool()
        logits = logits.masked_fill(future, -torch.inf)
    return (logits.softmax(-1) @ v.double()).to(q.dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("upcast", [False, True])
def test_formula(causal, upcast):
    q, k, v = torch.randn(3, 2, 4, 11, 8)
    assert_parity({"": (attention(q, k, v, causal=causal, upcast=upcast), formula(q, k, v, causal))})


def test_cross_attention_lengths_differ():
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 4, 77, 8), torch.randn(2, 4, 77, 8)
    assert_parity({"": (attention(q, k, v), formula(q, k, v))})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_upcast_computes_in_float32(dtype):
    # Exact, since the only rounding is the one at the end; without upcast the weights are rounded as well.
    q, k, v = torch.randn(3, 1, 2, 50, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    output = attention(q, k, v, upcast=True)
    assert output.dtype == dtype
    expected = attention(q.float(), k.float(), v.float()).to(dtype)
    assert torch.equal(output, expected)
    assert not torch.equal(attention(q, k, v), expected)


def test_heads_split_in_order():
    x = torch.arange(2 * 3 * 8).reshape(2, 3, 8)
    heads = split_heads(x, 4)
    assert heads.shape == (2, 4, 3, 2)
    assert heads[1, 2, 0].tolist() == x[1, 0, 4:6].tolist()
    assert torch.equal(merge_heads(heads), x)


@pytest.mark.parametrize("context_dim", [None, 20])
@pytest.mark.parametrize("bias", [False, True])
def test_module(context_dim, bias):
    torch.manual_seed(0)
    reference = Reference(32, cross_attention_dim=context_dim, heads=4, dim_head=8, bias=bias)
    module = Attention(32, context_dim or 32, heads=4, qkv_bias=bias)
    module.load_state_dict(reference.state_dict(), strict=True)
    x, context = torch.randn(2, 15, 32), torch.randn(2, 7, context_dim) if context_dim else None
    kv = None if context is None else (module.to_k(context), module.to_v(context))
    with torch.no_grad():
        assert_parity({"": (module(x, kv), reference(x, context))})
