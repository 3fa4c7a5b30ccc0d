"""The KL autoencoder: pictures to latents of an eighth of their sides, and back (arXiv 2112.10752, 3.1)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention
from .blocks import Downsample, ResnetBlock, Upsample
from .config import VAEConfig
from .tiles import decode_in_tiles

EPS = 1e-6  # of every GroupNorm here; the UNet's residual blocks have 1e-5


class Moments(NamedTuple):
    """The normal distribution q(z|x) that the encoder gives for each picture: mean and std, (B, C, h, w)."""

    mean: Tensor
    std: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw z = mean + std * noise, (B, C, h, w), with noise from the device of the generator."""
        noise = torch.randn(self.mean.shape, generator=generator, device=generator and generator.device)
        return self.mean + self.std * noise.to(self.mean)


class VAEAttention(Attention):
    """Self-attention with one head over the pixels of a feature map, with a shortcut around it."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels, channels, heads=1, qkv_bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, HW, C)
        return x + super().forward(h).transpose(1, 2).unflatten(2, x.shape[2:])  # (B, HW, C) -> (B, C, H, W)


class MidBlock(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups, EPS) for _ in range(2))
        self.attentions = nn.ModuleList([VAEAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class VAEBlock(nn.Module):
    """One level of the way down or up: residual blocks, then a change of resolution, if there is one.

    (B, c_in, H, W) -> (B, c_out, H or H/2 or 2H, W or W/2 or 2W).
    """

    def __init__(
        self, c_in: int, c_out: int, layers: int, groups: int, resample: type[Downsample | Upsample] | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(c_in if i == 0 else c_out, c_out, groups, EPS) for i in range(layers)
        )
        down = [Downsample(c_out, symmetric=False)] if resample is Downsample else []
        self.downsamplers = nn.ModuleList(down)
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if resample is Upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        for module in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = module(x)
        return x


def levels(channels: Sequence[int], layers: int, groups: int, resample: type[nn.Module]) -> nn.Sequential:
    """A `VAEBlock` for each level, all but the last with a change of resolution."""
    resamples = [resample] * (len(channels) - 1) + [None]
    each = zip((channels[0], *channels[:-1]), channels, resamples, strict=True)
    return nn.Sequential(*(VAEBlock(c_in, c_out, layers, groups, change) for c_in, c_out, change in each))


class Encoder(nn.Module):
    """(B, 3, H, W) pixels -> (B, 2C, h, w), features of the mean and the logarithm of the variance."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = levels(channels, config.layers_per_block, groups, Downsample)
        self.mid_block = MidBlock(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.down_blocks(self.conv_in(x)))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """(B, C, h, w) latents -> (B, 3, H, W) pixels: the encoder mirrored, every level a block deeper."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups)
        self.up_blocks = levels(channels, config.layers_per_block + 1, groups, Upsample)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        z = self.up_blocks(self.mid_block(self.conv_in(z)))
        return self.conv_out(F.silu(self.conv_norm_out(z)))


class VAE(nn.Module):
    """The autoencoder of all Stable Diffusion models. Modules have the key names of diffusers checkpoints.

    Latents here are as the encoder gives them; whoever calls it multiplies them by `config.scaling_factor`
    before the UNet sees them, and divides by it before decoding.
    """

    tile: int | None = None  # decode large latents in squares of this size, see `decode_in_tiles`

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    @property
    def dtype(self) -> torch.dtype:
        return self.quant_conv.weight.dtype

    def encode(self, pixels: Tensor) -> Moments:
        """(B, 3, H, W) pixels in [-1, 1] -> (B, C, h, w); H and W are multiples of `config.downscale`."""
        mean, log_variance = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)  # (B, C, h, w) each
        return Moments(mean, (0.5 * log_variance.clamp(-30, 20)).exp())

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) latents as the encoder gives them -> (B, 3, H, W) pixels, about in [-1, 1]."""
        decode = nn.Sequential(self.post_quant_conv, self.decoder)
        return decode_in_tiles(decode, latents, self.tile, self.config.downscale)
