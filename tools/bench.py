"""python tools/bench.py: how fast minti and its peers are at the same work, side by side."""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import minti
from minti.cli.command import run_command
from minti.cli.options import Parser, number
from minti.errors import InputError
from minti.formats.atomic import write_atomically
from minti.formats.checkpoint import DTYPES
from minti.model import kernels
from tools.benchmark import jobs, parts, quality
from tools.benchmark.floor import speed
from tools.benchmark.models import MODELS
from tools.benchmark.table import Row, to_markdown

QUALITY = "quality"  # takes hours, so only on demand
PARTS = f"{', '.join(parts.PARTS)}; or {QUALITY}: how good words are after how many steps"
PACKAGES = ("torch", "diffusers", "transformers", "triton", "numpy")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python tools/bench.py", description=__doc__)
    count = number(int, 1)
    parser.add_argument("--only", nargs="+", metavar="PART", choices=[*parts.PARTS, QUALITY], help=PARTS)
    parser.add_argument("--small", action="store_true", help="two minutes: the tiny model, few repeats")
    parser.add_argument("--full", action="store_true", help="on a CPU too, scaling of the large model; hours")
    parser.add_argument("--model", nargs="+", choices=MODELS, help="by default all")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="of the weights, one or several")
    parser.add_argument("--batch-size", type=count, default=1, help="pictures at a time (default: 1)")
    parser.add_argument("--size", type=count, metavar="PX", help="by default what the model was trained on")
    parser.add_argument("--steps", type=count, help="of sampling: 50; large model on a CPU: 4")
    parser.add_argument("--repeats", type=count, help="rounds: 20; large model: 5")
    parser.add_argument("--compile", action="store_true", help="minti compiled, too")
    parser.add_argument("--attention", choices=kernels.METHODS, default="sdpa", help="of minti")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="diffusers too")
    group = parser.add_argument_group("--only quality, on weights/tiny")
    ways, default = [*quality.WAYS, jobs.PEER], [quality.MINTI, jobs.PEER]
    group.add_argument(
        "--ways", nargs="+", choices=ways, default=default, metavar="WAY", help=", ".join(ways)
    )
    group.add_argument("--concepts", type=count, default=6, help="things to learn words for (default: 6)")
    group.add_argument("--seeds", type=count, default=3, help="words for each (default: 3)")
    at = [25, 50, 100, 200, 400]
    group.add_argument("--at", nargs="+", type=count, default=at, metavar="STEPS", help="of each run")
    group.add_argument("--peer-steps", type=count, default=3000, help="of diffusers' example (default: 3000)")
    group.add_argument("--samples", type=count, default=512, help="in the loss (default: 512)")
    group.add_argument("--num-images", type=count, default=2, help="of each prompt (default: 2)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="everything measured, as JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # see jobs.in_child
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is no GPU here that torch can use")
    args.model = args.model or (["tiny"] if args.small else list(MODELS))
    both = ["float32", "bfloat16"]
    args.dtype = args.dtype or (["bfloat16"] if args.device != "cpu" else both[:1] if args.small else both)
    if QUALITY in (args.only or []) and len(args.only) > 1:
        raise InputError("--only quality stands alone")
    args.only = args.only or list(parts.PARTS)
    if args.small:
        args.repeats, args.steps = args.repeats or 3, args.steps or 20
    return args


def machine(device: str) -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2] for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0].strip() if names else cpu
    found = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else 0,
        "system": platform.platform(),
        "python": platform.python_version(),
        "minti": minti.__version__,
    }
    for package in PACKAGES:
        if importlib.util.find_spec(package):
            found[package] = importlib.metadata.version(package)
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"], found["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    return found


def measure_quality(args: argparse.Namespace, where: dict[str, Any]) -> None:
    """Learn words, and print the table anew after each of them."""
    found: list[quality.Measured] = []

    def record(measured: quality.Measured) -> None:
        found.append(measured)
        parts.note(", ".join(f"{key} {value}" for key, value in dataclasses.asdict(measured).items()))
        if args.out:
            rows = [dataclasses.asdict(m) for m in found]
            write_atomically(args.out, json.dumps({"machine": where, "rows": rows}, indent=1).encode())

    keys = ("ways", "concepts", "seeds", "at", "peer_steps", "samples", "num_images")
    how = {key: getattr(args, key) for key in keys} | {"sample_steps": args.steps or 20}
    with tempfile.TemporaryDirectory(prefix="minti-bench-") as work:
        quality.compare(Path(work), **how, record=record)
    print(f"{quality.to_markdown(found)}\n\n{quality.overtakes(found)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a table for each part."""
    args = arguments(argv)
    if args.child:
        print(json.dumps(jobs.child(args.child)))
        return
    names = [jobs.MINTI, jobs.COMPILED, jobs.PEER] if args.compile else [jobs.MINTI, jobs.PEER]
    there = all(map(importlib.util.find_spec, ("diffusers", "transformers")))
    if args.peers and not there:
        parts.note('no diffusers or transformers here (pip install -e ".[bench]"): minti alone is measured')
    if not args.peers or not there:
        names.remove(jobs.PEER)
    # Before the peers are imported: they should say nothing, and look for nothing in the network.
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    where = machine(args.device)
    if args.only == [QUALITY]:
        measure_quality(args, where)
        return
    if where["load average"] > 0.5:
        parts.note(f"other programs are running (load average {where['load average']}): do not rely on this")
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    speeds = {dtype: speed(args.device, dtype) for dtype in args.dtype}
    for dtype, rate in speeds.items():
        print(f"{dtype}: {rate / 1e9:,.0f} GFLOP/s in a matrix product, which is what floors assume")

    rows: list[Row] = []
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "child")}
    with tempfile.TemporaryDirectory(prefix="minti-bench-") as work:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{work}/compiled"  # nothing there from an earlier run
        bench = parts.Bench(args, names, Path(work))
        for table in (table for part in args.only for table in parts.PARTS[part](bench)):
            rows += table
            print(f"\n{to_markdown(table)}", flush=True)
            if args.out:  # whatever happens next, what was measured is kept
                found = {
                    "machine": where,
                    "settings": settings,
                    "matrix product, FLOP/s": speeds,
                    "differences": bench.checks,
                    "rows": [dataclasses.asdict(row) for row in rows],
                }
                write_atomically(args.out, json.dumps(found, indent=1).encode())


if __name__ == "__main__":
    run_command("bench", main)
