"""The method of `learn.py` as it is used: several words in one batch, half precision, several processes.

The rows of the words are the only parameters, and nothing else changes. So one batch may serve words that
know nothing of each other: each has its own samples, its own loss and its own rows, and learns as if it were
alone, but for rounding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..formats.concept import Concept
from ..model.stable_diffusion import StableDiffusion
from . import state as saved
from .batches import Batch, Settings, Word, sample_batch
from .divergence import Diverged, DivergenceWatch
from .extensions import Constraints, Progression
from .new_words import add_words
from .optimizers import make_optimizer, vocabulary_norm
from .shares import Share, loss_function, loss_inputs


class Inversion:
    """Words in the course of being learned.

    Args:
        sd: the model; the words are added to its tokenizer and text encoder.
        words: one or several.
        settings: how they are learned.
        replace: allow placeholders that mean something already.
        rank, world: which of how many processes this is; each handles its share of every batch.
        compiled: turn the loss into one compiled graph at the first step, which takes a while.
        templates: further prompts that the words have to fit into, such as those of previews.

    Attributes:
        rows: (num_vectors, D) float32 parameters of each word.
        photo_rows: for each word the rows of the words for its single photos, see `Settings.per_image`.
        step_count: how many steps were taken.
        vocabulary_norm: the mean length of the vocabulary's vectors.

    Raises:
        InputError: see `add_words`; the model knows none of the words then.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        words: Sequence[Word],
        settings: Settings,
        *,
        replace: bool = False,
        rank: int = 0,
        world: int = 1,
        compiled: bool = False,
        templates: Sequence[str] = (),
    ) -> None:
        self.sd, self.words, self.settings = sd, list(words), settings
        self.step_count, self.share = 0, Share(settings.batch_size, settings.accumulate, rank, world)
        self.vocabulary_norm = vocabulary_norm(sd)
        self.rows, self.photo_rows = add_words(sd, self.words, settings, replace=replace, templates=templates)
        self._progression = Progression(sd.tokenizer, self.words, settings.progressive)
        self._progression.update_tokenizer(0)
        groups = [
            {"params": [rows, *photo_rows], "lr": word.lr}
            for word, rows, photo_rows in zip(self.words, self.rows, self.photo_rows, strict=True)
        ]
        self._parameters = [p.requires_grad_(True) for group in groups for p in group["params"]]
        self.optimizer = make_optimizer(sd, groups, settings)
        how = settings, self.vocabulary_norm, self._progression
        self._constraints = Constraints(sd, self.words, self.optimizer, self.rows, *how)
        # float16 has so small a range that gradients vanish unless the loss is scaled up (arXiv 1710.03740).
        self.scaler = torch.amp.GradScaler(sd.device.type, enabled=sd.dtype == torch.float16)
        self._watch = DivergenceWatch(self._parameters, self.rows)
        self._loss = loss_function(sd, self.words[0].latents.mean[:1], compiled)

    def step(self, *, check: bool | None = None) -> Tensor:
        """Take one step. Returns the loss of each word before it, (words,) float32.

        Args:
            check: whether to wait for the result and `check` it at once; by default on the CPU only, since a
                GPU that is waited for stands idle afterwards. Whoever passes False has to call `check` later.

        Raises:
            Diverged: see `check`.
        """
        self.optimizer.zero_grad(set_to_none=False)
        losses = torch.zeros(len(self.words), device=self.sd.device)
        for batches in self.share.parts(self._draw(self.share.count, self.step_count)):
            loss = self._losses(batches) / self.share.count
            self.scaler.scale(loss.sum()).backward()
            losses += loss.detach()
        for penalty in self._constraints.penalties(self.step_count) if self.share.rank == 0 else ():
            self.scaler.scale(penalty).backward()
        self.share.add_up([losses, *(p.grad for p in self._parameters)])
        self._watch.check_gradients(losses, self.scaler)
        self._update()
        self._constraints.apply(self.step_count)
        self._watch.end_step()
        self.step_count += 1
        self._progression.update_tokenizer(self.step_count)
        if check or (check is None and self.sd.device.type == "cpu"):
            self.check()
        return losses

    def _draw(self, count: int, *key: object) -> list[Batch]:
        """For each word, `count` samples that the key decides."""
        T = self.sd.schedule.config.num_train_timesteps
        return [sample_batch(word, self.settings, T, count, *key) for word in self.words]

    def _losses(self, batches: Sequence[Batch]) -> Tensor:
        """The sum of the losses of each word's samples, (words,)."""
        losses = self._loss(*loss_inputs(self.sd, self.words, batches))
        return losses.view(len(self.words), -1).sum(1)  # (words*B,) -> (words,)

    def _update(self) -> None:
        for group, word in zip(self.optimizer.param_groups, self.words, strict=True):
            group["lr"] = word.lr * self.settings.lr_factor(self.step_count)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def active_vectors(self, index: int) -> Tensor:
        """The vectors of a word that prompts use at this step, (n, D) float32."""
        return self.rows[index][: self._progression.num_active(self.step_count)]

    def check(self) -> None:
        """See that all went well in the steps so far.

        Raises:
            Diverged: a loss was not finite; the rows are the last ones for which it was.
        """
        if not self._watch.healthy():
            self.step_count = int(self._watch.good_steps)
            names = [word.placeholder for word in self.words]
            cause = self._watch.cause(names, self.vocabulary_norm, self.sd.dtype)
            raise Diverged(f"step {self.step_count + 1}: the loss is not finite; probably {cause}")

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        """The loss of each word on samples that are always the same, (words,) float32.

        The loss of a training step says little, since it depends mostly on which time steps and noise were
        drawn. With these fixed, it shows how the word gets better (DVAR, arXiv 2302.04841).
        """
        n, size, sums = 4 * self.settings.batch_size, self.settings.eval_size, 0  # no activations kept
        drawn = self._draw(size, "evaluation", self.settings.eval_seed)
        for first in range(0, size, n):
            sums = sums + self._losses([batch[first : first + n] for batch in drawn])
        self._watch.check_finite([sums])
        self.check()
        return sums / size

    def concept(self, index: int, metadata: dict[str, str] | None = None) -> Concept:
        """A word as it is now, with its active vectors."""
        rows = self.active_vectors(index).detach().cpu().clone()
        return Concept(self.words[index].placeholder, rows, metadata or {}, self.sd.widths)

    def freeze(self) -> None:
        """End learning: the words stay in the model, and later gradients pass them by."""
        for p in self._parameters:
            p.requires_grad_(False)

    def state_dict(self) -> dict[str, Tensor]:
        """All that changes in the course of learning."""
        return saved.pack(self.step_count, self.optimizer, self.scaler) | self._constraints.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue where `state_dict` was taken. Raises InputError if it does not fit."""
        self.step_count = saved.unpack(state, self.optimizer, self.scaler)
        self._constraints.load_state_dict(state)
        self._watch.good_steps.fill_(self.step_count)
        self._progression.update_tokenizer(self.step_count)
