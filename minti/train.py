"""python -m minti.train: learn words from photos; everything needed to look, stop and go on is on disk."""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import cli
from .config import InputError
from .data import Photo, View, contact_sheet, encode_views, load_photos, make_views
from .files import write_atomically
from .initial import initial_rows
from .inversion import Diverged, Word
from .memory import training_memory
from .pipeline import StableDiffusion
from .processes import Processes
from .report import write_report
from .run_folder import Run, check_out, clear_temporaries, folders_of, read_state, start_out
from .sample import encode_png
from .templates import load_templates
from .train_options import options, word_specs
from .trainer import Stop, Trainer

log = logging.getLogger(__name__)


def fingerprint(views: Sequence[View], photos: Sequence[Photo], templates: Sequence[str]) -> Tensor:
    """What a word is learned from in 32 bytes, which tell whether it has changed; (32,) uint8."""
    digest = hashlib.sha256(repr([[photo.caption for photo in photos], list(templates)]).encode())
    for view in views:
        digest.update(view.pixels.numpy().tobytes() + view.weight.numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def load_word(
    sd: StableDiffusion, spec: dict[str, Any], args: argparse.Namespace, lr_scale: float, start: Tensor | None
) -> tuple[Run, Image.Image]:
    """Photos to latents, the init word to rows, unless they are known: `start`, that of a run to go on with.

    Also the contact sheet of the photos.
    """
    photos = load_photos(spec["images"])
    size = sd.check_size(args.size)[0]
    views = make_views(photos, size, crop=args.crop, flip=args.flip, seed=spec["seed"])
    if not spec["init_word"] and spec["init"] != "random":
        raise InputError("--init-word must be given: a coarse description such as toy (or --init random)")
    if start is None:
        start = initial_rows(sd, spec["init"], spec["init_word"], spec["num_vectors"], spec["seed"])
    templates = load_templates(spec["templates"])
    word = Word(
        spec["alias"],
        start,
        encode_views(sd, views),
        templates,
        [photo.caption for photo in photos],
        lr=spec["lr"] * lr_scale,
        seed=spec["seed"],
    )
    log.info("%s: %d photos, %d views of %d pixels", spec["placeholder"], len(photos), len(views), size)
    run = Run(
        word,
        spec["placeholder"],
        Path(args.out) / spec["name"],
        "" if spec["init"] == "random" else spec["init_word"],
        fingerprint(views, photos, templates),
    )
    return run, contact_sheet(views)


def write_reports(trainer: Trainer) -> None:
    for i, run in enumerate(trainer.runs):
        write_report(run.folder, trainer.nearest_words(i))


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
    processes = Processes.of_torchrun()
    going_on = processes.rank == 0 and check_out(out, args, specs)
    processes.join()

    state = read_state(out / "state.safetensors") if args.resume else {}
    sd = cli.load_model(argparse.Namespace(**vars(args) | {"device": processes.device(args.device)}))
    if sd.device.type == "cuda":
        torch.cuda.set_device(sd.device)
    sd.check_weights()
    sd.unet.gradient_checkpointing = args.gradient_checkpointing
    lr_scale = args.batch_size * args.accumulate * processes.world if args.scale_lr else 1
    words = [load_word(sd, s, args, lr_scale, state.get(f"init.{i}")) for i, s in enumerate(specs)]
    runs, sheets = zip(*words, strict=True)
    weights, activations = training_memory(sd, args.batch_size * len(runs), sd.check_size(args.size))
    log.info("memory: about %.0f MB of weights, %.0f MB to learn", weights / 1e6, 1.1 * activations / 1e6)
    trainer = Trainer(args, sd, runs, processes)
    # Only now, with everything in order, is anything written or an old run cleared away.
    if state:
        trainer.resume(state)
    if processes.rank == 0:
        clear_temporaries(folders_of(out)) if going_on else start_out(out, args)
        for run, sheet in zip(runs, sheets, strict=True):
            if not (path := run.folder / "inputs.png").exists():
                write_atomically(path, encode_png(sheet, {}))
    processes.wait()
    try:
        done = trainer.train(Stop())
    except Diverged as error:
        if processes.rank == 0:
            write_reports(trainer)
        raise InputError(f"{error}; the vectors of the last good step are in {out}") from None
    if processes.rank == 0:
        write_reports(trainer)
        for run in runs if done else ():
            log.info("%s: learned in %s", run.placeholder, run.folder / "learned_embeds.safetensors")
    processes.leave()
    if not done:
        raise KeyboardInterrupt


if __name__ == "__main__":
    cli.run("minti.train", main)
