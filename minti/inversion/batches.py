"""What a step of Textual Inversion looks at: views of the photos, prompts, time steps and noise.

Every random number is a function of (seed, step). So a run that was interrupted continues as if nothing had
happened, and a word comes out the same whether it is learned alone or together with others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .latents import Latents
from .prompt_variants import vary_prompt
from .settings import Settings
from .templates import OBJECT


@dataclass(frozen=True)
class Batch:
    """B samples of a word.

    Attributes:
        view: (B,) int64, indices into the word's latents.
        prompts: B prompts that contain the word.
        t: (B,) int64, time steps.
        posterior_noise: (B, C, h, w) float32 standard normal, for drawing from the encoder's distribution.
        eps: (B, C, h, w) float32 standard normal, the noise that the model should find.
    """

    view: Tensor
    prompts: list[str]
    t: Tensor
    posterior_noise: Tensor
    eps: Tensor

    def __getitem__(self, part: slice) -> Batch:
        return Batch(*(value[part] for value in vars(self).values()))

    def to(self, device: torch.device) -> Batch:
        """Move the tensors to a device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: to_device(value, device) for name, value in tensors.items()})


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Move a tensor, without waiting for what a GPU is doing."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


@dataclass(frozen=True)
class Word:
    """A word to be learned.

    Attributes:
        placeholder: the word as it is written in prompts.
        init: (num_vectors, D) float32, the vectors it starts from.
        latents: the encoded views of its photos.
        templates: prompts with {} in the place of the word.
        captions: for each photo a template of its own, or None. Empty: none has one.
        lr: learning rate.
        seed: decides everything random about this word.
    """

    placeholder: str
    init: Tensor
    latents: Latents
    templates: Sequence[str] = OBJECT
    captions: Sequence[str | None] = ()
    lr: float = 5e-3
    seed: int = 0

    def latents_at(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Draw x0 of a batch on their device, (B, C, h, w), with weights (B, 1, h, w) and sizes (B, 6)."""
        latents, view = self.latents, batch.view
        x0 = latents.mean[view] + latents.std[view] * batch.posterior_noise
        return x0, latents.weight[view], latents.sizes[view]


def generator(*key: object) -> torch.Generator:
    """The random numbers that belong to a key, such as (seed, step), on the CPU."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def sample_batch(word: Word, settings: Settings, num_train_timesteps: int, count: int, *key: object) -> Batch:
    """Draw samples of a word.

    No photo comes twice in a batch before all have come once, and time steps are stratified: one from each of
    `count` equal parts of the range. Both make the gradient less noisy and leave its mean as it is
    (Kingma et al. 2021, arXiv 2107.00630, appendix I.1).

    Args:
        word: what to draw samples of.
        settings: the range of the time steps, how often prompts are the bare word or name the photo.
        num_train_timesteps: T; the model's time steps are from 0 to T - 1.
        count: B, the number of samples.
        key: together with the seed of the word it decides everything random.
    """
    g, latents = generator(word.seed, *key), word.latents
    photos = int(latents.photo.max()) + 1
    photo = torch.cat([torch.randperm(photos, generator=g) for _ in range(-(-count // photos))])[:count]
    stratum = (torch.randperm(count, generator=g) + torch.rand(count, generator=g)) / count
    low, high = settings.time_range(num_train_timesteps)
    t = (low + stratum * (high - low)).long().clamp(max=high - 1)  # just below 1 may round up to it
    views = [(latents.photo == p).nonzero()[:, 0] for p in photo]
    view = torch.stack([v[torch.randint(len(v), (), generator=g)] for v in views])
    chance = torch.rand(count, 2, generator=g).tolist()
    template = torch.randint(len(word.templates), (count,), generator=g).tolist()
    prompts = []
    for p, i, shares in zip(photo.tolist(), template, chance, strict=True):
        text = (word.captions[p] if word.captions else None) or word.templates[i]
        prompts.append(vary_prompt(text, word.placeholder, p, settings, *shares))
    shape = (count, *latents.mean.shape[1:])
    return Batch(view, prompts, t, torch.randn(shape, generator=g), torch.randn(shape, generator=g))
