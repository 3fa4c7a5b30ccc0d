"""Multi-head attention, as the text encoder, the UNet and the autoencoder use it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels


def attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, *, causal: bool = False, upcast: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v in each head: Vaswani et al. 2017 (arXiv 1706.03762), equation 1.

    Args:
        q: (B, N, heads*d) queries, the channels of the heads side by side.
        k, v: (B, M, heads*d) keys and values.
        heads: the number of heads.
        causal: position n attends to positions 0 to n only.
        upcast: compute in float32, for models whose logits overflow half precision.

    Returns:
        (B, N, heads*d), in the dtype of q.
    """
    dtype = q.dtype
    if upcast:
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # -> (B, heads, N or M, d)
    # PyTorch's, or the kernel that `kernels.use` has chosen, which does not compute in float32.
    compute = F.scaled_dot_product_attention if upcast else kernels.scaled_dot_product_attention
    out = compute(q, k, v, is_causal=causal)
    return out.transpose(1, 2).flatten(2).to(dtype)  # (B, heads, N, d) -> (B, N, heads*d)


def fused_linear(layers: Sequence[nn.Linear], x: Tensor) -> Tensor:
    """Apply several layers to the same input in one matrix product.

    Args:
        layers: linear layers of the same input width, all with a bias or all without.
        x: (..., in_features).

    Returns:
        (..., sum of the out_features): the outputs side by side, in the order of the layers.
    """
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return F.linear(x, weight, bias)


def repeat_to(x: Tensor, other: Tensor) -> Tensor:
    """(B, ...) -> (n * B, ...), as many rows as `other` has, for guidance: see `UNet.denoise`."""
    return x if len(x) == len(other) else torch.cat([x] * (len(other) // len(x)))


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself or, in the UNet, to the tokens of the prompt.

    Args:
        dim: channels of the sequence, and of all `heads` together.
        context_dim: channels of what the keys and values are projected from.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        upcast: see `attention`.
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
        """Attend to `x` itself, or to the given keys and values.

        Args:
            x: (B, N, dim).
            kv: keys and values of the prompt, each (B, M, dim). They are the same in all steps of sampling,
                so they are projected outside of this module, once; see `UNet.embed_context`.

        Returns:
            (B, N, dim)
        """
        k, v = (self.to_k(x), self.to_v(x)) if kv is None else kv
        return self.to_out(attention(self.to_q(x), k, v, self.heads, upcast=self.upcast))
