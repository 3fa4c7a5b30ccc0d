"""python tools/make_tiny STAGE --work DIR: make `weights/tiny`, from nothing, stage by stage."""

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from minti.cli.command import run_command
from minti.cli.options import Parser, number
from minti.cli.processes import Processes
from minti.errors import InputError
from tools.make_tiny import data
from tools.make_tiny.training import Run

# In the order in which they are run. Steps, learning rate, pictures a step.
DEFAULTS = {
    "world": (100_000, 0.0, 0),
    "vae": (4_000, 1.2e-3, 16),
    "text": (4_000, 1e-3, 128),
    "latents": (0, 0.0, 250),
    "contexts": (0, 0.0, 100),
    "clip": (3_000, 1e-3, 96),
    "decoder": (1_500, 8e-4, 16),
    "unet": (60_000, 6e-4, 32),
    "probe": (5_000, 2e-3, 128),
    "export": (0, 0.0, 0),
}


def main(argv: Sequence[str] | None) -> None:
    parser = Parser(prog="python tools/make_tiny", description=__doc__)
    parser.add_argument("stage", choices=DEFAULTS, help="in this order; each continues where it stopped")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="then stop, with a checkpoint")
    parser.add_argument("--steps", type=int, help="optimizer steps; pictures for world and latents")
    parser.add_argument("--lr", type=float, help="the highest learning rate")
    parser.add_argument("--batch-size", type=int, help="pictures a step")
    parser.add_argument("--start", type=Path, help="folder of weights to begin with, such as weights/tiny")
    parser.add_argument("--threads", type=number(int, 1), help="of PyTorch")
    parser.add_argument("--workers", type=number(int, 1), default=os.cpu_count(), help="which draw")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    processes = Processes.from_environment()
    if processes.world > 1 and args.stage != "unet":
        raise InputError(f"{args.stage}: one process only; torchrun is for the stage unet")
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if args.threads:
        torch.set_num_threads(args.threads)
    steps, lr, batch = DEFAULTS[args.stage]
    run = Run(
        name=args.stage,
        work=args.work,
        steps=args.steps or steps,
        minutes=args.minutes,
        device=torch.device(processes.device(device)),
        seed=args.seed,
        lr=args.lr or lr,
        batch=args.batch_size or batch,
        start=args.start,
        workers=args.workers,
        processes=processes,
    )
    if args.stage == "world":
        data.build(run)
    else:
        with processes.joined():
            importlib.import_module(f"tools.make_tiny.{args.stage}").stage(run)
    if run.interrupted:
        raise KeyboardInterrupt


if __name__ == "__main__":
    run_command("make_tiny", main)
