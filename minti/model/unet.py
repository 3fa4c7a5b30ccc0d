"""The denoiser eps_theta(x_t, t, c): a UNet with cross-attention (arXiv 2112.10752, section 3.3).

It looks at a noisy latent picture at several resolutions. On the way down, every level is a few residual
blocks and a halving of the resolution. The way up is the mirror image, and each of its residual blocks also
sees one of the outputs of the way down, the last one first (the skip connections of Ronneberger et al., arXiv
1505.04597). Two things steer it: the time step t, added inside every residual block, and the prompt, which
the transformers after residual blocks attend to. What the layers make of these two does not depend on the
picture, so it is computed for all layers at once (`embed_time`, `embed_context`), in sampling even for all
steps at once.
"""

from collections.abc import Sequence
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import fused_linear, repeat_to
from .blocks import Downsample, ResnetBlock, SpatialTransformer, TimeEmbedding, Upsample, timestep_embedding
from .config import UNetConfig
from .sdxl import AddedEmbedding
from .unclip import ClassEmbedding


class UNetBlock(nn.Module):
    """One level of the way down or up, or the middle.

    Args:
        resnets: (c_in, c_out) of each residual block.
        heads: attention heads of the transformers.
        depths: of the transformer behind each residual block; 0: none. Zeros come last, the others are equal.
        resample: the change of resolution at the end, if there is one.
    """

    def __init__(
        self,
        config: UNetConfig,
        resnets: list[tuple[int, int]],
        heads: int,
        depths: Sequence[int],
        resample: type[Downsample | Upsample] | None = None,
    ) -> None:
        super().__init__()
        channels, time_dim = resnets[-1][1], 4 * config.block_out_channels[0]
        self.resnets = nn.ModuleList(
            ResnetBlock(c_in, c_out, config.norm_num_groups, config.norm_eps, time_dim)
            for c_in, c_out in resnets
        )
        self.attentions = nn.ModuleList(
            SpatialTransformer(config, channels, heads, depth) for depth in depths if depth
        )
        self.downsamplers = nn.ModuleList([Downsample(channels)] if resample is Downsample else [])
        self.upsamplers = nn.ModuleList([Upsample(channels)] if resample is Upsample else [])
        self.shift_width = channels * len(resnets)  # of its part of `embed_time`
        self.kv_width = 2 * channels * sum(depths)  # of its part of `embed_context`

    def forward(
        self,
        x: Tensor,
        time_shifts: Tensor,
        context_kv: Tensor,
        skips: list[Tensor] | None = None,
        recompute: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the layers of the block.

        Args:
            x: (B, C, H, W).
            time_shifts: (B or 1, shift_width), a shift for each residual block.
            context_kv: (B, L, kv_width), keys and values of the prompt for each transformer.
            skips: on the way up, the outputs of the way down; those the block uses are removed from the end.
            recompute: compute the layers again in the backward pass instead of keeping their activations.

        Returns:
            The output (B, C', H', W'), and those of all its layers, the change of resolution included.
        """
        shifts = time_shifts.chunk(len(self.resnets), dim=-1)
        kvs = context_kv.chunk(len(self.attentions), dim=-1) if self.attentions else ()
        outputs = []
        for layer in zip_longest(self.resnets, shifts, self.attentions, kvs):
            if skips is not None:
                x = torch.cat([x, repeat_to(skips.pop(), x)], dim=1)  # -> (B, c_in, H, W)
            x = checkpoint(run_layer, x, *layer, use_reentrant=False) if recompute else run_layer(x, *layer)
            outputs.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            outputs.append(x)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[2:])
        return x, outputs


def run_layer(
    x: Tensor, resnet: ResnetBlock, shift: Tensor, transformer: SpatialTransformer | None, kv: Tensor | None
) -> Tensor:
    """A residual block, and the transformer that may follow it: (B, c_in, H, W) -> (B, c_out, H, W)."""
    x = resnet(x, shift)
    return x if transformer is None else transformer(x, kv)


class UNet(nn.Module):
    """The UNet of Stable Diffusion 1.x and 2.x, of their inpainting variants, of SDXL and unCLIP.

    Modules have the key names of diffusers checkpoints. With `gradient_checkpointing` set, the backward pass
    computes every layer once more instead of keeping its activations (Chen et al., arXiv 1604.06174): less
    memory, a third more time.
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
        told = config.projection_class_embeddings_input_dim
        self.add_embedding = AddedEmbedding(told, time_dim) if config.addition_time_embed_dim else None
        self.class_embedding = ClassEmbedding(told, time_dim) if told and not self.add_embedding else None

        self.down_blocks = nn.ModuleList()
        skips = [channels[0]]  # channels of each output of the way down
        for i, (c, heads, depth) in enumerate(levels):
            resnets = [(skips[-1], c)] + [(c, c)] * (layers - 1)
            resample = Downsample if i < len(levels) - 1 else None
            self.down_blocks.append(UNetBlock(config, resnets, heads, [depth] * layers, resample))
            skips += [c] * (layers + 1 if resample else layers)

        self.mid_block, (c, heads, _) = None, levels[-1]
        if config.mid_depth is not None:
            self.mid_block = UNetBlock(config, [(c, c)] * 2, heads, [config.mid_depth, 0])

        self.up_blocks = nn.ModuleList()
        for i, (c_out, heads, depth) in reversed(list(enumerate(levels))):
            resnets = []
            for _ in range(layers + 1):
                resnets.append((c + skips.pop(), c_out))  # c: channels of the layer before
                c = c_out
            resample = Upsample if i > 0 else None
            self.up_blocks.append(UNetBlock(config, resnets, heads, [depth] * (layers + 1), resample))

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    @property
    def blocks(self) -> list[UNetBlock]:
        """All blocks in the order of the forward pass."""
        middle = [] if self.mid_block is None else [self.mid_block]
        return [*self.down_blocks, *middle, *self.up_blocks]

    def embed_time(self, t: Tensor, added: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Compute what each residual block adds for the time steps t.

        Args:
            t: (N,) time steps; N is the batch, or 1 for a whole batch, or the steps of a sampling run.
            added: what `AddedEmbedding` takes in SDXL, or `ClassEmbedding` in unCLIP; None in others.

        Returns:
            (N, sum of shift_width): the shifts of all residual blocks, in the order of the forward pass.
        """
        sinusoids = timestep_embedding(t, self.config.block_out_channels[0]).to(self.conv_in.weight.dtype)
        embedding = self.time_embedding(sinusoids)
        for embed in [e for e in (self.add_embedding, self.class_embedding) if e is not None]:
            embedding = embedding + embed(added)
        projections = [resnet.time_emb_proj for block in self.blocks for resnet in block.resnets]
        return fused_linear(projections, F.silu(embedding))

    def embed_context(self, context: Tensor) -> Tensor:
        """Keys and values of the prompt for every cross-attention, (B, L, D) -> (B, L, sum of kv_width).

        A context (B, L, layers*D) has a part for each of them; see `TextEncoderPerLayer`.
        """
        attns = [b.attn2 for block in self.blocks for t in block.attentions for b in t.transformer_blocks]
        parts = context.split(self.config.cross_attention_dim, dim=-1)
        if len(parts) == 1:
            return fused_linear([layer for a in attns for layer in (a.to_k, a.to_v)], context)
        each = zip(attns, parts, strict=True)
        return torch.cat([fused_linear([a.to_k, a.to_v], part) for a, part in each], dim=-1)

    def denoise(self, x: Tensor, time_shifts: Tensor, context_kv: Tensor) -> Tensor:
        """`forward` behind `embed_time` and `embed_context`: the part that depends on the picture.

        Args:
            x: (B, in_channels, h, w) noisy latents.
            time_shifts: (B or 1, ...) from `embed_time`.
            context_kv: (B, L, ...) from `embed_context`; or of 2B prompts, as in guidance. Then the pictures
                are repeated, but not before the first cross-attention, if all share their time shifts.

        Returns:
            (B or 2B, out_channels, h, w)
        """
        blocks = self.blocks
        shifts = time_shifts.split([block.shift_width for block in blocks], dim=-1)
        kvs = context_kv.split([block.kv_width for block in blocks], dim=-1)
        inputs, n = list(zip(blocks, shifts, kvs, strict=True)), len(self.down_blocks)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()

        x = self.conv_in(x if len(time_shifts) == 1 else repeat_to(x, context_kv))  # -> (B or 2B, C, h, w)
        skips = [x]
        for block, shift, kv in inputs[:n]:  # down
            x, outputs = block(x, shift, kv, recompute=recompute)
            skips += outputs
        for block, shift, kv in inputs[n:-n]:  # the middle, if there is one
            x, _ = block(x, shift, kv, recompute=recompute)
        for block, shift, kv in inputs[-n:]:  # up
            x, _ = block(x, shift, kv, skips, recompute=recompute)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, added: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Predict eps, (B, out_channels, h, w), or v or x0 (see `Schedule.target`), from noisy latents.

        Args:
            x: (B, in_channels, h, w) latents x_t, scaled to unit variance at t = 0.
            t: (B,) or (1,) time steps, 0 to 999.
            context: (B, L, D) output of the text encoder.
            added: SDXL and unCLIP only, see `embed_time`.
        """
        return self.denoise(x, self.embed_time(t, added), self.embed_context(context))
