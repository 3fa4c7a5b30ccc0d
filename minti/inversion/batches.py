"""What a step of Textual Inversion looks at: which photos, in which prompts, at which times, which noise.

Every random number is a function of (seed, step), so that a run that was interrupted can continue as if
nothing had happened, and a word comes out the same whether it is learned alone or together with others.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from .templates import OBJECT
from .views import Latents


@dataclass(frozen=True)
class Settings:
    """How words are learned; the same for all words of a run, except for what `Word` holds."""

    steps: int = 3000
    batch_size: int = 4  # samples of each word, for each process
    accumulate: int = 1  # batches summed up before an update
    lr_schedule: str = "constant"  # or "cosine", down to zero
    warmup: int = 0  # steps over which the learning rate rises from zero
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    progressive: tuple[int, ...] = ()  # steps at which the second vector joins in, the third, ...
    regularization: float = 0.0  # weight of ||v - v_init||^2
    max_norm: float | None = None  # longest a vector may be, in mean lengths of the vocabulary's
    per_image: float = 0.0  # how often a prompt also has a word that belongs to one photo only
    caption_dropout: float = 0.0  # how often a prompt is the bare word
    eval_size: int = 16  # samples in the evaluation
    eval_seed: int = 0

    def __post_init__(self) -> None:
        if self.lr_schedule not in ("constant", "cosine"):
            raise InputError(f"lr_schedule {self.lr_schedule!r}: choose from constant, cosine")
        if sorted(set(self.progressive)) != list(self.progressive):
            raise InputError(f"progressive {self.progressive}: the steps should rise")

    def lr_factor(self, step: int) -> float:
        """What the learning rate is multiplied by at a step, 0 to steps - 1."""
        rising = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return rising * (
            0.5 + 0.5 * math.cos(math.pi * step / self.steps) if self.lr_schedule == "cosine" else 1.0
        )


@dataclass(frozen=True)
class Word:
    """A word to be learned, and what it is learned from.

    Attributes:
        init: (num_vectors, D) where the rows start, see `initial_rows`.
        latents: the encoded photos.
        templates: prompts with {} for the word, for photos without a caption of their own.
        captions: a template or None for each photo.
        lr: learning rate of AdamW.
        seed: of everything random about this word.
    """

    placeholder: str
    init: Tensor
    latents: Latents
    templates: Sequence[str] = OBJECT
    captions: Sequence[str | None] = ()
    lr: float = 5e-3
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """What `sample_batch` draws, B of each."""

    view: Tensor  # (B,) int64
    prompts: list[str]
    t: Tensor  # (B,) int64
    posterior_noise: Tensor  # (B, C, h, w)
    eps: Tensor  # (B, C, h, w)

    def __getitem__(self, part: slice) -> Batch:
        return Batch(*(value[part] for value in vars(self).values()))


def generator(*key: object) -> torch.Generator:
    """The random numbers that belong to a key, such as (seed, step)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def photo_word(word: Word, photo: int) -> str:
    """The word that belongs to one photo only, "<toy>:0"."""
    return f"{word.placeholder}:{photo}"


def longest_prompts(word: Word, settings: Settings) -> list[str]:
    """Templates that take up as much room as any that `sample_batch` may use."""
    extra = f" with {photo_word(word, 0)}" if settings.per_image else ""
    return [text + extra for text in (*word.templates, *filter(None, word.captions))]


def sample_batch(word: Word, settings: Settings, num_train_timesteps: int, count: int, *key: object) -> Batch:
    """`count` samples of a word: pictures, prompts, time steps and noise, all determined by the key."""
    g, latents = generator(word.seed, *key), word.latents
    photos = int(latents.photo.max()) + 1
    # Every photo comes equally often, and every stretch of time, for a loss with less noise.
    photo = torch.cat([torch.randperm(photos, generator=g) for _ in range(-(-count // photos))])[:count]
    stratum = (torch.randperm(count, generator=g) + torch.rand(count, generator=g)) / count
    t = (stratum * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)  # 1.0 - tiny may round up
    views = [(latents.photo == p).nonzero()[:, 0] for p in photo]
    view = torch.stack([v[torch.randint(len(v), (), generator=g)] for v in views])
    chance = torch.rand(count, 2, generator=g).tolist()
    template = torch.randint(len(word.templates), (count,), generator=g).tolist()
    prompts = []
    for p, (drop, with_photo), i in zip(photo.tolist(), chance, template, strict=True):
        text = (word.captions[p] if word.captions else None) or word.templates[i]
        text = "{}" if drop < settings.caption_dropout else text
        if with_photo < settings.per_image:
            text += f" with {photo_word(word, p)}"
        prompts.append(text.replace("{}", word.placeholder))
    shape = (count, *latents.mean.shape[1:])
    return Batch(view, prompts, t, torch.randn(shape, generator=g), torch.randn(shape, generator=g))
