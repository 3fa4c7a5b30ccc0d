"""The building blocks of the denoiser and the autoencoder: time embedding, residual and transformer blocks.

Feature maps are (B, C, H, W) where they meet convolutions, and (B, HW, C), sequences of pixels, where they
meet attention. GroupNorm has an eps of 1e-5 in the UNet's residual blocks, and of 1e-6 in the transformers
and everywhere in the autoencoder, as in the code that the public weights were trained with
(CompVis/latent-diffusion).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention, repeat_to
from .config import UNetConfig


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Cosines and sines of t at dim / 2 frequencies, falling from 1 towards 1/10000 (DDPM, arXiv 2006.11239).

    Args:
        t: (N,) numbers, integers or not.
        dim: width of the embedding, even.

    Returns:
        (N, dim) float32, all cosines before all sines.
    """
    half = dim // 2
    exponents = torch.arange(half, device=t.device, dtype=torch.float32) / half
    frequencies = torch.exp(-math.log(10000) * exponents)
    angles = t[:, None].float() * frequencies  # (N,) -> (N, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (N, dim)


class TimeEmbedding(nn.Module):
    """A perceptron with one hidden layer on top of the sinusoids: (N, dim) -> (N, hidden_dim)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim, hidden_dim)
        self.linear_2 = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions with a shortcut around them (He et al., arXiv 1603.05027).

    Args:
        c_in, c_out: channels before and after.
        groups, eps: of the GroupNorms.
        time_dim: width of the time embedding; None in the autoencoder, whose blocks know no time step.
    """

    def __init__(self, c_in: int, c_out: int, groups: int, eps: float, time_dim: int | None = None) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, c_out) if time_dim else None
        self.norm2 = nn.GroupNorm(groups, c_out, eps=eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, time_shift: Tensor | None = None) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H, W).

        Args:
            time_shift: (B or 1, c_out), what `time_emb_proj` makes of the time embedding. It is added to
                every pixel between the two convolutions.
        """
        h = self.conv1(F.silu(self.norm1(x)))
        if time_shift is not None:
            h = h + time_shift[:, :, None, None]  # (B or 1, c_out) -> (B or 1, c_out, 1, 1)
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Halve the height and width: (B, C, H, W) -> (B, C, H/2, W/2), rounded up where padding is symmetric.

    The autoencoder was trained with padding on the right and at the bottom only: all else shifts the picture.
    """

    def __init__(self, channels: int, symmetric: bool = True) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if symmetric else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.symmetric else F.pad(x, (0, 1, 0, 1)))  # left, right, top, bottom


class Upsample(nn.Module):
    """Enlarge by repeating pixels, then smooth with a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W), or to `size`, which is one less where `Downsample` rounded up."""
        return self.conv(F.interpolate(x, size=size, scale_factor=None if size else 2.0, mode="nearest"))


class GEGLU(nn.Module):
    """A linear layer gated by another (Shazeer 2020, arXiv 2002.05202): (..., dim) -> (..., hidden_dim)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden_dim)  # both layers in one matrix

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """The perceptron of a transformer block, applied to every pixel by itself: (B, N, dim) -> (B, N, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # The middle entry keeps the place of the checkpoints' dropout, whose rate is zero.
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention of the pixels, cross-attention to the prompt, and a perceptron, each with a shortcut."""

    def __init__(self, dim: int, context_dim: int, heads: int, upcast: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, dim, heads, upcast=upcast)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, context_dim, heads, upcast=upcast)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context_kv: Tensor) -> Tensor:
        """(B, N, dim) pixels, and (B, L, 2*dim) keys and values of the prompt side by side -> (B, N, dim)."""
        k, v = context_kv.chunk(2, dim=-1)  # each (B, L, dim), or (2B, L, dim) in guidance
        x = repeat_to(x + self.attn1(self.norm1(x)), k)  # (B, N, dim) -> (B or 2B, N, dim)
        x = x + self.attn2(self.norm2(x), (k, v))
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, with a shortcut around all of them.

    Args:
        channels: of the feature map, and in all attention heads together.
        depth: the number of transformer blocks.
    """

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

    def forward(self, x: Tensor, context_kv: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W).

        Args:
            context_kv: (B, L, depth*2*C), for each transformer block its keys and values of the prompt.
        """
        h = self._project(self.proj_in, self.norm(x).flatten(2).transpose(1, 2))  # (B, C, H, W) -> (B, HW, C)
        parts = context_kv.chunk(len(self.transformer_blocks), dim=-1)
        for block, kv in zip(self.transformer_blocks, parts, strict=True):
            h = block(h, kv)
        h = self._project(self.proj_out, h)
        return repeat_to(x, h) + h.transpose(1, 2).unflatten(2, x.shape[2:])  # (B, HW, C) -> (B, C, H, W)

    @staticmethod
    def _project(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
        # A 1x1 convolution (SD 1.x) is a matrix product at every pixel (SD 2.x).
        return F.linear(x, layer.weight.flatten(1), layer.bias)
