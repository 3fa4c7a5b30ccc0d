"""One word of a run: how it has done so far, when it has converged, and the files it is kept in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..formats.atomic import write_atomically
from ..formats.concept import Concept
from ..inversion.batches import Word
from .folder import COLUMNS, log_csv, read_log


@dataclass(frozen=True)
class Watching:
    """When the words of a run are evaluated, previewed and saved, and when their learning ends early.

    Attributes:
        save_every, eval_every, sample_every: steps between savings, evaluations and previews; 0: none.
        sample_prompt: prompts of the previews, with {} for the word.
        sample_steps: DDIM steps of the previews.
        keep: "last" or "best": which vectors are the result, the last ones or those of the lowest eval loss.
        early_stop: see `RunWord.has_converged`; None: never.
        early_stop_window: evaluations over which the variance is taken.
        tensorboard: also log for TensorBoard.
    """

    save_every: int = 500
    eval_every: int = 100
    sample_every: int = 500
    sample_prompt: Sequence[str] = ()
    sample_steps: int = 25
    keep: str = "last"
    early_stop: float | None = None
    early_stop_window: int = 10
    tensorboard: bool = False

    @property
    def prompts(self) -> Sequence[str]:
        """The prompts of the previews."""
        return self.sample_prompt or ["a photo of {}"]


@dataclass
class RunWord:
    """A word of a run.

    Attributes:
        word: what it is learned from; its placeholder may be an alias.
        placeholder: the word as it is saved.
        folder: where it is saved.
        init_word: what it started from, in words.
        photos_hash: of the photos as trained and of the prompts, (32,) uint8.
        rows: those of log.csv, one for each step.
        best, best_loss, best_step: the vectors at the lowest eval loss, (n, D), that loss and its step.
        final: the vectors when they had converged, (n, D); from then on the word is no longer learned.
        start: the row of log.csv before the first step, with its eval loss; None if that was not evaluated.
    """

    word: Word
    placeholder: str
    folder: Path
    init_word: str
    photos_hash: Tensor
    rows: list[dict[str, float | None]] = field(default_factory=list)
    best: Tensor | None = None
    best_loss: float = float("inf")
    best_step: int = 0
    final: Tensor | None = None
    start: dict[str, float | None] | None = None

    @property
    def logged(self) -> list[dict[str, float | None]]:
        """All rows of log.csv."""
        return [*([] if self.start is None else [self.start]), *self.rows]

    @property
    def evaluations(self) -> list[float]:
        """The eval losses after steps."""
        return [row["eval_loss"] for row in self.rows if row["eval_loss"] is not None]

    def evaluated(self, loss: float, vectors: Tensor, watching: Watching, last_vector: int = 0) -> None:
        """Take note of an evaluation after the step of the last row, or before the first step.

        A word that has converged is not evaluated any more.

        Args:
            loss: the eval loss.
            vectors: the vectors that have it, (n, D).
            last_vector: the step at which the last vector joined in.
        """
        if not self.rows:
            self.start = dict.fromkeys(COLUMNS) | {"step": 0, "eval_loss": loss, "cosine": 1.0}
            return
        if self.final is not None:
            return
        self.rows[-1]["eval_loss"] = loss
        if loss < self.best_loss:
            self.best, self.best_loss, self.best_step = vectors, loss, self.rows[-1]["step"]
        if len(self.rows) > last_vector and self.has_converged(watching):
            self.final = vectors.clone()  # tensors of a file must not share memory

    def has_converged(self, watching: Watching) -> bool:
        """Whether the eval loss varies much less than at first: the rule of DVAR (arXiv 2302.04841)."""
        window, losses = watching.early_stop_window, self.evaluations
        if watching.early_stop is None or len(losses) < 2 * window:
            return False
        return bool(np.var(losses[-window:]) < watching.early_stop * np.var(losses[:window]))

    def save(self, concept: Concept, keep: str) -> None:
        """Write the word at the step that its metadata name, the result as `keep` has it, and the log."""
        concept.save(self.folder / "embeds" / f"step-{int(concept.metadata['step']):06d}.safetensors")
        if keep == "best" and self.best is not None:
            metadata = {**concept.metadata, "step": str(self.best_step)}
            concept = replace(concept, vectors=self.best, metadata=metadata)
        concept.save(self.folder / "learned_embeds.safetensors")
        write_atomically(self.folder / "log.csv", log_csv(self.logged))

    def state_dict(self) -> dict[str, Tensor]:
        """What is needed to resume, beside log.csv and the state of the learning itself."""
        state = {"init": self.word.init}
        if self.final is not None:
            state |= {"final": self.final, "final_step": torch.tensor(len(self.rows))}
        if self.best is not None:
            loss = torch.tensor(self.best_loss, dtype=torch.float64)
            state |= {"best": self.best, "best_loss": loss, "best_step": torch.tensor(self.best_step)}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Resume after so many steps.

        Raises:
            InputError: log.csv is damaged, or the vectors are not like those of the word.
            KeyError: the state lacks something.
        """
        self.final = state.get("final")
        rows = read_log(self.folder / "log.csv", steps if self.final is None else int(state["final_step"]))
        self.start = rows.pop(0) if rows and rows[0]["step"] == 0 else None
        self.rows = rows
        if "best" in state:
            self.best, self.best_loss = state["best"], state["best_loss"].item()
            self.best_step = int(state["best_step"])
        for vectors in filter(lambda v: v is not None, (self.final, self.best)):
            if vectors.ndim != 2 or vectors.shape[1:] != self.word.init.shape[1:]:
                raise InputError(f"{self.folder}: the saved state holds vectors of another word; --overwrite")


def check_watching(watching: Watching, steps: int, progressive: Sequence[int]) -> None:
    """Raises InputError if options do not go together, rather than hours later."""
    for template in watching.sample_prompt:
        if "{}" not in template:
            raise InputError(f"--sample-prompt {template!r}: needs {{}} where the word goes")
    if (last := max(progressive, default=0)) >= steps:
        raise InputError(f"--progressive {last}: should be less than --steps, {steps}")
    if not watching.eval_every and (watching.early_stop is not None or watching.keep == "best"):
        raise InputError("--early-stop and --keep best go by evaluations: give --eval-every a number")
