"""What the UNet is told of the prompts: several at once, negative ones, and long ones in parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .tokenizer import PROMPT_LENGTH, Tokenizer
from .unet import UNet


class Conditioning(NamedTuple):
    """What the UNet is conditioned on beside the time step, for B prompts."""

    context: Tensor  # (B, 77, D), which it attends to
    # SDXL: the pooled text, (B, P), and sizes and crops in pixels, (B, 6). unCLIP: see `ClassEmbedding`.
    added: tuple[Tensor, ...] | None = None

    def take(self, order: list[int]) -> Conditioning:
        """Those of some of the prompts, in another order."""
        return Conditioning(self.context[order], self.added and tuple(part[order] for part in self.added))

    def clear(self, index: int) -> None:
        """Let SDXL see zeros in the place of a prompt and its summary."""
        self.context[index], self.added[0][index] = 0, 0

    def time_shifts(self, unet: UNet, times: Sequence[int]) -> dict[int, Tensor]:
        """What `UNet.embed_time` gives for each of some time steps, computed for all of them at once.

        Returns:
            time step -> (1, ...), or (B, ...) where it depends on the prompt, as in SDXL and unCLIP.
        """
        rows = 1 if self.added is None else len(self.context)
        added = self.added and tuple(condition.repeat(len(times), 1) for condition in self.added)
        t = torch.tensor(times, device=self.context.device).repeat_interleave(rows)
        return dict(zip(times, unet.embed_time(t, added).split(rows), strict=True))


def encode_parts(tokenizer: Tokenizer, prompt: str, in_parts: bool = True) -> Tensor:
    """Encode a prompt of any length in parts, cut where AUTOMATIC1111 cuts it; or only the first 75 tokens.

    A part is full after 75 tokens. If one of its last 20 is a comma, what stands behind it moves on to the
    next part. The vectors of a placeholder word stay together.

    Returns:
        (n, 77) int64: one row, as of any prompt, for each part.
    """
    if not in_parts:
        return tokenizer(prompt)
    comma, room = tokenizer.encode(",")[-1], PROMPT_LENGTH - 2
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
    tokenizer: Tokenizer,
    condition: Callable[[Tensor, Tensor], Conditioning],
    size: tuple[int, int],
    *,
    zero_empty: bool,
    long_prompts: bool = False,
    size_condition: Sequence[int] | None = None,
    shown: Tensor | None = None,
) -> Conditioning:
    """Conditions of each of some prompts, None for no prompt. Every different prompt is encoded once.

    Args:
        condition: `StableDiffusion.condition`.
        size: width and height of the pictures, in pixels.
        zero_empty: see `StableDiffusion.zero_empty_prompt`.
        long_prompts: encode prompts of more than 75 tokens in parts, instead of cutting them off.
        size_condition: for SDXL, the crop that the pictures should look like, in pixels: height and width of
            the original, top and left of the crop, its height and width; by default all of `size`.
        shown: for unCLIP, what it is shown beside the last of the prompts, (n, 2P); the others get zeros.
    """
    different, (width, height) = list(dict.fromkeys(texts)), size
    parts = [encode_parts(tokenizer, text or "", long_prompts) for text in different]
    ids = torch.cat(parts)
    sizes = torch.tensor([size_condition or (height, width, 0, 0, height, width)]).expand(len(ids), -1)
    each = join_parts(condition(ids, sizes), [len(part) for part in parts])
    if zero_empty and None in different:
        each.clear(different.index(None))
    each = each.take([different.index(text) for text in texts])
    if shown is None:
        return each
    return each._replace(added=(F.pad(shown, (0, 0, len(texts) - len(shown), 0)),))  # (n, 2P) -> (B, 2P)
