"""python -m minti.train: learn words from photos; everything needed to look, stop and resume is on disk."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from .cli.command import out_of_memory, run_command
from .cli.images import encode_png
from .cli.model_options import load_model
from .cli.processes import Processes
from .cli.work_folder import WorkFolder
from .errors import InputError
from .formats.atomic import write_atomically
from .formats.photos import load_photos
from .inversion.clip_objective import ClipInversion, ClipTarget
from .inversion.divergence import Diverged
from .inversion.inversion import Inversion
from .judge.scorer import Scorer, choose_clip
from .model.checks import check_weights
from .model.fitting import prepare
from .runs.folder import STATE, read_state, run_folder
from .runs.options import (
    learning_settings,
    options,
    parse_run,
    watching_settings,
    word_specs,
)
from .runs.stop import Stop
from .runs.trainer import Trainer
from .runs.words import load_word

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, learn, and leave a report. Without arguments, the recipe `tiny`."""
    opts = options()
    argv = (sys.argv[1:] if argv is None else argv) or ["--config", "tiny"]
    args = parse_run(opts, argv)
    if args.checkpoint is None:
        raise InputError("--checkpoint must be given; see --help")
    specs = word_specs(opts, vars(args))
    processes = Processes.from_environment()
    active = processes.rank == 0
    with run_folder(args.out, vars(args), opts.defaults, resume=args.resume, active=active) as folder:
        folder.check(resume=args.resume, overwrite=args.overwrite)
        with processes.joined(), Stop() as stop:
            done = learn_words(args, specs, folder, processes, stop)
    if not done:
        raise KeyboardInterrupt


def learn_words(
    args: argparse.Namespace,
    specs: Sequence[dict[str, Any]],
    folder: WorkFolder,
    processes: Processes,
    stop: Stop,
) -> bool:
    """Learn the words that are described by `specs`. False if the run was asked to stop before its end."""
    state = read_state(folder.path / STATE) if args.resume else {}
    with out_of_memory("the weights do not fit; --dtype bfloat16 needs half as much"):
        sd = load_model(argparse.Namespace(**vars(args) | {"device": processes.device(args.device)}))
    if sd.device.type == "cuda":
        torch.cuda.set_device(sd.device)
    check_weights(sd)
    kind = {"per_layer": args.per_layer, "output_embedding": args.output_embedding}
    sd.text_encoder = prepare(sd.text_encoder, sd.unet, **kind)
    sd.unet.gradient_checkpointing = args.gradient_checkpointing
    how = {"size": args.size, "crop": args.crop, "flip": args.flip}
    how["lr_scale"] = args.batch_size * args.accumulate * processes.world if args.scale_lr else 1
    with out_of_memory("encoding the photos needs it; try a smaller --size, or smaller photos"):
        starts = [state.get(f"init.{i}") for i in range(len(specs))]
        words = [
            load_word(sd, spec, folder.path, start=start, **how)
            for spec, start in zip(specs, starts, strict=True)
        ]
    settings = learning_settings(vars(args))
    if any(kind.values()) and settings.objective != "diffusion":
        option = "--per-layer" if args.per_layer else "--output-embedding"
        raise InputError(
            f"{option} is for --objective diffusion: CLIP knows nothing of what a UNet attends to"
        )
    learner = Inversion if settings.objective == "diffusion" else clip_learner(args, specs, sd.device)
    trainer = Trainer(
        sd,
        [word for word, _ in words],
        settings,
        watching_settings(vars(args)),
        processes,
        out=folder.path,
        checkpoint=str(args.checkpoint),
        size=args.size,
        replace=args.replace_word,
        compiled=args.compile,
        learner=learner,
    )
    # Only now, with everything in order, is anything written or an old run removed.
    if state:
        trainer.resume(state)
    folder.begin()
    for word, sheet in words if folder.active else ():
        if not (path := word.folder / "inputs.png").exists() or not state:
            write_atomically(path, encode_png(sheet, {}))
    what = "%d steps of %d samples on %s, saved in %s every %d steps"
    samples = len(specs) * settings.batch_size * settings.accumulate * processes.world
    log.info(what, settings.steps, samples, sd.device, folder.path, args.save_every)
    processes.wait()
    try:
        with out_of_memory(
            "try --batch-size 1 with --accumulate, --gradient-checkpointing, or a smaller --size"
        ):
            done = trainer.train(stop)
    except Diverged as error:
        raise InputError(f"{error}; the vectors of the last good step are in {folder.path}") from None
    for word, _ in words if done else ():
        log.info("%s: learned in %s", word.placeholder, word.folder / "learned_embeds.safetensors")
    return done


def clip_learner(
    args: argparse.Namespace, specs: Sequence[dict[str, Any]], device: torch.device
) -> Callable[..., Inversion]:
    """What learns the words with the objective of CLIP. Raises InputError if the CLIP cannot be used."""
    clip = choose_clip(args.clip, args.checkpoint)
    scorer, targets = Scorer.load(clip, device=device, tokenizer=args.clip_tokenizer), []
    for spec in specs:
        image = scorer.mean_embedding(photo.open() for photo in load_photos(spec["images"]))
        targets.append(ClipTarget(image, "" if spec["init"] == "file" else spec["init_word"]))
    return partial(ClipInversion, text_encoder=scorer.text_encoder, targets=targets)


command = partial(run_command, "minti.train", main)

if __name__ == "__main__":
    command()
