"""What may be added to the plain method; nothing of it is used by default.

Three of these the authors tried themselves (arXiv 2208.01618, section 5.2, "Evaluation setups"): vectors that
join in one after another, a penalty on the distance to the start, and a word for each single photo. The
fourth, a longest length, keeps vectors where the text encoder knows its way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..formats.concept import Concept
from ..model.stable_diffusion import StableDiffusion
from ..model.tokenizer import Tokenizer, clean
from .batches import Word, photo_word
from .other_starts import initial_rows


def add_photo_words(sd: StableDiffusion, word: Word) -> list[nn.Parameter]:
    """Add a word for each photo, which takes up what is special about that photo (`Settings.per_image`).

    Returns:
        The (1, D) rows of each, which start at random.
    """
    count = int(word.latents.photo.max()) + 1
    start = initial_rows(sd, "random", "", count, word.seed)
    concepts = [Concept(photo_word(word, photo), start[photo : photo + 1]) for photo in range(count)]
    return list(map(sd.add_concept, concepts))


def penalty(rows: Sequence[Tensor], starts: Sequence[Tensor], weight: float) -> Tensor:
    """The squared distance of each word's rows to their start, times `weight`, summed over the words."""
    drift = [(now - start).square().sum(1).mean() for now, start in zip(rows, starts, strict=True)]
    return (weight * torch.stack(drift)).sum()


@torch.no_grad()
def limit_norms(rows: Sequence[Tensor], longest: float) -> None:
    """Shorten, in place, every row that is longer than this."""
    for p in rows:
        p.renorm_(2, 0, longest)


class Progression:
    """Lets the vectors of some words join in one after another (`Settings.progressive`).

    A vector that waits stays where it starts, and no prompt uses it.

    Args:
        tokenizer: the model's, which knows the words.
        words: those that are learned.
        steps: when the second vector of each word joins in, the third, ...; empty: all are there at once.
    """

    def __init__(self, tokenizer: Tokenizer, words: Sequence[Word], steps: Sequence[int]) -> None:
        self.tokenizer, self.steps = tokenizer, steps
        names = [clean(word.placeholder) for word in words]
        self._ids = {name: tokenizer.placeholders[name] for name in names}

    def num_active(self, step: int) -> int | None:
        """How many vectors of each word prompts use at a step; None: all."""
        return 1 + sum(step >= joining for joining in self.steps) if self.steps else None

    def update_tokenizer(self, step: int) -> None:
        """Let the words stand for the vectors that are active at a step."""
        known = self.tokenizer.placeholders
        active = known | {word: ids[: self.num_active(step)] for word, ids in self._ids.items()}
        if active != known:
            self.tokenizer.placeholders = active

    @torch.no_grad()
    def put_back(self, rows: Sequence[Tensor], starts: Sequence[Tensor], step: int) -> None:
        """Move the vectors that wait back to their start, which weight decay has moved them from."""
        if self.steps:
            for now, start in zip(rows, starts, strict=True):
                waiting = slice(self.num_active(step), None)
                now[waiting] = start[waiting]
