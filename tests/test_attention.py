"""Attention against its formula in float64, and the module against diffusers."""

import pytest
import torch
from diffusers.models.attention_processor import Attention as Reference

from minti.model.attention import Attention, attention, fused_linear

from .compare import assert_parity


def formula(q, k, v, heads, causal=False):
    """softmax(q k^T / sqrt(d)) v, head by head and step by step in float64; head i has columns i d to (i + 1)
    d.
    """
    d, outputs = q.shape[-1] // heads, []
    for i in range(heads):
        qi, ki, vi = (x[..., i * d : (i + 1) * d].double() for x in (q, k, v))
        logits = qi @ ki.transpose(-1, -2) / d**0.5
        if causal:
            future = torch.ones(logits.shape[-2:]).triu(1).bool()
            logits = logits.masked_fill(future, -torch.inf)
        outputs.append(logits.softmax(-1) @ vi)
    return torch.cat(outputs, dim=-1).to(q.dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("upcast", [False, True])
def test_formula(causal, upcast):
    q, k, v = torch.randn(3, 2, 11, 32)
    assert_parity({"": (attention(q, k, v, 4, causal=causal, upcast=upcast), formula(q, k, v, 4, causal))})


def test_cross_attention_lengths_differ():
    q, k, v = torch.randn(2, 9, 32), torch.randn(2, 77, 32), torch.randn(2, 77, 32)
    assert_parity({"": (attention(q, k, v, 4), formula(q, k, v, 4))})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_upcast_computes_in_float32(dtype):
    # Exact, since the only rounding is the one at the end; without upcast the weights are rounded as well.
    q, k, v = torch.randn(3, 1, 50, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    output = attention(q, k, v, 2, upcast=True)
    assert output.dtype == dtype
    expected = attention(q.float(), k.float(), v.float(), 2).to(dtype)
    assert torch.equal(output, expected)
    assert not torch.equal(attention(q, k, v, 2), expected)


def test_fused_linear():
    layers = [torch.nn.Linear(5, n) for n in (2, 4, 3)]
    x = torch.randn(2, 7, 5)
    assert_parity({"": (fused_linear(layers, x), torch.cat([layer(x) for layer in layers], dim=-1))})


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
