"""python -m minti.train: learn words from photos; everything needed to look, stop and go on is on disk."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .cli.command import run_command
from .cli.images import encode_png
from .cli.model_options import load_model
from .cli.processes import Processes
from .cli.work_folder import WorkFolder
from .cli.yaml_files import read_yaml
from .errors import InputError
from .formats.atomic import write_atomically
from .inversion.divergence import Diverged
from .runs.folder import read_state, refuse_lost_start, run_folder
from .runs.memory import training_memory
from .runs.options import options, word_specs
from .runs.report import write_report
from .runs.trainer import Stop, Trainer
from .runs.words import load_word

log = logging.getLogger(__name__)


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
        args = opts.parse(argv, required=["out"], base=read_yaml(out / "config.yaml"))
    if args.checkpoint is None:
        raise InputError("--checkpoint must be given; see --help")
    specs = word_specs(opts, args)
    processes = Processes.from_environment()
    with run_folder(args, opts.defaults, active=processes.rank == 0) as folder:
        if not folder.check(resume=args.resume, overwrite=args.overwrite):
            refuse_lost_start(out, specs)
        with processes.joined():
            done = learn_words(args, specs, folder, processes)
    if not done:
        raise KeyboardInterrupt


def learn_words(
    args: argparse.Namespace, specs: Sequence[dict[str, Any]], folder: WorkFolder, processes: Processes
) -> bool:
    """Learn the words. False if the run was asked to stop before its end."""
    state = read_state(folder.path / "state.safetensors") if args.resume else {}
    sd = load_model(argparse.Namespace(**vars(args) | {"device": processes.device(args.device)}))
    if sd.device.type == "cuda":
        torch.cuda.set_device(sd.device)
    sd.check_weights()
    sd.unet.gradient_checkpointing = args.gradient_checkpointing
    lr_scale = args.batch_size * args.accumulate * processes.world if args.scale_lr else 1
    how = {"size": args.size, "crop": args.crop, "flip": args.flip, "lr_scale": lr_scale}
    words = [
        load_word(sd, spec, folder.path, start=state.get(f"init.{i}"), **how) for i, spec in enumerate(specs)
    ]
    runs, sheets = zip(*words, strict=True)
    weights, activations = training_memory(sd, args.batch_size * len(runs), sd.check_size(args.size))
    log.info("memory: about %.0f MB of weights, %.0f MB to learn", weights / 1e6, 1.1 * activations / 1e6)
    trainer = Trainer(args, sd, runs, processes)
    # Only now, with everything in order, is anything written or an old run cleared away.
    if state:
        trainer.resume(state)
    folder.begin()
    for run, sheet in zip(runs, sheets, strict=True) if folder.active else ():
        if not (path := run.folder / "inputs.png").exists():
            write_atomically(path, encode_png(sheet, {}))
    processes.wait()
    try:
        done = trainer.train(Stop())
    except Diverged as error:
        if folder.active:
            write_reports(trainer)
        raise InputError(f"{error}; the vectors of the last good step are in {folder.path}") from None
    if folder.active:
        write_reports(trainer)
        for run in runs if done else ():
            log.info("%s: learned in %s", run.placeholder, run.folder / "learned_embeds.safetensors")
    return done


if __name__ == "__main__":
    run_command("minti.train", main)
