"""What the UNet is told beside the time step, and the two text encoders of SDXL (arXiv 2307.01952).

Most models have one text encoder, whose output is all that the UNet attends to. SDXL has two, side by side:
the UNet attends to both outputs, one beside the other, and is also told, by way of the time embedding, a
summary of the prompt and six numbers: the size of the photo, where it was cropped, and the size of the
result. Either kind turns token ids into a `TextOutput`, and the rest of minti does not tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from .blocks import TimeEmbedding, timestep_embedding
from .clip import CLIPTextModel, TextOutput, first_end
from .tokenizer import Tokenizer
from .vae import VAE


class Conditioning(NamedTuple):
    """What the UNet is conditioned on beside the time step, for B prompts."""

    context: Tensor  # (B, 77, D), which it attends to
    # SDXL: the pooled text, (B, P), and sizes and crops in pixels, (B, 6)
    added: tuple[Tensor, ...] | None = None

    def take(self, order: list[int]) -> Conditioning:
        """Those of some of the prompts, in another order."""
        return Conditioning(self.context[order], self.added and tuple(part[order] for part in self.added))

    def clear(self, index: int) -> None:
        """Let SDXL see zeros in the place of a prompt and its summary."""
        self.context[index], self.added[0][index] = 0, 0


class AddedEmbedding(TimeEmbedding):
    """What SDXL adds to the embedding of the time step."""

    def forward(self, added: tuple[Tensor, ...] | None) -> Tensor:
        """Pooled text (N, P), and sizes and crops in pixels (N, 6), to (N, time_dim).

        Raises:
            InputError: they are not given.
        """
        if added is None:
            raise InputError(
                "this UNet has SDXL's add_embedding: it also needs pooled text, sizes and crops (`added`)"
            )
        pooled, sizes = added
        width = (self.linear_1.in_features - pooled.shape[1]) // sizes.shape[1]  # 256 in SDXL
        sizes = timestep_embedding(sizes.flatten(), width)  # (N, 6) -> (6N, width)
        sizes = sizes.view(len(pooled), -1).to(self.linear_1.weight.dtype)  # (6N, width) -> (N, 6*width)
        return super().forward(torch.cat([pooled, sizes], dim=-1))


def blank_canvas(vae: VAE, x: Tensor, dtype: torch.dtype) -> Tensor:
    """What an inpainting UNet sees beside latents x, (1, C, h, w), where everything is to be painted.

    Returns:
        (1, 1 + C, h, w): a mask of ones, and the latents of a grey picture.
    """
    height, width = (side * vae.config.downscale for side in x.shape[2:])
    grey = vae.encode(torch.zeros(1, 3, height, width, device=x.device, dtype=vae.dtype)).mean
    return F.pad(grey.to(dtype) * vae.config.scaling_factor, (0, 0, 0, 0, 1, 0), value=1)


def encode_parts(tokenizer: Tokenizer, prompt: str, in_parts: bool = True) -> Tensor:
    """Encode a prompt of any length in parts, cut where AUTOMATIC1111 cuts it; or only the first 75 tokens.

    A part is full after 75 tokens. If one of its last 20 is a comma, what stands behind it moves on to the
    next part. The vectors of a placeholder word stay together.

    Returns:
        (n, 77) int64: one row, as of any prompt, for each part.
    """
    if not in_parts:
        return tokenizer(prompt)
    comma, room = tokenizer.encode(",")[-1], tokenizer.max_length - 2
    parts, ids, behind_comma = [], [], 0
    for word, word_ids in tokenizer.pieces(prompt):
        for more in [word_ids] if word in tokenizer.placeholders else [[i] for i in word_ids]:
            while ids and len(ids) + len(more) > room:
                near = len(ids) == room and more[0] != comma and 0 < room - behind_comma < 20
                cut = behind_comma if near else len(ids)
                parts, ids, behind_comma = [*parts, ids[:cut]], ids[cut:], 0
            ids = [*ids, *more]
            behind_comma = len(ids) if more[0] == comma else behind_comma
    return torch.stack([tokenizer.frame(part) for part in (*parts, ids)])


def join_parts(each: Conditioning, counts: Sequence[int]) -> Conditioning:
    """Put prompts together again that were encoded in parts, as AUTOMATIC1111 and ComfyUI do.

    The contexts of a prompt's parts come one behind the other, and the pooled text is that of the first part.
    Contexts are repeated until all have the same length, which changes nothing: attention to several equal
    tokens is attention to one of them.

    Args:
        each: the conditions of all parts of all prompts.
        counts: of how many parts each prompt consists.
    """
    length = math.lcm(*counts)
    contexts = [c.flatten(0, 1).repeat(length // len(c), 1) for c in each.context.split(tuple(counts))]
    first = [sum(counts[:i]) for i in range(len(counts))]
    return Conditioning(torch.stack(contexts), each.added and tuple(a[first] for a in each.added))


def encode_each(
    texts: Sequence[str | None],
    tokenize: Callable[[str], Tensor],
    condition: Callable[[Tensor], Conditioning],
    *,
    zero_empty: bool,
) -> Conditioning:
    """Conditions of each of some prompts, None for no prompt. Every different prompt is encoded once.

    Args:
        tokenize: a prompt -> the (n, 77) ids of its parts.
        condition: (N, 77) ids -> their conditions.
        zero_empty: see `StableDiffusion.zero_empty_prompt`.
    """
    different = list(dict.fromkeys(texts))
    parts = [tokenize(text or "") for text in different]
    each = join_parts(condition(torch.cat(parts)), [len(part) for part in parts])
    if zero_empty and None in different:
        each.clear(different.index(None))
    return each.take([different.index(text) for text in texts])


class TwoTextEncoders(nn.Module):
    """SDXL's text side: CLIP ViT-L/14 and OpenCLIP ViT-bigG/14 read the same prompt.

    Both have the same vocabulary, but fill up short prompts with different tokens, which the UNet sees. The
    rows of a learned word have one part for each encoder, (num_vectors, D1 + D2), as the context has.

    Args:
        text_encoder, text_encoder_2: the second has a text projection.
        pad_2: the id that fills up prompts of the second encoder; the first takes them as they come.

    Attributes:
        context_layer: the layer of both that becomes the context, counted from the end.
    """

    def __init__(self, text_encoder: CLIPTextModel, text_encoder_2: CLIPTextModel, pad_2: int) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2, self.pad_2 = text_encoder, text_encoder_2, pad_2
        self.context_layer = 2
        width = text_encoder.config.hidden_size
        text_encoder_2.token_embedding.columns = slice(width, width + text_encoder_2.config.hidden_size)

    def forward(self, ids: Tensor) -> TextOutput:
        """Encode token ids, (B, 77) int64, as the first encoder's tokenizer gives them.

        Returns:
            context (B, 77, D1 + D2): the last layer but one of either encoder, or another `context_layer`,
                without final normalisation;
            pooled (B, P): the projected output of the second encoder at the end token.
        """
        end = first_end(ids, self.text_encoder.config.eos_token_id)  # (B,)
        behind = torch.arange(ids.shape[1], device=ids.device) > end[:, None]  # (B, 77)
        first, second = self.text_encoder(ids), self.text_encoder_2(ids.masked_fill(behind, self.pad_2))
        context = torch.cat([text.hidden_states[-self.context_layer] for text in (first, second)], dim=-1)
        return TextOutput(context, pooled=second.pooled)
