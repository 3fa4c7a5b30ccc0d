"""python tools/make_tiny STAGE --work DIR: make `weights/tiny`, from nothing, stage by stage."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from minti.cli.command import run_command
from minti.cli.options import Parser
from minti.cli.processes import Processes
from minti.errors import InputError
from tools.make_tiny import data
from tools.make_tiny.training import Run

# In the order in which they are run. Steps, learning rate, pictures a step.
DEFAULTS = {
    "world": (60_000, 0.0, 0),
    "vae": (4_000, 1.2e-3, 16),
    "clip": (1_800, 1e-3, 128),
    "latents": (0, 0.0, 250),
    "decoder": (1_500, 8e-4, 16),
    "unet": (14_500, 1e-3, 32),
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
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    steps, lr, batch = DEFAULTS[args.stage]
    processes = Processes.from_environment()
    run = Run(
        name=args.stage,
        work=args.work,
        steps=args.steps or steps,
        minutes=args.minutes,
        device=torch.device(device),
        seed=args.seed,
        lr=args.lr or lr,
        batch=args.batch_size or batch,
        rank=processes.rank,
        world=processes.world,
    )
    if run.world > 1 and (args.stage != "unet" or run.batch % run.world):
        raise InputError("several processes: only for the stage unet, which divides its batches evenly")
    with processes.joined():
        if args.stage == "world":
            data.build(args.work, run.steps)
        else:
            importlib.import_module(f"tools.make_tiny.{args.stage}").stage(run)
    if run.interrupted:
        raise KeyboardInterrupt


if __name__ == "__main__":
    run_command("make_tiny", main)
