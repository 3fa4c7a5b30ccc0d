"""What may be added to the plain method; nothing of it is used by default.

Three of these the authors tried themselves (arXiv 2208.01618, section 5.2, "Evaluation setups"): vectors that
join in one after another, a penalty on the distance to the start, and a word for each single photo. A longest
length keeps vectors where the text encoder knows its way, a mean over the last steps evens out the noise of
the gradient, and a term for the context has a word leave to other words what they say.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..formats.concept import Concept
from ..model.stable_diffusion import StableDiffusion
from ..model.tokenizer import Tokenizer, clean
from .batches import Word
from .optimizers import DirectionDescent
from .prompt_variants import photo_word
from .settings import Settings
from .start import initial_rows
from .state import entry
from .templates import CONTEXT


def add_photo_words(sd: StableDiffusion, word: Word) -> list[nn.Parameter]:
    """Add a word for each photo, which takes up what is special about that photo (`Settings.per_image`).

    Returns:
        The (1, D) rows of each, which start at random.
    """
    count = int(word.latents.photo.max()) + 1
    start = initial_rows(sd, "random", "", count, word.seed)
    concepts = [
        Concept(photo_word(word.placeholder, photo), start[photo : photo + 1]) for photo in range(count)
    ]
    return list(map(sd.add_concept, concepts))


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


class ContextTerm:
    """Has words leave to other words what they say (the embedding term of CoRe, arXiv 2408.15914).

    A strong word drowns the others of its prompt: asked for a thing "in the snow" the model paints the thing,
    and no snow. So in prompts of many places and styles, for which there need be no pictures, what the text
    encoder puts out for all other words is to keep the direction that it has with the rows at their start.

    Args:
        sd: the model, which knows the words.
        words: those that are learned, at their start.
        weight: `Settings.context_weight`.
    """

    COUNT = 8  # prompts of each word in a step

    @torch.no_grad()
    def __init__(self, sd: StableDiffusion, words: Sequence[Word], weight: float) -> None:
        self.sd, self.weight, tokenizer = sd, weight, sd.tokenizer
        ids = [tokenizer([t.replace("{}", word.placeholder) for t in CONTEXT]) for word in words]
        self.ids = torch.stack(ids)  # (words, templates, L)
        length = int((self.ids != tokenizer.pad_id).any(dim=1).any(dim=0).sum())
        self.ids = self.ids[..., : length + 1].to(sd.device)
        known = len(sd.tables[0].weight)  # ids from here on are learned words
        special = torch.tensor([tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id], device=sd.device)
        self.other = (self.ids < known) & ~torch.isin(self.ids, special)
        self.start = torch.stack([self._context(ids) for ids in self.ids])  # (words, templates, L, D)

    def __call__(self, step: int) -> Tensor:
        """The weight times the mean of 1 - cosine over the other words of a step's prompts, summed."""
        which = [(step * self.COUNT + i) % len(CONTEXT) for i in range(self.COUNT)]
        now = self._context(self.ids[:, which].flatten(0, 1)).unflatten(0, (-1, self.COUNT))
        drift = 1 - F.cosine_similarity(now, self.start[:, which], dim=-1)  # (words, COUNT, L)
        other = self.other[:, which]
        return self.weight * ((drift * other).sum((1, 2)) / other.sum((1, 2))).sum()

    def _context(self, ids: Tensor) -> Tensor:
        return self.sd.text_encoder(ids).context.float()


class Constraints:
    """What pulls the rows towards their start, and what is done to them after every update.

    With `Settings.average` the mean of the rows after each of the last steps replaces them after the very
    last one (Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging").

    Args:
        sd: the model, which knows the words.
        words: those that are learned.
        optimizer: of all rows.
        rows: those of each word.
        settings: how the words are learned.
        vocabulary_norm: the mean length of the vocabulary's vectors.
        progression: tells which vectors wait.

    Attributes:
        starts: where the rows of each word started.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        words: Sequence[Word],
        optimizer: torch.optim.Optimizer,
        rows: Sequence[nn.Parameter],
        settings: Settings,
        vocabulary_norm: float,
        progression: Progression,
    ) -> None:
        self.rows, self.starts = rows, [p.detach().clone() for p in rows]
        self.regularization = settings.regularization
        self.context = ContextTerm(sd, words, settings.context_weight) if settings.context_weight else None
        self.optimizer, self.progression = optimizer, progression
        self.longest = None if settings.max_norm is None else settings.max_norm * vocabulary_norm
        self.steps, self.count = settings.steps, min(settings.average, settings.steps)
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._sums = [torch.zeros_like(p) for p in self._parameters] if settings.average > 1 else []

    def penalties(self, step: int) -> list[Tensor]:
        """What is added to the loss of a step: `Settings.regularization` times the squared distance of each
        word's rows to their start, summed; and the `ContextTerm`."""
        terms = [self.context(step)] if self.context else []
        if self.regularization:
            pairs = zip(self.rows, self.starts, strict=True)
            drift = [(now - start).square().sum(1).mean() for now, start in pairs]
            terms.append((self.regularization * torch.stack(drift)).sum())
        return terms

    @torch.no_grad()
    def apply(self, step: int) -> None:
        """Change the rows in place after a step, the first being 0."""
        if self.longest is not None:
            for p in self._parameters:
                p.renorm_(2, 0, self.longest)  # shortens the rows that are longer
        if self._sums and step >= self.steps - self.count:
            self._average(last=step + 1 == self.steps)
        if self.progression.steps:  # weight decay has moved the vectors that wait
            for now, start in zip(self.rows, self.starts, strict=True):
                waiting = slice(self.progression.num_active(step), None)
                now[waiting] = start[waiting]

    def _average(self, *, last: bool) -> None:
        for p, total in zip(self._parameters, self._sums, strict=True):
            total += p
            if last:
                p.copy_(total / self.count)
        if last and isinstance(self.optimizer, DirectionDescent):
            self.optimizer.normalize()

    def state_dict(self) -> dict[str, Tensor]:
        """The sums of the rows so far."""
        return {f"average.{i}": total for i, total in enumerate(self._sums)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue where `state_dict` was taken. Raises InputError if it does not fit."""
        for i, total in enumerate(self._sums):
            total.copy_(entry(state, f"average.{i}", total))
