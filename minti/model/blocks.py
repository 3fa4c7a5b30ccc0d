"""What the denoiser and the autoencoder are built of: time embedding, residual and transformer blocks.

Pictures are (B, C, H, W) where they meet convolutions, and (B, HW, C), a sequence of pixels, where they meet
attention. A transformer block lets every pixel look at all pixels, and then at the words of the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention
from .config import UNetConfig

KeyValue = tuple[Tensor, Tensor]


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of t at `dim / 2` frequencies from 1 down to 1/10000, cosines first (DDPM, arXiv 2006.11239).

    Args:
        t: (N,) numbers, integers or not.
        dim: width of the embedding, even.

    Returns:
        (N, dim) float32.
    """
    half = dim // 2
    frequencies = torch.exp(
        -math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / half
    )
    angles = t[:, None].float() * frequencies  # (N,) -> (N, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (N, dim)


class TimeEmbedding(nn.Module):
    """A small perceptron on top of the sinusoids."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim, hidden_dim)
        self.linear_2 = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut. `time_dim` None: no time step, as in the autoencoder."""

    def __init__(self, c_in: int, c_out: int, groups: int, eps: float, time_dim: int | None = None) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, c_out) if time_dim else None
        self.norm2 = nn.GroupNorm(groups, c_out, eps=eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, time_shift: Tensor | None = None) -> Tensor:
        """(B, c_in, H, W), and `time_shift` (B or 1, c_out) from `time_emb_proj` -> (B, c_out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        if time_shift is not None:
            h = h + time_shift[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W), or to `size`, the (H, W) of the level above where that was odd."""
        scale = 2.0 if size is None else None
        return self.conv(F.interpolate(x, size=size, scale_factor=scale, mode="nearest"))


class GEGLU(nn.Module):
    """A linear layer gated by a second one (Shazeer 2020, arXiv 2002.05202); one matrix holds both."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        # The middle entry keeps the place of the checkpoints' dropout, which is zero.
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Pixels attend to each other, then to the words, then each one thinks for itself."""

    def __init__(self, dim: int, context_dim: int, heads: int, upcast: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, dim, heads, upcast=upcast)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, context_dim, heads, upcast=upcast)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context_kv: KeyValue) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context_kv)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, around a shortcut."""

    def __init__(self, config: UNetConfig, channels: int, heads: int, depth: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)
        if config.use_linear_projection:
            self.proj_in, self.proj_out = nn.Linear(channels, channels), nn.Linear(channels, channels)
        else:
            self.proj_in, self.proj_out = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, config.cross_attention_dim, heads, config.upcast_attention)
            for _ in range(depth)
        )

    def forward(self, x: Tensor, context_kv: Sequence[KeyValue]) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W); `context_kv` has keys and values for each transformer block."""
        h = self._project(self.proj_in, self.norm(x).flatten(2).transpose(1, 2))  # (B, C, H, W) -> (B, HW, C)
        for block, kv in zip(self.transformer_blocks, context_kv, strict=True):
            h = block(h, kv)
        h = self._project(self.proj_out, h)
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])  # (B, HW, C) -> (B, C, H, W)

    @staticmethod
    def _project(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
        # A 1x1 convolution (SD 1.x) is the same as a matrix product at every pixel (SD 2.x).
        return F.linear(x, layer.weight.flatten(1), layer.bias)
