"""Scaled dot-product attention, and the multi-head module that the UNet and the autoencoder share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, upcast: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, equation 1 of Vaswani et al. 2017 (arXiv 1706.03762).

    PyTorch computes it, or our own kernel if `kernels.use` has been told so.

    Args:
        q: (B, heads, N, d) queries.
        k, v: (B, heads, M, d) keys and values.
        causal: position n sees only positions up to n.
        upcast: compute in float32, for models whose logits overflow half precision.

    Returns:
        (B, heads, N, d), in the dtype of q.
    """
    if not (causal or upcast) and kernels.chosen(q, k, v):
        return kernels.flash_attention(q, k, v)
    dtype = q.dtype
    if upcast:
        q, k, v = q.float(), k.float(), v.float()
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).to(dtype)


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, N, heads*d) -> (B, heads, N, d)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # (B, heads, N, d) -> (B, N, heads*d)


def fused_linear(layers: Sequence[nn.Linear], x: Tensor) -> Sequence[Tensor]:
    """What each of several layers makes of the same (..., dim) input, in one matrix product."""
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return F.linear(x, weight, bias).split([layer.out_features for layer in layers], dim=-1)


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself or, in the UNet, to the words of the prompt.

    The keys and values of the prompt may be given, because they stay the same through all the steps of
    sampling and need to be computed once only; see `UNet.embed_context`.
    """

    def __init__(
        self, dim: int, context_dim: int, heads: int, *, qkv_bias: bool = False, upcast: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.upcast = heads, upcast
        self.to_q = nn.Linear(dim, dim, bias=qkv_bias)
        self.to_k = nn.Linear(context_dim, dim, bias=qkv_bias)
        self.to_v = nn.Linear(context_dim, dim, bias=qkv_bias)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Tensor, kv: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B, N, dim) -> (B, N, dim), attending to x itself or to keys and values, each (B, M, dim)."""
        k, v = (self.to_k(x), self.to_v(x)) if kv is None else kv
        q, k, v = (split_heads(y, self.heads) for y in (self.to_q(x), k, v))
        return self.to_out(merge_heads(attention(q, k, v, upcast=self.upcast)))
