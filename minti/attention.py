"""Scaled dot-product attention, and the multi-head module that the UNet and the autoencoder share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, upcast: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, equation 1 of Vaswani et al. 2017 (arXiv 1706.03762).

    Args:
        q: (B, heads, N, d) queries.
        k, v: (B, heads, M, d) keys and values.
        causal: position n sees only positions up to n.
        upcast: compute in float32, for models whose logits overflow half precision.

    Returns:
        (B, heads, N, d), in the dtype of q.
    """
    dtype = q.dtype
    if upcast:
        q, k, v = q.float(), k.float(), v.float()
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).to(dtype)


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, N, heads*d) -> (B, heads, N, d)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # (B, heads, N, d) -> (B, N, heads*d)


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself or, in the UNet, to the words of the prompt.

    Keys and values come from `project`, apart from `forward`, because those of the prompt stay the same
    through all the steps of sampling and need to be computed once only.
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

    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M, context_dim) -> keys and values, each (B, heads, M, d)."""
        return split_heads(self.to_k(context), self.heads), split_heads(self.to_v(context), self.heads)

    def forward(self, x: Tensor, kv: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B, N, dim) -> (B, N, dim), attending to `kv`, or to x itself where that is None."""
        q = split_heads(self.to_q(x), self.heads)
        k, v = self.project(x) if kv is None else kv
        return self.to_out(merge_heads(attention(q, k, v, upcast=self.upcast)))
