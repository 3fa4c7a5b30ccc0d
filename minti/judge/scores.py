"""The scores of Textual Inversion, and the confidence interval of each.

Scores are cosines between CLIP embeddings of unit length (Gal et al. 2022, arXiv 2208.01618, section 5). x_1,
..., x_n are the pictures of a prompt, p_1, ..., p_M the photos of the concept, t the prompt without the word:

    CLIP-I            mean of <x_i, p_j>              reconstruction: do the pictures look like the photos?
    CLIP-T            <mean of x_i, normalised, t>    editability: do they show what else the prompt says?
    CLIP-T, pairwise  mean of <x_i, t>                the same as the paper's code averages it

The mean of different unit vectors is shorter than 1, so CLIP-T is at least as large as its pairwise form.

Intervals are those of the bootstrap (Efron 1979) with Student's t. The pictures are drawn anew, with
replacement, many times. Each draw takes n - 1 of n: this multiplies the variance of the draws by n / (n - 1),
which makes it the unbiased estimate of the variance of a mean (Rao and Wu 1988, JASA 83). If n is small, that
estimate is uncertain itself; Student's t with n - 1 degrees of freedom accounts for it (Student 1908). The
plain percentile interval holds the true mean in 50 % of cases if n is 2, and not in 95 %.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

RESAMPLES, CONFIDENCE = 1000, 0.95
NOTHING = 1e-6  # a standard deviation below this is the rounding of float32, not variation


# Scores as functions of how much every picture counts: `weights` is (R, n), each of its rows adds up to 1.


def clip_i(images: Tensor, photos: Tensor, weights: Tensor) -> Tensor:
    """Mean cosine of all pairs of a picture and a photo: (n, P), (M, P), (R, n) -> (R,)."""
    return weights @ (images @ photos.T).mean(dim=1)


def clip_t(images: Tensor, text: Tensor, weights: Tensor) -> Tensor:
    """Cosine of the mean picture and the text, as the paper defines it: (n, P), (P,), (R, n) -> (R,)."""
    return F.normalize(weights @ images, dim=1) @ text


def clip_t_pairwise(images: Tensor, text: Tensor, weights: Tensor) -> Tensor:
    """Mean cosine of each picture and the text: (n, P), (P,), (R, n) -> (R,)."""
    return weights @ (images @ text)


def image_only(photos: Tensor) -> float:
    """CLIP-I of the photos themselves: mean cosine of all pairs of different photos, (M, P). 1 if M is 1."""
    m = len(photos)
    return 1.0 if m == 1 else float(((photos @ photos.T).sum() - m) / (m * (m - 1)))


# Intervals


@lru_cache
def student_t(dof: float) -> float:
    """The t that Student's distribution stays within, on both sides, with probability CONFIDENCE.

    With T = sqrt(dof) tan(a) the density of a is proportional to cos(a)^(dof - 1), which is integrated here.

    Args:
        dof: degrees of freedom, 1 or more; not necessarily a whole number.
    """
    a = torch.linspace(0, math.pi / 2, 100_001, dtype=torch.float64)
    mass = torch.cumulative_trapezoid(a.cos() ** (dof - 1), a)
    inside = int((mass < CONFIDENCE * mass[-1]).sum()) + 1
    return math.sqrt(dof) * math.tan(a[inside])


@dataclass(frozen=True)
class Score:
    """A score, and how far it would vary with other pictures, or with words learned anew.

    Attributes:
        value: the score itself.
        draws: (R,) the score of pictures, or words, that were drawn anew; None if there are less than two.
        dof: degrees of freedom of the variance of the draws.
    """

    value: float
    draws: Tensor | None = field(default=None, repr=False, compare=False)
    dof: float = field(default=1.0, repr=False, compare=False)

    @property
    def margin(self) -> float | None:
        """Half the width of the interval; None where nothing was drawn, or nothing was seen to vary."""
        spread = 0.0 if self.draws is None else self.draws.double().std().item()
        return student_t(self.dof) * spread if spread > NOTHING else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """(low, high), which hold the true score with 95 % confidence; None where there is no `margin`."""
        margin = self.margin
        return None if margin is None else (self.value - margin, self.value + margin)

    def __str__(self) -> str:
        margin = self.margin
        return f"{self.value:.4f}" if margin is None else f"{self.value:.4f} ± {margin:.4f}"


Term = tuple[Callable[[Tensor], Tensor], int]
"""A score as a function of weights, (R, n) -> (R,), and n, the number of pictures."""


def bootstrap(terms: Sequence[Term], seed: int = 0, resamples: int = RESAMPLES) -> Score:
    """The mean of some scores, and how far it would vary with other pictures of the same prompts.

    Pictures made from the same noise, picture i of every prompt, stay together in all draws. The draws do not
    vary photos or prompts. If a prompt has a single picture, nothing is known and there are no draws.

    Args:
        terms: one for each score.
        seed: of the draws. Scores with equal seeds and numbers of pictures are drawn together.
    """
    counts = {n for _, n in terms}
    value = torch.stack([score(torch.full((1, n), 1 / n)) for score, n in terms]).mean().item()
    if min(counts) < 2:
        return Score(value)
    weights = {}
    for n in counts:
        drawn = torch.randint(n, (resamples, n - 1), generator=torch.Generator().manual_seed(seed))
        share = torch.full(drawn.shape, 1 / (n - 1))
        weights[n] = torch.zeros(resamples, n).scatter_add_(1, drawn, share)  # (R, n)
    draws = torch.stack([score(weights[n]) for score, n in terms]).mean(dim=0)  # (terms, R) -> (R,)
    return Score(value, draws, min(counts) - 1)


def combine(function: Callable[..., Tensor], scores: Sequence[Score]) -> Score:
    """A function of scores as a score. Draw i of all of them has the same noise, so differences are paired.

    Args:
        function: elementwise, of as many tensors as there are scores.
    """
    value = function(*(torch.tensor(s.value, dtype=torch.float64) for s in scores)).item()
    if all(s.draws is None for s in scores):
        return Score(value)
    draws = function(*(torch.tensor(s.value) if s.draws is None else s.draws for s in scores))
    return Score(value, draws, min(s.dof for s in scores if s.draws is not None))


def mean_score(scores: Sequence[Score | None]) -> Score | None:
    """The mean of the scores that are not None; None if all are."""
    known = [score for score in scores if score is not None]
    return combine(lambda *values: sum(values) / len(values), known) if known else None


def mean_of_words(groups: Sequence[Sequence[Score]]) -> Score | None:
    """The mean over groups of the mean of the words in each, where the words are drawn anew as well.

    A group holds the scores of words that were learned alike, for one concept, with different seeds. Its
    draws take n - 1 of its n words, independently of other groups, and pictures of these. The degrees of
    freedom are those of Satterthwaite (1946) and Welch (1947) for a sum of independent estimates. If each
    word was learned once, only pictures are drawn.
    """
    means = []
    for seed, scores in enumerate(groups):
        mean = mean_score(scores)
        if len(scores) > 1 and all(score.draws is not None for score in scores):
            draws = torch.stack([score.draws for score in scores])  # (n, R)
            n, resamples = draws.shape
            drawn = torch.randint(n, (n - 1, resamples), generator=torch.Generator().manual_seed(seed))
            mean = Score(mean.value, draws.gather(0, drawn).mean(dim=0), n - 1)
        means.append(mean)
    result = mean_score(means)
    if result is None or not all(len(scores) > 1 for scores in groups) or result.draws is None:
        return result
    variances = [mean.draws.double().var().item() for mean in means]
    weight = sum(v**2 / mean.dof for v, mean in zip(variances, means, strict=True))
    return Score(result.value, result.draws, sum(variances) ** 2 / weight if weight else result.dof)
