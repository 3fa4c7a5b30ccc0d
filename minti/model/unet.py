"""The denoiser eps_theta(x_t, t, context): a UNet with cross-attention (Rombach et al., arXiv 2112.10752).

It looks at a noisy latent picture at several resolutions. On the way down every level is a few residual
blocks, then a halving of the resolution; on the way up it is the mirror image, and each block also sees what
the block opposite put aside. Two things steer it: the time step t, added inside every residual block, and the
words of the prompt, which the transformer blocks attend to. Neither depends on the picture, so both are
computed by methods of their own (`embed_time`, `embed_context`), which sampling calls once for all steps;
`denoise` does the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import fused_linear
from .blocks import (
    Downsample,
    KeyValue,
    ResnetBlock,
    SpatialTransformer,
    TimeEmbedding,
    Upsample,
    timestep_embedding,
)
from .config import UNetConfig


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
            The shift of every residual block, in the order of the forward pass, (N, its channels).
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
        return fused_linear(projections, emb)

    def embed_context(self, context: Tensor) -> list[list[KeyValue]]:
        """Keys and values of the prompt's words (B, L, D) for each block of each transformer, in order."""
        transformers = [transformer for block in self._blocks() for transformer in block.attentions]
        attentions = [block.attn2 for t in transformers for block in t.transformer_blocks]
        projections = [layer for attention in attentions for layer in (attention.to_k, attention.to_v)]
        parts = iter(fused_linear(projections, context))
        return [[(next(parts), next(parts)) for _ in t.transformer_blocks] for t in transformers]

    def denoise(
        self, x: Tensor, time_shifts: Sequence[Tensor], context_kv: Sequence[Sequence[KeyValue]]
    ) -> Tensor:
        """(B, C, h, w) noisy latents -> (B, out_channels, h, w); see `embed_time` and `embed_context`."""
        time_shifts, context_kv = iter(time_shifts), iter(context_kv)

        def run(resnet: ResnetBlock, transformer: SpatialTransformer | None, x: Tensor) -> Tensor:
            shift, kv = next(time_shifts), None if transformer is None else next(context_kv)

            def forward(x: Tensor) -> Tensor:
                x = resnet(x, shift)
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
