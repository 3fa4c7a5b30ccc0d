"""python -m minti.train: learn words from photos; everything needed to look, stop and go on is on disk."""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from . import cli
from .config import InputError
from .data import CROPS, Photo, View, contact_sheet, encode_views, load_photos, make_views
from .files import write_atomically
from .initial import initial_rows
from .inversion import Word
from .memory import training_memory
from .pipeline import StableDiffusion
from .report import write_report
from .sample import encode_png
from .templates import load_templates
from .trainer import Run, Stop, Trainer

log = logging.getLogger(__name__)

PER_WORD = ("images", "placeholder", "init_word", "init", "num_vectors", "templates", "lr", "seed")
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


def word_specs(opts: cli.Options, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What to learn: the entries of `concepts:` in the config file, or the one word of the flags."""
    common = {key: getattr(args, key) for key in PER_WORD}
    if args.concepts is None:
        entries = [{"name": ""}]
    else:
        entries = args.concepts
        if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
            raise InputError(
                "concepts: should list entries like {name: toy, images: DIR, placeholder: <toy>}"
            )
    specs = []
    for entry in entries:
        if unknown := set(entry) - {"name", *PER_WORD}:
            raise InputError(
                f"concepts: unknown key {min(map(str, unknown))!r}; there are name, {', '.join(PER_WORD)}"
            )
        name = str(entry.get("name", ""))
        if args.concepts is not None and not re.fullmatch(r"\w[\w.-]*", name):
            raise InputError(f"concepts: name {name!r} should consist of letters, digits, - and _")
        spec = (
            common
            | opts.check({key: value for key, value in entry.items() if key != "name"})
            | {"name": name}
        )
        for key in ("images", "placeholder"):
            if spec[key] is None:
                raise InputError(
                    f"--{key} must be given" if args.concepts is None else f"concepts: {name} needs {key}"
                )
        specs.append(spec)
    if len({spec["name"] for spec in specs}) < len(specs):
        raise InputError("concepts: two of them have the same name")
    return specs


def check_out(out: Path, args: argparse.Namespace) -> bool:
    """See that nothing would be lost. Returns whether there is a run to go on with.

    Raises:
        InputError: --out is in use; or the run there was another one than is to be resumed.
    """
    saved = out / "config.yaml"
    if args.resume and saved.exists():
        cli.check_unchanged(saved, args, MAY_DIFFER)
        return True
    # A run that was killed while it wrote its very first file leaves a hidden one.
    if out.exists() and (not out.is_dir() or any(not path.name.startswith(".") for path in out.iterdir())):
        if not args.overwrite:
            raise InputError(f"{out}: exists already; give another --out, or --resume, or --overwrite")
        if not saved.exists():
            raise InputError(f"{out}: holds something that is not a run of minti; give another --out")
    return False


def start_out(out: Path, args: argparse.Namespace) -> None:
    """Clear away the files of the run before, and no others; write down the settings of this one."""
    saved = out / "config.yaml"
    words = (cli.read_yaml(saved).get("concepts") or []) if saved.exists() else []
    for folder in [out, *(out / word["name"] for word in words)]:
        for name in WRITTEN:
            for path in [folder / name, *folder.glob(f".{name}.*")]:
                path.unlink(missing_ok=True)
        for name in ("embeds", "samples"):
            shutil.rmtree(folder / name, ignore_errors=True)
    write_atomically(out / "config.yaml", cli.to_yaml(args))


def fingerprint(views: Sequence[View], photos: Sequence[Photo]) -> Tensor:
    """What a word is learned from in 32 bytes, which tell whether it has changed; (32,) uint8."""
    digest = hashlib.sha256(repr([photo.caption for photo in photos]).encode())
    for view in views:
        digest.update(view.pixels.numpy().tobytes() + view.weight.numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def load_word(
    sd: StableDiffusion, spec: dict[str, Any], args: argparse.Namespace, lr_scale: float, out: Path
) -> tuple[Run, Image.Image]:
    """Photos to latents, the init word to rows. Also the contact sheet of the photos."""
    photos = load_photos(spec["images"])
    size = sd.check_size(args.size)[0]
    views = make_views(photos, size, crop=args.crop, flip=args.flip, seed=spec["seed"])
    if not spec["init_word"] and spec["init"] != "random":
        raise InputError("--init-word must be given: a coarse description such as toy (or --init random)")
    word = Word(
        spec["placeholder"],
        initial_rows(sd, spec["init"], spec["init_word"], spec["num_vectors"], spec["seed"]),
        encode_views(sd, views),
        load_templates(spec["templates"]),
        [photo.caption for photo in photos],
        lr=spec["lr"] * lr_scale,
        seed=spec["seed"],
    )
    log.info("%s: %d photos, %d views of %d pixels", word.placeholder, len(photos), len(views), size)
    return Run(word, out / spec["name"], spec["init_word"], fingerprint(views, photos)), contact_sheet(views)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, learn, and leave a report. Without arguments, the recipe `tiny`."""
    opts = options()
    argv = (sys.argv[1:] if argv is None else argv) or ["--config", "tiny"]
    args = opts.parse(argv, required=["out"])
    out = Path(args.out)
    if args.resume and (out / "config.yaml").exists():
        args = opts.parse(argv, required=["out"], base=cli.read_yaml(out / "config.yaml"))
    if args.checkpoint is None:
        raise InputError("--checkpoint must be given; see --help")
    specs = word_specs(opts, args)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    going_on = rank == 0 and check_out(out, args)
    if world > 1:
        dist.init_process_group()
        if torch.cuda.is_available() and args.device == "auto":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
    if rank:
        logging.getLogger().setLevel(logging.WARNING)

    sd = cli.load_model(args)
    sd.check_weights()
    sd.unet.gradient_checkpointing = args.gradient_checkpointing
    lr_scale = args.batch_size * args.accumulate * world if args.scale_lr else 1
    runs, sheets = zip(*(load_word(sd, spec, args, lr_scale, out) for spec in specs), strict=True)
    weights, activations = training_memory(sd, args.batch_size * len(runs), sd.check_size(args.size))
    log.info("memory: about %.0f MB of weights, %.0f MB to learn", weights / 1e6, 1.1 * activations / 1e6)
    trainer = Trainer(args, sd, runs, rank, world)
    # Only now, with everything in order, is anything written or an old run cleared away.
    if rank == 0 and not going_on:
        start_out(out, args)
    if rank == 0:
        for run, sheet in zip(runs, sheets, strict=True):
            if not (path := run.folder / "inputs.png").exists():
                write_atomically(path, encode_png(sheet, {}))
    if world > 1:
        dist.barrier()
    if args.resume:
        trainer.resume()
    done = trainer.train(Stop())
    if rank == 0:
        for i, run in enumerate(runs):
            write_report(run.folder, trainer.nearest_words(i))
            if done:
                log.info("%s: learned in %s", run.word.placeholder, run.folder / "learned_embeds.safetensors")
    if world > 1:
        dist.destroy_process_group()
    if not done:
        raise KeyboardInterrupt


if __name__ == "__main__":
    cli.run("minti.train", main)
