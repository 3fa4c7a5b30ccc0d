"""How close pictures come to photos and to prompts, in the eyes of CLIP.

All scores are cosines between embeddings of unit length (arXiv 2208.01618, section 5). With x_1 ... x_N the
pictures of a prompt, p_1 ... p_M the photos of the concept and t the prompt without the learned word:

    CLIP-I            mean of <x_i, p_j>          reconstruction: does it look like the photos?
    CLIP-T            <mean of x_i, normalised, t>   editability: does it do what else the prompt says?
    CLIP-T, pairwise  mean of <x_i, t>            the same as the paper's code averages it

The mean of unit vectors is shorter than 1, so the paper's CLIP-T is the larger of the two, the more so the
more the pictures differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

RESAMPLES, CONFIDENCE = 1000, 0.95


# The scores, each as a function of how much every picture counts: `weights`, (R, N), rows that add up to 1.
# Embeddings are of unit length.


def clip_i(images: Tensor, photos: Tensor, weights: Tensor) -> Tensor:
    """(N, P), (M, P), (R, N) -> (R,): mean cosine of all pairs of a picture and a photo."""
    return weights @ (images @ photos.T).mean(dim=1)


def clip_t(images: Tensor, text: Tensor, weights: Tensor) -> Tensor:
    """(N, P), (P,), (R, N) -> (R,): cosine of the mean picture and the text, as the paper defines it."""
    return F.normalize(weights @ images, dim=1) @ text


def clip_t_pairwise(images: Tensor, text: Tensor, weights: Tensor) -> Tensor:
    """(N, P), (P,), (R, N) -> (R,): mean cosine of each picture and the text, as the paper's code has it."""
    return weights @ (images @ text)


def image_only(photos: Tensor) -> float:
    """Mean cosine of all pairs of different photos, (M, P): CLIP-I of the photos themselves. Of one: 1."""
    m = len(photos)
    return 1.0 if m == 1 else float(((photos @ photos.T).sum() - m) / (m * (m - 1)))


@dataclass(frozen=True)
class Score:
    """A score, and what it would be with other pictures.

    Attributes:
        draws: (R,) the score with the pictures drawn anew, see `bootstrap`; None where there is nothing to
            vary.
    """

    value: float
    draws: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Holds the score with 95 % confidence.

        The middle 95 % of the draws, moved as a whole by what they are off on average: resampled pictures
        repeat themselves, which by itself lowers CLIP-T a little.
        """
        if self.draws is None:
            return None
        tail = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=self.draws.dtype)
        low, high = (self.value + self.draws.quantile(tail) - self.draws.mean()).tolist()
        return low, high

    @property
    def margin(self) -> float:
        """Half the width of the interval; 0 where there is none."""
        low, high = self.interval or (0.0, 0.0)
        return (high - low) / 2

    def __str__(self) -> str:
        interval = "" if self.draws is None else " [{:.4f}, {:.4f}]".format(*self.interval)
        return f"{self.value:.4f}{interval}"


def combine(function: Callable[..., Tensor], scores: Sequence[Score]) -> Score:
    """A function of scores as a score itself. Draw i of all of them is of the same noise, so it stays paired.

    Args:
        function: of as many tensors as there are scores, elementwise.
    """
    value = function(*(torch.tensor(s.value, dtype=torch.float64) for s in scores)).item()
    if all(s.draws is None for s in scores):
        return Score(value)
    return Score(value, function(*(torch.tensor(s.value) if s.draws is None else s.draws for s in scores)))


def mean_score(scores: Sequence[Score | None]) -> Score | None:
    """Of those that are there; None if none is."""
    known = [score for score in scores if score is not None]
    return combine(lambda *values: sum(values) / len(values), known) if known else None


def mean_of_words(scores: Sequence[Score], seed: int) -> Score:
    """The mean of words that were learned alike; its draws draw the words anew as well, with replacement.

    Args:
        seed: of these draws. Equal seeds and numbers of words: the i-th ones are drawn together.
    """
    mean = mean_score(scores)
    if len(scores) < 2 or any(score.draws is None for score in scores):
        return mean
    draws = torch.stack([score.draws for score in scores])  # (words, R)
    drawn = torch.randint(len(draws), draws.shape, generator=torch.Generator().manual_seed(seed))
    return Score(mean.value, draws.gather(0, drawn).mean(dim=0))


Term = tuple[Callable[[Tensor], Tensor], int]


def bootstrap(statistics: Sequence[Term], seed: int = 0, resamples: int = RESAMPLES) -> Score:
    """The mean of some scores, and how far it would vary with other pictures (Efron 1979).

    The pictures are drawn anew, with replacement, over and over; those made from the same noise, picture i of
    every prompt, stay together. This says nothing about other photos or other prompts.

    Args:
        statistics: for each score a function (R, N) weights -> (R,), and N, how many pictures it is of.
    """
    value = torch.stack([f(torch.full((1, n), 1 / n)) for f, n in statistics]).mean().item()
    if max(n for _, n in statistics) < 2:
        return Score(value)
    weights = {}
    for n in {n for _, n in statistics}:
        drawn = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
        weights[n] = torch.zeros(resamples, n).scatter_add_(1, drawn, torch.full(drawn.shape, 1 / n))
    # (scores, R) -> (R,)
    return Score(value, torch.stack([f(weights[n]) for f, n in statistics]).mean(dim=0))
