"""The loop around `Inversion.step`: what is logged, looked at and saved on the way."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import FrameType

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from ..cli.images import encode_png, image_grid
from ..cli.processes import Processes
from ..cli.progress import Progress
from ..errors import InputError
from ..formats.atomic import write_atomically
from ..formats.concept import Concept, encode_concepts
from ..inversion.batches import Settings
from ..inversion.divergence import Diverged
from ..inversion.inversion import Inversion
from ..model.model_hash import model_hash
from ..model.stable_diffusion import StableDiffusion
from ..version import __version__
from .folder import COLUMNS, Run, log_csv, read_log
from .memory import peak_memory

log = logging.getLogger(__name__)


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
        self, args: argparse.Namespace, sd: StableDiffusion, runs: Sequence[Run], processes: Processes
    ) -> None:
        self.args, self.sd, self.runs, self.processes = args, sd, runs, processes
        self._check(args)
        names = {f.name for f in fields(Settings)}
        values = {key: value for key, value in vars(args).items() if key in names}
        values |= {"betas": (args.beta1, args.beta2), "progressive": tuple(args.progressive)}
        self.inversion = Inversion(
            sd,
            [run.word for run in runs],
            Settings(**values),
            replace=args.replace_word,
            rank=processes.rank,
            world=processes.world,
            compiled=args.compile,
            templates=self._sample_templates,
        )
        self._inits = [run.word.init.to(sd.device) for run in runs]
        self._unread: list[tuple[list[float], Tensor]] = []  # of the steps not yet logged; see `_measure`
        self.state_path = Path(args.out) / "state.safetensors"
        self._model = model_hash(sd.text_encoder, sd.unet, sd.vae)
        self._dtype = str(sd.dtype).removeprefix("torch.")
        model = torch.tensor(list(self._model.encode()), dtype=torch.uint8)
        # What a run depends on beside its settings. Weights are not the same numbers in another dtype.
        self._given = {
            "world": (torch.tensor(processes.world), ""),
            f"model.{self._dtype}": (model, f"another checkpoint in {args.checkpoint}"),
        }
        for i, run in enumerate(runs):
            what = f"other photos, captions or templates of {run.placeholder!r}"
            self._given[f"photos.{i}"] = run.photos_hash, what
        sd.vae.to("cpu")  # the photos are encoded; only previews need it again

    def _check(self, args: argparse.Namespace) -> None:
        """Complain about what would otherwise come to light hours later. Raises InputError."""
        for template in args.sample_prompt:
            if "{}" not in template:
                raise InputError(f"--sample-prompt {template!r}: needs {{}} where the word goes")
        try:
            self.sd.schedule.timesteps(args.sample_steps)
        except InputError as error:
            raise InputError(f"--sample-steps: {error}") from None
        if (last := max(args.progressive, default=0)) >= args.steps:
            raise InputError(f"--progressive {last}: should be less than --steps, {args.steps}")
        if not args.eval_every and (args.early_stop is not None or args.keep == "best"):
            raise InputError("--early-stop and --keep best go by evaluations: give --eval-every a number")
        for run in self.runs:
            concept = Concept(run.placeholder, run.word.init, widths=self.sd.widths)
            encode_concepts(run.folder / "learned_embeds.safetensors", [concept])

    def resume(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved state.

        Raises:
            InputError: not all that the run began with is as it was; or its log is damaged.
        """
        for key, (now, what) in self._given.items():
            if not torch.equal(was := state.get(key, now), now):
                what = what or f"{was} processes, not {now}"
                remedy = "go on as it began, or start again with --overwrite"
                raise InputError(f"{self.state_path}: the run began with {what}; {remedy}")
        self.inversion.load_state_dict(state)
        for i, run in enumerate(self.runs):
            run.final = state.get(f"final.{i}")
            steps = int(state[f"final_step.{i}"]) if run.final is not None else self.inversion.step_count
            run.rows = read_log(run.folder / "log.csv", steps)
            if f"best.{i}" in state:
                run.best, run.best_loss = state[f"best.{i}"], state[f"best_loss.{i}"].item()
                run.best_step = int(state[f"best_step.{i}"])
        log.info("resumed after step %d", self.inversion.step_count)

    def train(self, stop: Stop) -> bool:
        """Take all steps that are left. False if it was asked to stop before.

        A word that has converged stays as it is, as if it had been learned alone, until all have.

        Raises:
            Diverged: the loss is not finite; the vectors of the last good step are saved.
        """
        args, steps = self.args, self.args.steps
        progress = Progress(steps, "step", self.inversion.step_count) if self.processes.rank == 0 else None
        # A GPU is not kept waiting for its own results: they are read some steps later, together.
        patience = 1 if self.sd.device.type == "cpu" else 20

        def due(every: int) -> bool:
            done = self.inversion.step_count
            return bool(every) and (done % every == 0 or done == steps)

        learning = [run for run in self.runs if run.final is None]
        try:
            while learning and self.inversion.step_count < steps:
                if not self._unread:
                    self._since = time.monotonic()
                self._unread.append(self._measure(self.inversion.step(check=False)))
                asked = stop.anywhere(self.processes.world)
                evaluate, preview, save = map(due, (args.eval_every, args.sample_every, args.save_every))
                if len(self._unread) >= patience or evaluate or preview or save or asked:
                    self._read()
                if evaluate:
                    self._evaluate()
                if progress:
                    progress.step(self._note())
                converged = [run for run in learning if run.final is not None]
                if preview or (converged and args.sample_every):
                    self._preview(learning if preview else converged)
                if save or asked:
                    self.save()
                if asked:
                    return False
                learning = [run for run in learning if run.final is None]
        except Diverged:
            self.save(resumable=False)
            raise
        finally:
            if progress:
                progress.close()
        self.save()
        return True

    def _note(self) -> str:
        rows = [run.rows[-1] for run in self.runs if run.rows]
        latest = [run.evaluations[-1] for run in self.runs if run.evaluations]
        loss = f"loss {np.mean([row['loss'] for row in rows]):.4f}" if rows else ""
        loss += f", eval loss {np.mean(latest):.4f}" if latest else ""
        return f"{loss}, {peak_memory(self.sd.device) / 1e6:.0f} MB"

    def _evaluate(self) -> None:
        values = self.inversion.evaluate().cpu()
        if self.processes.world > 1:
            dist.broadcast(values, 0)
        for i, (run, value) in enumerate(zip(self.runs, values.tolist(), strict=True)):
            if run.final is not None:
                continue
            run.rows[-1]["eval_loss"] = value
            if value < run.best_loss:
                run.best, run.best_loss = self._vectors(i), value
                run.best_step = self.inversion.step_count
            if run.has_converged(self.args):
                run.final = self._vectors(i)

    def _vectors(self, index: int) -> Tensor:
        """A word as it is, or as it was when it converged, (n, D) float32 on the CPU."""
        final = self.runs[index].final
        return self.inversion.concept(index).vectors if final is None else final

    @torch.no_grad()
    def _measure(self, losses: Tensor) -> tuple[list[float], Tensor]:
        """Of each word after a step: the learning rate; and, still on the device, loss, norm and cosine."""
        words = [self.inversion.active_vectors(i) for i in range(len(self.runs))]
        norms = [rows.norm(dim=1).mean() / self.inversion.vocabulary_norm for rows in words]
        cosines = [
            F.cosine_similarity(rows, init[: len(rows)]).mean()
            for rows, init in zip(words, self._inits, strict=True)
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
            if run.final is not None:
                continue
            for step, (lr, row) in enumerate(zip(rates, values, strict=True), first):
                numbers = (step, row[i][0], None, lr[i], row[i][1], row[i][2], seconds)
                run.rows.append(dict(zip(COLUMNS, numbers, strict=True)))
        self._unread.clear()

    def _preview(self, runs: Sequence[Run]) -> None:
        """What words look like now, each in its prompts, always with the same seeds."""
        if self.processes.rank:
            return
        self.sd.vae.to(self.sd.device)
        for run in runs:
            prompts = [template.replace("{}", run.word.placeholder) for template in self._sample_templates]
            images = self.sd.sample(prompts, steps=self.args.sample_steps, num_images=4, size=self.args.size)
            path = run.folder / "samples" / f"step-{self.inversion.step_count:06d}.png"
            prompts = [template.replace("{}", run.placeholder) for template in self._sample_templates]
            write_atomically(path, encode_png(image_grid(images, 4), {"prompts": json.dumps(prompts)}))
        self.sd.vae.to("cpu")

    @property
    def _sample_templates(self) -> list[str]:
        return self.args.sample_prompt or ["a photo of {}"]

    def save(self, *, resumable: bool = True) -> None:
        """Write words, logs and, last, the state from which `resume` continues."""
        if self.processes.rank:
            return
        state = self.inversion.state_dict() | {key: value for key, (value, _) in self._given.items()}
        for i, run in enumerate(self.runs):
            step = self.inversion.step_count if run.final is None else len(run.rows)
            metadata = {
                "base_model": str(self.args.checkpoint),
                "base_model_hash": self._model,  # of the weights as they were loaded, hence the dtype
                "dtype": self._dtype,
                "init_word": run.init_word,
                "step": str(step),
                "seed": str(run.word.seed),
                "minti": __version__,
            }
            state[f"init.{i}"] = run.word.init
            if run.final is not None:
                state |= {f"final.{i}": run.final, f"final_step.{i}": torch.tensor(step)}
            concept = Concept(run.placeholder, self._vectors(i), metadata, self.sd.widths)
            concept.save(run.folder / "embeds" / f"step-{step:06d}.safetensors")
            if run.best is not None:
                state[f"best.{i}"] = run.best
                state[f"best_loss.{i}"] = torch.tensor(run.best_loss, dtype=torch.float64)
                state[f"best_step.{i}"] = torch.tensor(run.best_step)
                if self.args.keep == "best":
                    metadata |= {"step": str(run.best_step)}
                    concept = Concept(run.placeholder, run.best, metadata, self.sd.widths)
            concept.save(run.folder / "learned_embeds.safetensors")
            write_atomically(run.folder / "log.csv", log_csv(run.rows))
        if resumable:
            write_atomically(self.state_path, save({key: value.contiguous() for key, value in state.items()}))

    def nearest_words(self, index: int, count: int = 8) -> list[list[tuple[str, float]]]:
        """For each vector of a word the words of the vocabulary that point the same way, with cosines."""
        table = self.sd.vocabulary.float()
        names = {i: symbol for symbol, i in self.sd.tokenizer.vocab.items()}
        rows = self._vectors(index).to(table.device)
        cosines = F.normalize(rows, dim=1) @ F.normalize(table, dim=1).T  # (num_vectors, vocab_size)
        best = cosines.topk(min(count, len(table)), dim=1)
        return [
            [(names.get(i, str(i)), c) for i, c in zip(ids, values, strict=True)]
            for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
