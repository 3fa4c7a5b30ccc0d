"""The loop around `Inversion.step`: what is logged, previewed and saved on the way."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from ..cli.processes import Processes
from ..cli.progress import Progress, peak_memory
from ..errors import InputError
from ..formats.atomic import write_atomically
from ..formats.concept import Concept, encode_concepts
from ..inversion.batches import Settings
from ..inversion.divergence import Diverged
from ..inversion.inversion import Inversion
from ..model.model_hash import model_hash
from ..model.stable_diffusion import StableDiffusion
from ..version import __version__
from .folder import COLUMNS, STATE
from .previews import Previews
from .report import nearest_words, write_report
from .run_word import RunWord, Watching, check_watching
from .stop import Stop
from .tensorboard import open_boards

log = logging.getLogger(__name__)


class Trainer:
    """The loop around `Inversion.step`: logs, evaluations, previews, and savings that can be resumed.

    Args:
        sd: the model.
        words: what is to be learned.
        settings: how it is learned.
        watching: how often it is looked at and saved.
        processes: this process and the others.
        out: the folder of the run.
        checkpoint: the path of the model, for messages and for those who read the files.
        size: pixels of the previews; by default what the model was trained on.
        replace, compiled: see `Inversion`.
        learner: makes the `Inversion`, for another objective.

    Raises:
        InputError: options do not go together, which is noticed here rather than hours later.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        words: Sequence[RunWord],
        settings: Settings,
        watching: Watching,
        processes: Processes,
        *,
        out: Path,
        checkpoint: str,
        size: int | None = None,
        replace: bool = False,
        compiled: bool = False,
        learner: Callable[..., Inversion] = Inversion,
    ) -> None:
        self.sd, self.words, self.settings, self.watching = sd, words, settings, watching
        self.processes, self.checkpoint, self.size = processes, checkpoint, size
        self.out, self.state_path = out, out / STATE
        check_watching(watching, settings.steps, settings.progressive)
        try:
            sd.schedule.timesteps(watching.sample_steps)
        except InputError as error:
            raise InputError(f"--sample-steps: {error}") from None
        for word in words:  # can the word be saved?
            concept = Concept(word.placeholder, word.word.init, widths=sd.widths)
            encode_concepts(word.folder / "learned_embeds.safetensors", [concept])
        self.inversion = learner(
            sd,
            [word.word for word in words],
            settings,
            replace=replace,
            rank=processes.rank,
            world=processes.world,
            compiled=compiled,
            templates=watching.prompts,
        )
        self._inits = [word.word.init.to(sd.device) for word in words]
        self._pending: list[tuple[list[float], Tensor]] = []  # steps that are not logged yet; see `_measure`
        # With guidance the UNet sees every picture twice; without gradients that takes less memory than a
        # step of training with the same batch.
        how = {"batch_size": settings.batch_size * len(words), "steps": watching.sample_steps, "size": size}
        self._previews = Previews(sd, bool(watching.sample_every) and processes.rank == 0, **how)
        self._boards = open_boards(out, words) if watching.tensorboard and processes.rank == 0 else []
        dtype, model = str(sd.dtype).removeprefix("torch."), model_hash(sd.text_encoder, sd.unet, sd.vae)
        self._metadata = {
            "base_model": checkpoint,
            "base_model_hash": model,  # of the weights as they were loaded, hence the dtype
            "dtype": dtype,
            "minti": __version__,
        }
        # What a run depends on beside its settings, and what to say of it if it has changed on resume.
        hashed = torch.tensor(list(model.encode()), dtype=torch.uint8)
        self._resume_checks = {
            "world": (torch.tensor(processes.world), ""),
            f"model_hash.{dtype}": (hashed, f"another checkpoint in {checkpoint}"),
        }
        for i, word in enumerate(words):
            what = f"other photos, captions or templates of {word.placeholder!r}"
            self._resume_checks[f"photos.{i}"] = word.photos_hash, what
        sd.vae.to("cpu")  # The photos are encoded; only previews need it again.

    def resume(self, state: dict[str, Tensor]) -> None:
        """Continue from a saved state.

        Raises:
            InputError: what the run began with has changed; or the state or the log is damaged.
        """
        for key, (now, what) in self._resume_checks.items():
            was = state.get(key)
            if was is None:
                log.info("%s: was saved without %s, so that is not compared", self.state_path, key)
            elif not torch.equal(was, now):
                what = what or f"{was.tolist()} processes, not {now}"
                remedy = "continue as it began, or start again with --overwrite"
                raise InputError(f"{self.state_path}: the run began with {what}; {remedy}")
        try:
            self.inversion.load_state_dict(state)
        except InputError as error:
            raise InputError(f"{self.state_path}: {error}; remove it to start again") from None
        try:
            for i, word in enumerate(self.words):
                own = {key.removesuffix(f".{i}"): value for key, value in state.items()}
                word.load_state_dict(own, self.inversion.step_count)
        except (KeyError, RuntimeError) as error:
            raise InputError(f"{self.state_path}: is damaged ({error}); remove it to start again") from None
        log.info("resumed after step %d", self.inversion.step_count)

    def train(self, stop: Stop) -> bool:
        """Take all steps that are left. False if it was asked to stop before.

        A word that has converged stays as it is, as if it had been learned alone, until all have converged.

        Raises:
            Diverged: the loss is not finite; the vectors of the last good step are saved.
        """
        watching, steps, first = self.watching, self.settings.steps, self.inversion.step_count
        progress = Progress(steps, "step", first, estimate_after=5) if self.processes.rank == 0 else None
        # A GPU is not kept waiting for its own results: they are read some steps later, together.
        read_every = 1 if self.sd.device.type == "cpu" else 20

        def due(every: int) -> bool:
            done = self.inversion.step_count
            return bool(every) and (done % every == 0 or done == steps)

        learning = [word for word in self.words if word.final is None]
        if not first and watching.eval_every:  # most is learned before the next evaluation
            self._evaluate()
        if first and due(watching.sample_every):  # the run may have been killed after it had saved
            self._preview(learning)
        try:
            while learning and self.inversion.step_count < steps:
                if not self._pending:
                    self._timer = time.monotonic()
                self._pending.append(self._measure(self.inversion.step(check=False)))
                if self.inversion.step_count == first + 1:
                    log.info("memory after one step: %.0f MB", peak_memory(self.sd.device) / 1e6)
                asked = stop.anywhere(self.processes.world)
                everies = (watching.eval_every, watching.sample_every, watching.save_every)
                evaluate, preview, save = map(due, everies)
                if len(self._pending) >= read_every or evaluate or preview or save or asked:
                    self._log()
                if evaluate:
                    self._evaluate()
                if progress:
                    progress.step(self._note())
                converged = [word for word in learning if word.final is not None]
                if save or asked:  # before the previews, which may fail
                    self.save()
                if preview or converged:
                    self._preview(learning if preview else converged)
                if asked:
                    return False
                learning = [word for word in learning if word.final is None]
        except Diverged:
            self.save(resumable=False)
            raise
        finally:
            if progress:
                progress.close()
        self.save()
        return True

    def _note(self) -> str:
        rows = [word.rows[-1] for word in self.words if word.rows]
        latest = [word.evaluations[-1] for word in self.words if word.evaluations]
        loss = f"loss {np.mean([row['loss'] for row in rows]):.4f}" if rows else ""
        loss += f", eval loss {np.mean(latest):.4f}" if latest else ""
        return f"{loss}, {peak_memory(self.sd.device) / 1e6:.0f} MB"

    def _evaluate(self) -> None:
        values = self.inversion.evaluate().cpu()
        if self.processes.world > 1:
            dist.broadcast(values, 0)
        last_vector = max(self.settings.progressive, default=0)
        for i, (word, value) in enumerate(zip(self.words, values.tolist(), strict=True)):
            word.evaluated(value, self._vectors(i), self.watching, last_vector)

    def _vectors(self, index: int) -> Tensor:
        """The vectors of a word, or those it had when it converged, (n, D) float32 on the CPU."""
        final = self.words[index].final
        return self.inversion.concept(index).vectors if final is None else final

    @torch.no_grad()
    def _measure(self, losses: Tensor) -> tuple[list[float], Tensor]:
        """The learning rate of each word at a step; and, still on the device, its loss, norm and cosine."""
        words = [self.inversion.active_vectors(i) for i in range(len(self.words))]
        norms = [rows.norm(dim=1).mean() / self.inversion.vocabulary_norm for rows in words]
        cosines = [
            F.cosine_similarity(rows, init[: len(rows)]).mean()
            for rows, init in zip(words, self._inits, strict=True)
        ]
        rates = [group["lr"] for group in self.inversion.optimizer.param_groups]
        return rates, torch.stack([losses, torch.stack(norms), torch.stack(cosines)], dim=1)  # (words, 3)

    def _log(self) -> None:
        """Wait for the steps since the last time, and log them."""
        self.inversion.check()
        rates, values = zip(*self._pending, strict=True)
        values = torch.stack(values).tolist()  # (steps, words, 3)
        seconds = (time.monotonic() - self._timer) / len(values)
        first = self.inversion.step_count - len(values) + 1
        for i, word in enumerate(self.words):
            if word.final is not None:
                continue
            for step, (lr, row) in enumerate(zip(rates, values, strict=True), first):
                numbers = (step, row[i][0], None, lr[i], row[i][1], row[i][2], seconds)
                word.rows.append(dict(zip(COLUMNS, numbers, strict=True)))
        self._pending.clear()

    def _preview(self, words: Sequence[RunWord]) -> None:
        """Make pictures of words in each of the prompts."""
        for word in words:
            names = (word.word.placeholder, word.placeholder)
            prompts, shown = ([text.replace("{}", name) for text in self.watching.prompts] for name in names)
            self._previews.make(word.folder, self.inversion.step_count, prompts, shown)
        self.sd.vae.to("cpu")

    def save(self, *, resumable: bool = True) -> None:
        """Write words, logs and, last, the state from which `resume` continues; then the reports."""
        if self.processes.rank:
            return
        state = self.inversion.state_dict() | {key: value for key, (value, _) in self._resume_checks.items()}
        for i, word in enumerate(self.words):
            step = self.inversion.step_count if word.final is None else len(word.rows)
            own = {"init_word": word.init_word, "step": str(step), "seed": str(word.word.seed)}
            concept = Concept(word.placeholder, self._vectors(i), self._metadata | own, self.sd.widths)
            word.save(concept, self.watching.keep)
            state |= {f"{key}.{i}": value for key, value in word.state_dict().items()}
        if resumable:
            write_atomically(self.state_path, save({key: value.contiguous() for key, value in state.items()}))
        self.write_reports()

    def write_reports(self) -> None:
        """Write `report.html` and the log of TensorBoard. A report that fails is one warning."""
        for i, word in enumerate(self.words):
            try:
                write_report(word.folder, nearest_words(self.sd, self._vectors(i)))
            except (OSError, MemoryError) as error:
                log.warning("%s: no report.html (%s)", word.folder, error)
        for board, word in zip(self._boards, self.words, strict=bool(self._boards)):
            board.write(word.logged)
