"""The loop around `Inversion.step`: what is logged, looked at and saved on the way."""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import FrameType

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from . import __version__, cli
from .concept import Concept
from .config import InputError
from .draws import Settings, Word
from .files import write_atomically
from .inversion import Diverged, Inversion
from .pipeline import StableDiffusion, image_grid
from .sample import encode_png

log = logging.getLogger(__name__)

COLUMNS = ("step", "loss", "eval_loss", "lr", "norm", "cosine", "seconds")


@dataclass
class Run:
    """One word of a run: where it is kept, and how it has done so far."""

    word: Word
    folder: Path
    init_word: str
    fingerprint: Tensor  # of the photos as trained
    rows: list[dict[str, float | None]] = field(default_factory=list)  # log.csv
    best: Tensor | None = None  # the vectors at the lowest eval loss
    best_loss: float = float("inf")
    best_step: int = 0

    @property
    def evaluations(self) -> list[float]:
        return [row["eval_loss"] for row in self.rows if row["eval_loss"] is not None]


class Stop:
    """Ctrl-C and SIGTERM end a run after its current step, with everything saved; a second Ctrl-C at once."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGINT, self._ask)
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def anywhere(self, world: int) -> bool:
        """Whether any of the processes has been asked."""
        if world == 1:
            return self.asked
        flag = torch.tensor(int(self.asked))
        dist.all_reduce(flag, group=dist.group.WORLD)
        return bool(flag)


class Trainer:
    """The loop around `Inversion.step`: logs, evaluations, previews, and savings that can be continued."""

    def __init__(
        self, args: argparse.Namespace, sd: StableDiffusion, runs: Sequence[Run], rank: int, world: int
    ) -> None:
        self.args, self.sd, self.runs, self.rank, self.world = args, sd, runs, rank, world
        names = {f.name for f in fields(Settings)}
        values = {key: value for key, value in vars(args).items() if key in names}
        values |= {"betas": (args.beta1, args.beta2), "progressive": tuple(args.progressive)}
        self.inversion = Inversion(
            sd,
            [run.word for run in runs],
            Settings(**values),
            replace=args.replace_word,
            rank=rank,
            world=world,
            compiled=args.compile,
        )
        self._inits = [run.word.init.to(sd.device) for run in runs]
        self._unread: list[tuple[list[float], Tensor]] = []  # of the steps not yet logged; see `_measure`
        self.state_path = Path(args.out) / "state.safetensors"
        for template in args.sample_prompt:
            if "{}" not in template:
                raise InputError(f"--sample-prompt {template!r}: needs {{}} where the word goes")
        sd.vae.to("cpu")  # the photos are encoded; only previews need it again
        for run in runs:
            sd.tokenizer(self._sample_prompts(run.word))  # complains now rather than later

    def resume(self) -> None:
        """Go on from `state.safetensors`, if it is there."""
        if not self.state_path.exists():
            return
        try:
            state = load_file(self.state_path)
        except SafetensorError as error:
            raise InputError(f"{self.state_path}: is damaged ({error}); remove it to start again") from None
        for i, run in enumerate(self.runs):
            if not torch.equal(state.get(f"photos.{i}", run.fingerprint), run.fingerprint):
                raise InputError(
                    f"{run.folder}: the photos or captions of {run.word.placeholder!r} are not those the run "
                    "began with; put them back, or start again with --overwrite"
                )
        self.inversion.load_state_dict(state)
        for i, run in enumerate(self.runs):
            run.rows = read_log(run.folder / "log.csv", self.inversion.step_count)
            if f"best.{i}" in state:
                run.best, run.best_loss = state[f"best.{i}"], state[f"best_loss.{i}"].item()
                run.best_step = int(state[f"best_step.{i}"])
        log.info("resumed after step %d", self.inversion.step_count)

    def train(self, stop: Stop) -> bool:
        """Take all steps that are left. False if it was asked to stop before."""
        args, steps = self.args, self.args.steps
        progress = cli.Progress(steps, "step", self.inversion.step_count)
        # A GPU is not kept waiting for its own results: they are read some steps later, together.
        patience = 1 if self.sd.device.type == "cpu" else 20

        def due(every: int) -> bool:
            done = self.inversion.step_count
            return bool(every) and (done % every == 0 or done == steps)

        try:
            while self.inversion.step_count < steps and not self._converged():
                if not self._unread:
                    self._since = time.monotonic()
                self._unread.append(self._measure(self.inversion.step(check=False)))
                asked = stop.anywhere(self.world)
                evaluate, preview, save = map(due, (args.eval_every, args.sample_every, args.save_every))
                if len(self._unread) >= patience or evaluate or preview or save or asked:
                    self._read()
                if evaluate:
                    self._evaluate()
                progress.step(self._note())
                if preview:
                    self._preview()
                if save or asked:
                    self.save()
                if asked:
                    return False
        except Diverged as error:
            self.save(resumable=False)
            raise InputError(f"{error}; the vectors of the last good step are in {args.out}") from None
        finally:
            progress.close()
        self.save()
        return True

    def _note(self) -> str:
        rows = [run.rows[-1] for run in self.runs if run.rows]
        latest = [run.evaluations[-1] for run in self.runs if run.evaluations]
        loss = f"loss {np.mean([row['loss'] for row in rows]):.4f}" if rows else ""
        return loss + (f", eval loss {np.mean(latest):.4f}" if latest else "")

    def _evaluate(self) -> None:
        values = self.inversion.evaluate().cpu()
        if self.world > 1:
            dist.broadcast(values, 0)
        for i, (run, value) in enumerate(zip(self.runs, values.tolist(), strict=True)):
            run.rows[-1]["eval_loss"] = value
            if value < run.best_loss:
                run.best, run.best_loss = self.inversion.concept(i).vectors, value
                run.best_step = self.inversion.step_count

    def _converged(self) -> bool:
        """DVAR's rule (arXiv 2302.04841): the eval losses of every word vary much less than at first."""
        window = self.args.early_stop_window
        if self.args.early_stop is None or any(len(run.evaluations) < 2 * window for run in self.runs):
            return False
        return all(
            np.var(run.evaluations[-window:]) < self.args.early_stop * np.var(run.evaluations[:window])
            for run in self.runs
        )

    @torch.no_grad()
    def _measure(self, losses: Tensor) -> tuple[list[float], Tensor]:
        """Of each word after a step: the learning rate; and, still on the device, loss, norm and cosine."""
        norms = [rows.norm(dim=1).mean() / self.inversion.vocabulary_norm for rows in self.inversion.rows]
        cosines = [
            F.cosine_similarity(rows, init).mean()
            for rows, init in zip(self.inversion.rows, self._inits, strict=True)
        ]
        rates = [group["lr"] for group in self.inversion.optimizer.param_groups]
        return rates, torch.stack([losses, torch.stack(norms), torch.stack(cosines)], dim=1)  # (words, 3)

    def _read(self) -> None:
        """Wait for the steps since the last time, and log them."""
        self.inversion.check()
        rates, values = zip(*self._unread, strict=True)
        values = torch.stack(values).tolist()  # (steps, words, 3)
        seconds = (time.monotonic() - self._since) / len(values)
        first = self.inversion.step_count - len(values) + 1
        for i, run in enumerate(self.runs):
            for step, (lr, row) in enumerate(zip(rates, values, strict=True), first):
                numbers = (step, row[i][0], None, lr[i], row[i][1], row[i][2], seconds)
                run.rows.append(dict(zip(COLUMNS, numbers, strict=True)))
        self._unread.clear()

    def _preview(self) -> None:
        """What the words look like now, each in its prompts, always with the same seeds."""
        if self.rank:
            return
        self.sd.vae.to(self.sd.device)
        for run in self.runs:
            prompts = self._sample_prompts(run.word)
            images = self.sd.sample(prompts, steps=self.args.sample_steps, num_images=4, size=self.args.size)
            path = run.folder / "samples" / f"step-{self.inversion.step_count:06d}.png"
            write_atomically(path, encode_png(image_grid(images, 4), {"prompts": json.dumps(prompts)}))
        self.sd.vae.to("cpu")

    def _sample_prompts(self, word: Word) -> list[str]:
        templates = self.args.sample_prompt or ["a photo of {}"]
        return [template.replace("{}", word.placeholder) for template in templates]

    def save(self, *, resumable: bool = True) -> None:
        """Write words, logs and, last, the state from which `resume` continues."""
        if self.rank:
            return
        state = self.inversion.state_dict()
        for i, run in enumerate(self.runs):
            metadata = {
                "base_model": str(self.args.checkpoint),
                "init_word": run.init_word,
                "step": str(self.inversion.step_count),
                "seed": str(run.word.seed),
                "minti": __version__,
            }
            state[f"photos.{i}"] = run.fingerprint
            concept = self.inversion.concept(i, metadata)
            concept.save(run.folder / "embeds" / f"step-{self.inversion.step_count:06d}.safetensors")
            if run.best is not None:
                state[f"best.{i}"] = run.best
                state[f"best_loss.{i}"] = torch.tensor(run.best_loss, dtype=torch.float64)
                state[f"best_step.{i}"] = torch.tensor(run.best_step)
                if self.args.keep == "best":
                    concept = Concept(concept.placeholder, run.best, metadata | {"step": str(run.best_step)})
            concept.save(run.folder / "learned_embeds.safetensors")
            write_atomically(run.folder / "log.csv", log_csv(run.rows))
        if resumable:
            write_atomically(self.state_path, save({key: value.contiguous() for key, value in state.items()}))

    def nearest_words(self, index: int, count: int = 8) -> list[list[tuple[str, float]]]:
        """For each vector of a word the words of the vocabulary that point the same way, with cosines."""
        table = self.sd.text_encoder.token_embedding.table.weight.float()
        names = {i: symbol for symbol, i in self.sd.tokenizer.vocab.items()}
        rows = self.inversion.rows[index].detach()
        cosines = F.normalize(rows, dim=1) @ F.normalize(table, dim=1).T  # (num_vectors, vocab_size)
        best = cosines.topk(min(count, len(table)), dim=1)
        return [
            [(names.get(i, str(i)), c) for i, c in zip(ids, values, strict=True)]
            for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


def read_log(path: Path, steps: int) -> list[dict[str, float | None]]:
    """The rows of the first `steps` steps in a log.csv. Raises InputError unless they are all there."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(file)]
        rows = [row | {"step": int(row["step"])} for row in rows[:steps]]
    except (ValueError, KeyError, TypeError, csv.Error):
        rows = []
    if [row["step"] for row in rows] != [*range(1, steps + 1)]:
        raise InputError(f"{path}: is damaged; to learn the word again, --overwrite")
    return rows


def log_csv(rows: Sequence[dict[str, float | None]]) -> bytes:
    """Rows as a log.csv."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()
