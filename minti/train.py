"""python -m minti.train: learn words from photos; everything needed to look, stop and go on is on disk."""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import os
import shutil
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
import yaml
from safetensors.torch import load_file, save

from . import __version__, cli
from .concept import Concept
from .config import InputError
from .data import CROPS, contact_sheet, encode_views, load_photos, make_views
from .files import write_atomically
from .inversion import Diverged, Inversion, Settings, Word, initial_rows
from .memory import training_memory
from .pipeline import StableDiffusion, image_grid
from .report import write_report
from .sample import encode_png
from .templates import load_templates

log = logging.getLogger(__name__)

COLUMNS = ("step", "loss", "eval_loss", "lr", "norm", "cosine", "seconds")
PER_WORD = ("name", "images", "placeholder", "init_word", "init", "num_vectors", "templates", "lr", "seed")
MAY_DIFFER = ("out", "resume", "overwrite", "device")  # between a run and its continuation
WRITTEN = (
    "config.yaml",
    "state.safetensors",
    "learned_embeds.safetensors",
    "log.csv",
    "inputs.png",
    "report.html",
)


def options() -> cli.Options:
    """The command line."""
    opts = cli.Options("minti.train", "Learn a word for what a few photos show (Textual Inversion).")
    count, share = cli.number(int, 1), cli.number(float, 0, 1)
    positive = cli.number(float, 0)
    group = "what to learn"
    opts.add(group, "--images", metavar="DIR", help="folder with three to five photos")
    opts.add(group, "--placeholder", metavar="WORD", help="the new word, such as '<toy>'")
    opts.add(group, "--init-word", "", metavar="TEXT", help="coarse description to start from, such as toy")
    kinds = ["word", "output", "random", "file"]
    opts.add(
        group, "--init", "word", choices=kinds, help="how the init word becomes the start; file: it is a path"
    )
    opts.add(group, "--num-vectors", 1, type=cli.number(int, 1, 75), help="vectors the word stands for")
    opts.add(
        group,
        "--templates",
        "object",
        metavar="NAME|FILE",
        help="prompts to learn in: object, style, or a file",
    )
    opts.add(group, "--replace-word", False, help="allow a placeholder that means something already")
    opts.add(group, "--out", metavar="DIR", help="folder for everything the run writes")
    opts.add(group, "--resume", False, help="go on with the run in --out")
    opts.add(group, "--overwrite", False, help="replace the run in --out")
    group = "photos"
    opts.add(
        group, "--size", type=count, metavar="PX", help="side of the squares; by default the model's own"
    )
    opts.add(group, "--crop", "center", choices=CROPS, help="which part of a photo that is not square")
    opts.add(group, "--flip", True, help="also learn from mirror images; not for text or faces")
    group = "learning"
    opts.add(group, "--steps", 3000, type=count, help="updates")
    opts.add(group, "--batch-size", 4, type=count, help="samples of each word at a time")
    opts.add(group, "--accumulate", 1, type=count, help="batches summed up for an update")
    opts.add(group, "--lr", 5e-3, type=positive, help="learning rate of AdamW")
    opts.add(group, "--scale-lr", False, help="multiply lr by batch size, accumulation and processes")
    opts.add(group, "--lr-schedule", "constant", choices=["constant", "cosine"], help="how lr develops")
    opts.add(group, "--warmup", 0, type=cli.number(int, 0), help="steps over which lr rises from zero")
    opts.add(group, "--weight-decay", 0.01, type=positive, help="of AdamW")
    opts.add(group, "--beta1", 0.9, type=share, help="of AdamW")
    opts.add(group, "--beta2", 0.999, type=share, help="of AdamW")
    opts.add(
        group, "--progressive", [], type=count, metavar="STEP", help="step at which one more vector joins in"
    )
    opts.add(
        group, "--regularization", 0.0, type=positive, help="weight of the squared distance to the start"
    )
    opts.add(group, "--max-norm", type=positive, help="longest vector, in mean lengths of the vocabulary")
    opts.add(
        group, "--per-image", 0.0, type=share, help="how often a word for the single photo is in the prompt"
    )
    opts.add(group, "--caption-dropout", 0.0, type=share, help="how often the prompt is the bare word")
    opts.add(group, "--seed", 0, type=cli.number(int, 0, 2**63 - 1), help="of everything random")
    opts.add(group, "--gradient-checkpointing", False, help="less memory, a third more time")
    group = "watching"
    opts.add(group, "--save-every", 500, type=count, help="steps between savings")
    opts.add(group, "--eval-every", 100, type=cli.number(int, 0), help="steps between evaluations; 0: none")
    opts.add(group, "--eval-size", 16, type=count, help="samples in an evaluation")
    opts.add(
        group, "--keep", "last", choices=["last", "best"], help="which vectors to keep: best by eval loss"
    )
    opts.add(
        group,
        "--early-stop",
        type=share,
        help="stop when eval loss varies this much less than at first: 0.15",
    )
    opts.add(
        group, "--early-stop-window", 10, type=cli.number(int, 2), help="evaluations over which it varies"
    )
    opts.add(group, "--sample-every", 500, type=cli.number(int, 0), help="steps between previews; 0: none")
    opts.add(
        group, "--sample-prompt", [], metavar="TEXT", help="prompt of the previews, with {} for the word"
    )
    opts.add(group, "--sample-steps", 25, type=count, help="DDIM steps of the previews")
    opts.add_model()
    opts.file_only("concepts")
    return opts


@dataclass
class Run:
    """One word of a run: where it is kept, and how it has done so far."""

    word: Word
    folder: Path
    init_word: str
    rows: list[dict[str, float | None]] = field(default_factory=list)  # log.csv
    best: torch.Tensor | None = None  # the vectors at the lowest eval loss
    best_loss: float = float("inf")

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


def word_specs(args: argparse.Namespace) -> list[dict[str, object]]:
    """What to learn: the entries of `concepts:` in the config file, or the one word of the flags."""
    common = {key: getattr(args, key) for key in PER_WORD if key != "name"}
    entries = args.concepts if args.concepts is not None else [{"name": ""}]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(
            "concepts: should be a list of entries like {name: toy, images: DIR, placeholder: '<toy>'}"
        )
    specs = []
    for entry in entries:
        if unknown := set(entry) - set(PER_WORD):
            raise InputError(f"concepts: unknown key {min(unknown)!r}; there are {', '.join(PER_WORD)}")
        spec = common | entry
        for key in ("name", "images", "placeholder"):
            if spec.get(key) is None:
                where = "every entry of concepts" if args.concepts else f"--{key}"
                raise InputError(f"{where} must be given" if not args.concepts else f"{where} needs {key!r}")
        specs.append(spec)
    names = [spec["name"] for spec in specs]
    if len(set(names)) < len(names) or any(Path(str(name)).name != str(name) for name in names if name):
        raise InputError("concepts: names must be different, and such that folders can have them")
    return specs


def prepare_out(out: Path, args: argparse.Namespace) -> None:
    """See that nothing is lost: an existing run is only continued as it was, or replaced on demand."""
    saved = out / "config.yaml"
    if args.resume and saved.exists():
        before, now = (yaml.safe_load(text) for text in (saved.read_bytes(), cli.to_yaml(args)))
        for key in sorted({*before, *now} - set(MAY_DIFFER)):
            if before.get(key) != now.get(key):
                change = f"{key} was {before.get(key)!r}, now it is {now.get(key)!r}"
                raise InputError(f"{saved}: {change}; a run can only be resumed as it was")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not args.overwrite:
            raise InputError(f"{out}: exists already; give another --out, or --resume, or --overwrite")
        if not saved.exists():
            raise InputError(f"{out}: holds something that is not a run of minti; give another --out")
        for path in [out, *(p for p in out.iterdir() if (p / "log.csv").exists())]:
            for name in WRITTEN:
                (path / name).unlink(missing_ok=True)
            shutil.rmtree(path / "embeds", ignore_errors=True)
            shutil.rmtree(path / "samples", ignore_errors=True)
    write_atomically(saved, cli.to_yaml(args))


def load_word(
    sd: StableDiffusion, spec: dict[str, object], args: argparse.Namespace, lr_scale: float, out: Path
) -> Run:
    """Photos to latents, the init word to rows."""
    photos = load_photos(spec["images"])
    views = make_views(
        photos, args.size or sd.image_size, crop=args.crop, flip=args.flip, seed=int(spec["seed"])
    )
    folder = out / str(spec["name"])
    if not (folder / "inputs.png").exists():
        write_atomically(folder / "inputs.png", encode_png(contact_sheet(views), {}))
    if not spec["init_word"] and spec["init"] != "random":
        raise InputError("--init-word must be given: a coarse description such as toy (or --init random)")
    word = Word(
        str(spec["placeholder"]),
        initial_rows(sd, spec["init"], str(spec["init_word"]), int(spec["num_vectors"]), int(spec["seed"])),
        encode_views(sd, views),
        load_templates(str(spec["templates"])),
        [photo.caption for photo in photos],
        lr=float(spec["lr"]) * lr_scale,
        seed=int(spec["seed"]),
    )
    log.info(
        "%s: %d photos, %d views of %d pixels",
        word.placeholder,
        len(photos),
        len(views),
        views[0].pixels.shape[1],
    )
    return Run(word, folder, str(spec["init_word"]))


class Trainer:
    """The loop around `Inversion.step`: logs, evaluations, previews, and savings that can be continued."""

    def __init__(
        self, args: argparse.Namespace, sd: StableDiffusion, runs: list[Run], rank: int, world: int
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
        )
        self.state_path = Path(args.out) / "state.safetensors"

    def resume(self) -> None:
        """Go on from `state.safetensors`, if it is there."""
        if not self.state_path.exists():
            return
        state = load_file(self.state_path)
        self.inversion.load_state_dict(state)
        for i, run in enumerate(self.runs):
            run.rows = [
                row for row in read_log(run.folder / "log.csv") if row["step"] <= self.inversion.step_count
            ]
            if f"best.{i}" in state:
                run.best, run.best_loss = state[f"best.{i}"], state[f"best_loss.{i}"].item()
        log.info("resumed after step %d", self.inversion.step_count)

    def train(self, stop: Stop) -> bool:
        """Take all steps that are left. False if it was asked to stop before."""
        args, steps = self.args, self.args.steps
        progress = cli.Progress(steps, "step", self.inversion.step_count)
        try:
            while self.inversion.step_count < steps and not self._converged():
                start = time.monotonic()
                losses = self.inversion.step().tolist()
                step = self.inversion.step_count
                seconds = time.monotonic() - start
                evals = [None] * len(losses)
                if args.eval_every and (step % args.eval_every == 0 or step == steps):
                    evals = self._evaluate()
                self._log(losses, evals, seconds)
                mean = np.mean(losses)
                latest = [run.evaluations[-1] for run in self.runs if run.evaluations]
                progress.step(f"loss {mean:.4f}" + (f", eval loss {np.mean(latest):.4f}" if latest else ""))
                if args.sample_every and (step % args.sample_every == 0 or step == steps):
                    self._preview()
                asked = stop.anywhere(self.world)
                if step % args.save_every == 0 or step == steps or asked:
                    self.save()
                if asked:
                    return False
        except Diverged as error:
            self.save()
            raise InputError(f"{error}; the vectors of the last good step are in {args.out}") from None
        finally:
            progress.close()
        self.save()
        return True

    def _evaluate(self) -> list[float]:
        values = self.inversion.evaluate().cpu()
        if self.world > 1:
            dist.broadcast(values, 0)
        for i, (run, value) in enumerate(zip(self.runs, values.tolist(), strict=True)):
            if value < run.best_loss:
                run.best, run.best_loss = self.inversion.concept(i).vectors, value
        return values.tolist()

    def _converged(self) -> bool:
        """DVAR's rule (arXiv 2302.04841): the eval losses of every word vary much less than at first."""
        window = self.args.early_stop_window
        if self.args.early_stop is None or any(len(run.evaluations) < 2 * window for run in self.runs):
            return False
        return all(
            np.var(run.evaluations[-window:]) < self.args.early_stop * np.var(run.evaluations[:window])
            for run in self.runs
        )

    def _log(self, losses: Sequence[float], evals: Sequence[float | None], seconds: float) -> None:
        for i, run in enumerate(self.runs):
            rows, init = self.inversion.rows[i].detach().cpu(), run.word.init
            row = {
                "step": self.inversion.step_count,
                "loss": losses[i],
                "eval_loss": evals[i],
                "lr": self.inversion.optimizer.param_groups[i]["lr"],
                "norm": rows.norm(dim=1).mean().item() / self.inversion.vocabulary_norm,
                "cosine": F.cosine_similarity(rows, init).mean().item(),
                "seconds": seconds,
            }
            run.rows.append(row)

    def _preview(self) -> None:
        """What the words look like now, each in its prompts, always with the same seeds."""
        if self.rank:
            return
        for run in self.runs:
            templates = self.args.sample_prompt or ["a photo of {}"]
            prompts = [t.replace("{}", run.word.placeholder) for t in templates]
            images = self.sd.sample(prompts, steps=self.args.sample_steps, num_images=4, size=self.args.size)
            path = run.folder / "samples" / f"step-{self.inversion.step_count:06d}.png"
            write_atomically(path, encode_png(image_grid(images, 4), {"prompts": json.dumps(prompts)}))

    def save(self) -> None:
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
            concept = self.inversion.concept(i, metadata)
            concept.save(run.folder / "embeds" / f"step-{self.inversion.step_count:06d}.safetensors")
            if run.best is not None:
                state |= {
                    f"best.{i}": run.best,
                    f"best_loss.{i}": torch.tensor(run.best_loss, dtype=torch.float64),
                }
                if self.args.keep == "best":
                    concept = Concept(concept.placeholder, run.best, metadata)
            concept.save(run.folder / "learned_embeds.safetensors")
            write_atomically(run.folder / "log.csv", log_csv(run.rows))
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


def read_log(path: Path) -> list[dict[str, float | None]]:
    """The rows of a log.csv."""
    with path.open(newline="") as file:
        rows = [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(file)]
    return [row | {"step": int(row["step"])} for row in rows]


def log_csv(rows: Sequence[dict[str, float | None]]) -> bytes:
    """Rows as a log.csv."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, learn, and leave a report."""
    opts = options()
    args = opts.parse(argv, required=["out"])
    out = Path(args.out)
    if args.resume and (out / "config.yaml").exists():
        args = opts.parse(argv, required=["out"], base=yaml.safe_load((out / "config.yaml").read_bytes()))
    if args.checkpoint is None:
        raise InputError("--checkpoint must be given; see --help")
    specs = word_specs(args)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() and args.device != "cpu" else "gloo")
        if torch.cuda.is_available() and args.device == "auto":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    if rank == 0:
        prepare_out(out, args)
    else:
        logging.getLogger().setLevel(logging.WARNING)

    sd = cli.load_model(args)
    size = sd.check_size(args.size)
    sd.unet.gradient_checkpointing = args.gradient_checkpointing
    lr_scale = args.batch_size * args.accumulate * world if args.scale_lr else 1
    runs = [load_word(sd, spec, args, lr_scale, out) for spec in specs]
    weights, activations = training_memory(sd, args.batch_size * len(runs), size)
    log.info("memory: about %.1f GB of weights and %.1f GB to learn", weights / 1e9, 1.1 * activations / 1e9)
    trainer = Trainer(args, sd, runs, rank, world)
    if args.resume:
        trainer.resume()
    done = trainer.train(Stop())
    if rank == 0:
        for i, run in enumerate(runs):
            write_report(run.folder, trainer.nearest_words(i))
            log.info("%s: learned in %s", run.word.placeholder, run.folder / "learned_embeds.safetensors")
    if world > 1:
        dist.destroy_process_group()
    if not done:
        raise KeyboardInterrupt


if __name__ == "__main__":
    cli.run("minti.train", main)
