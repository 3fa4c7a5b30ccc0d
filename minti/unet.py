"""The denoiser eps_theta(x_t, t, context): a UNet with cross-attention (Rombach et al., arXiv 2112.10752).

It looks at a noisy latent picture at several resolutions. On the way down every level is a few residual
blocks, then a halving of the resolution; on the way up it is the mirror image, and each block also sees what
the block opposite put aside. Two things steer it: the time step t, added inside every residual block, and the
words of the prompt, which the transformer blocks attend to. Neither depends on the picture, so both are
computed by methods of their own (`embed_time`, `embed_context`), which sampling calls once for all steps;
`denoise` does the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import Attention, linear_together
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

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """(B, c_in, H, W), and `time` (B or 1, c_out) from `time_emb_proj` -> (B, c_out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        if time is not None:
            h = h + time[:, :, None, None]
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

    def forward(self, x: Tensor, words: KeyValue) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), words)
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

    def forward(self, x: Tensor, words: Sequence[KeyValue]) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W); `words` has keys and values for each transformer block."""
        h = self._project(self.proj_in, self.norm(x).flatten(2).transpose(1, 2))  # (B, C, H, W) -> (B, HW, C)
        for block, kv in zip(self.transformer_blocks, words, strict=True):
            h = block(h, kv)
        h = self._project(self.proj_out, h)
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])  # (B, HW, C) -> (B, C, H, W)

    @staticmethod
    def _project(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
        # A 1x1 convolution (SD 1.x) is the same as a matrix product at every pixel (SD 2.x).
        return F.linear(x, layer.weight.flatten(1), layer.bias)


class UNetBlock(nn.Module):
    """One level of the way down or up, or the middle; `UNet.denoise` runs it.

    Args:
        resnets: (c_in, c_out) of each residual block.
        heads, depth, transformers: how many of the residual blocks a transformer follows, and its size.
        resample: the change of resolution at the end, if there is one.
    """

    def __init__(
        self,
        config: UNetConfig,
        resnets: list[tuple[int, int]],
        heads: int,
        depth: int,
        transformers: int,
        resample: type[Downsample] | type[Upsample] | None = None,
    ) -> None:
        super().__init__()
        channels, time_dim = resnets[-1][1], 4 * config.block_out_channels[0]
        self.resnets = nn.ModuleList(
            ResnetBlock(c_in, c_out, config.norm_num_groups, config.norm_eps, time_dim)
            for c_in, c_out in resnets
        )
        self.attentions = nn.ModuleList(
            SpatialTransformer(config, channels, heads, depth) for _ in range(transformers if depth else 0)
        )
        self.downsamplers = nn.ModuleList([Downsample(channels)] if resample is Downsample else [])
        self.upsamplers = nn.ModuleList([Upsample(channels)] if resample is Upsample else [])

    @property
    def layers(self) -> list[tuple[ResnetBlock, SpatialTransformer | None]]:
        return list(zip_longest(self.resnets, self.attentions))


class UNet(nn.Module):
    """The UNet of Stable Diffusion 1.x, 2.x, their inpainting variants, and SDXL.

    Module names are the key names of diffusers checkpoints. With `gradient_checkpointing` set, the backward
    pass computes every block once more instead of remembering its insides: less memory, a third more time.
    """

    gradient_checkpointing = False

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels, layers = config.block_out_channels, config.layers_per_block
        levels = list(zip(channels, config.num_attention_heads, config.transformer_depth, strict=True))
        time_dim = 4 * channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(channels[0], time_dim)
        self.add_embedding = None
        if config.projection_class_embeddings_input_dim:
            self.add_embedding = TimeEmbedding(config.projection_class_embeddings_input_dim, time_dim)

        self.down_blocks = nn.ModuleList()
        skips = [channels[0]]  # channels of each feature map put aside for the way up
        for i, (c, heads, depth) in enumerate(levels):
            last = i == len(levels) - 1
            resnets = [(skips[-1], c)] + [(c, c)] * (layers - 1)
            self.down_blocks.append(
                UNetBlock(config, resnets, heads, depth, layers, None if last else Downsample)
            )
            skips += [c] * (layers if last else layers + 1)

        self.mid_block = None
        if config.mid_depth is not None:
            c, heads, _ = levels[-1]
            self.mid_block = UNetBlock(config, [(c, c)] * 2, heads, config.mid_depth, 1)

        self.up_blocks = nn.ModuleList()
        below = channels[-1]
        for i, (c, heads, depth) in enumerate(reversed(levels)):
            resnets = []
            for _ in range(layers + 1):
                resnets.append((below + skips.pop(), c))
                below = c
            last = i == len(levels) - 1
            self.up_blocks.append(
                UNetBlock(config, resnets, heads, depth, layers + 1, None if last else Upsample)
            )

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def _blocks(self) -> list[UNetBlock]:
        """All blocks in the order of the forward pass."""
        return [*self.down_blocks, *([self.mid_block] if self.mid_block is not None else []), *self.up_blocks]

    def embed_time(self, t: Tensor, added: tuple[Tensor, Tensor] | None = None) -> Sequence[Tensor]:
        """What each residual block adds for time steps t.

        Args:
            t: (N,) time steps; N is the batch, or 1 for a whole batch, or the steps of a sampling run.
            added: SDXL's extra conditions: pooled text (N, P) and sizes and crops in pixels (N, 6).

        Returns:
            For every residual block, in the order of the forward pass, (N, its channels).
        """
        dtype = self.conv_in.weight.dtype
        emb = self.time_embedding(timestep_embedding(t, self.config.block_out_channels[0]).to(dtype))
        if self.add_embedding is not None:
            if added is None:
                raise ValueError("this UNet (SDXL) also needs added = (pooled text, sizes and crops)")
            pooled, sizes = added
            sizes = timestep_embedding(sizes.flatten(), self.config.addition_time_embed_dim)  # (6N, 256)
            sizes = sizes.view(len(pooled), -1).to(dtype)  # (6N, 256) -> (N, 6*256)
            emb = emb + self.add_embedding(torch.cat([pooled, sizes], dim=-1))
        emb = F.silu(emb)
        projections = [resnet.time_emb_proj for block in self._blocks() for resnet in block.resnets]
        return linear_together(projections, emb)

    def embed_context(self, context: Tensor) -> list[list[KeyValue]]:
        """Keys and values of the prompt's words (B, L, D) for each block of each transformer, in order."""
        transformers = [transformer for block in self._blocks() for transformer in block.attentions]
        attentions = [block.attn2 for t in transformers for block in t.transformer_blocks]
        projections = [layer for attention in attentions for layer in (attention.to_k, attention.to_v)]
        parts = iter(linear_together(projections, context))
        return [[(next(parts), next(parts)) for _ in t.transformer_blocks] for t in transformers]

    def denoise(self, x: Tensor, time: Sequence[Tensor], words: Sequence[Sequence[KeyValue]]) -> Tensor:
        """(B, C, h, w) noisy latents -> (B, out_channels, h, w); see `embed_time` and `embed_context`."""
        time, words = iter(time), iter(words)

        def run(resnet: ResnetBlock, transformer: SpatialTransformer | None, x: Tensor) -> Tensor:
            t, kv = next(time), None if transformer is None else next(words)

            def forward(x: Tensor) -> Tensor:
                x = resnet(x, t)
                return x if transformer is None else transformer(x, kv)

            recompute = self.gradient_checkpointing and torch.is_grad_enabled()
            return checkpoint(forward, x, use_reentrant=False) if recompute else forward(x)

        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            for layer in block.layers:
                x = run(*layer, x)
                skips.append(x)
            for downsample in block.downsamplers:
                x = downsample(x)
                skips.append(x)

        if self.mid_block is not None:
            for layer in self.mid_block.layers:
                x = run(*layer, x)

        for block in self.up_blocks:
            for layer in block.layers:
                x = run(*layer, torch.cat([x, skips.pop()], dim=1))
            for upsample in block.upsamplers:
                x = upsample(x, skips[-1].shape[2:])
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, added: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Predict eps (or v, or x0: see `diffusion.Schedule`) from noisy latents.

        Args:
            x: (B, in_channels, h, w) latents x_t, scaled to unit variance at t = 0.
            t: (B,) or (1,) time steps, 0 to 999.
            context: (B, L, D) output of the text encoder.
            added: SDXL only, see `embed_time`.

        Returns:
            (B, out_channels, h, w)
        """
        return self.denoise(x, self.embed_time(t, added), self.embed_context(context))
