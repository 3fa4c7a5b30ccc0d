"""The parts of the benchmark; each yields tables."""

import argparse
import gc
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from minti.errors import InputError
from minti.formats.checkpoint import DTYPES
from minti.model.tokenizer import PROMPT_LENGTH

from .floor import needed, speed
from .jobs import CHECKPOINTED, COMPILED, MINTI, PEER, Job, build, clock, in_child, sample, take_turns, train
from .models import build as build_module
from .models import native_size, write_checkpoint, write_photos
from .table import Row, add_growth, rows

# How far two sides may be apart, relative to minti: in the losses of the first steps and the way the vectors
# went in them, or in the finished latents. The sides round to half precision at different places, and AdamW's
# first steps make much of little; but two ways that have nothing to do with each other are 1.4 apart.
TOLERANCE = {
    "float32": {"loss": 1e-4, "way": 0.02, "latents": 1e-3},
    "bfloat16": {"loss": 0.05, "way": 1.0, "latents": 0.3},
    "float16": {"loss": 0.02, "way": 0.7, "latents": 0.1},
}
COUNTS = ("batch_size", "concepts", "vectors")
SHARES = {"size": (0.5, 1, 1.5), "steps": (0.5, 1, 2)}  # of what the other parts use
AXES = {**dict.fromkeys(COUNTS, (1, 2, 4, 8, 16)), **SHARES}
SMALL_AXES = {**dict.fromkeys(COUNTS, (1, 8)), **SHARES}


def note(text: str) -> None:
    """Say what is going on."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


class Bench:
    """What the parts share: options, checkpoints, and whether contenders agree.

    Args:
        args: the command line.
        names: the contenders.
        work: an empty folder for checkpoints.
    """

    def __init__(self, args: argparse.Namespace, names: list[str], work: Path) -> None:
        self.args, self.names, self.work = args, names, work
        self.checks: list[dict[str, Any]] = []
        write_photos(work / "photos")

    def job(self, model: str, dtype: str) -> Job:
        checkpoint, args = self.work / model, self.args
        if not checkpoint.exists():
            note(f"writing {model} with random weights")
            write_checkpoint(model, checkpoint)
        return Job(
            model=model,
            checkpoint=str(checkpoint),
            photos=str(self.work / "photos"),
            device=args.device,
            dtype=dtype,
            batch_size=args.batch_size,
            size=args.size or native_size(model),
            steps=args.steps or (4 if model == "sd-1.5" and args.device == "cpu" else 50),
            attention=args.attention,
        )

    def jobs_by_model(self) -> list[list[Job]]:
        return [[self.job(model, dtype) for dtype in self.args.dtype] for model in self.args.model]

    def jobs(self) -> list[Job]:
        return [job for jobs in self.jobs_by_model() for job in jobs]

    def rounds(self, job: Job) -> int:
        return self.args.repeats or (5 if job.model == "sd-1.5" else 20)

    def agree(self, job: Job, errors: Mapping[str, float], name: str) -> None:
        """Record how far a contender was from minti, and go no further if that is too far.

        Raises:
            InputError: it has done other work, so that a comparison would mean nothing.
        """
        case = {
            key: getattr(job, key) for key in ("model", "dtype", "size", "batch_size", "steps", "vectors")
        }
        self.checks.append({"contender": name, **case, **errors})
        found = ", ".join(f"{what} {error:.1e}" for what, error in errors.items())
        note(f"{name} is off minti by: {found} ({job.model}, {job.dtype}, {job.size} px)")
        if any(not error <= TOLERANCE[job.dtype][what] for what, error in errors.items()):
            raise InputError(f"minti and {name} do not compute the same: {found}; nothing was compared")

    def measure(self, part: str, task: str, job: Job, names: list[str], *, label: str = "") -> list[Row]:
        """Build the contenders, see that they agree, and let them take turns."""
        note(f"{part}{label}: {job.model}, {job.dtype}, {job.size} px")
        if COMPILED in names:
            torch.compiler.reset()  # or it would make one graph for several sizes
        gc.collect()  # the contenders before
        if job.device == "cuda":
            torch.cuda.empty_cache()
        contenders = {name: build(name, task, job) for name in names}
        if task == "Training":
            what, run, first = "training step", train, self._first_steps(contenders, job)
        else:
            what, run, first = "picture", sample, self._first_pictures(contenders, job)
        runs = {name: partial(run, contender, job) for name, contender in contenders.items()}
        found, rate = take_turns(runs, self.rounds(job)), speed(job.device, job.dtype)
        floors = {what: operations / rate for what, operations in needed(job).items()}
        return rows(part, job, found, label=label, first={what: first}, floors=floors)

    def _first_steps(self, contenders: Mapping[str, Any], job: Job) -> dict[str, float]:
        """Three training steps on the same samples. Seconds of the first."""
        ours, first = contenders[MINTI], {}
        start = {name: contender.rows() for name, contender in contenders.items()}
        losses: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(3):
            samples = ours.samples()
            for name, contender in contenders.items():
                before = clock(job.device)
                losses[name].append(contender.step(samples).sum().item())
                first.setdefault(name, clock(job.device) - before)
        way = {name: contender.rows() - start[name] for name, contender in contenders.items()}
        for name in contenders.keys() - {MINTI}:
            pairs = zip(losses[MINTI], losses[name], strict=True)
            loss = max(abs(a - b) / abs(a) for a, b in pairs)
            apart = (way[name] - way[MINTI]).norm() / way[MINTI].norm()
            self.agree(job, {"loss": loss, "way": apart.item()}, name)
        return first

    def _first_pictures(self, contenders: Mapping[str, Any], job: Job) -> dict[str, float]:
        """The same pictures by all. Seconds they took."""
        latents, first = {}, {}
        for name, contender in contenders.items():
            before = clock(job.device)
            latents[name] = contender.latents()
            contender.decode(latents[name])
            first[name] = clock(job.device) - before
            latents[name] = latents[name].float()
        for name in contenders.keys() - {MINTI}:
            error = (latents[name] - latents[MINTI]).norm() / latents[MINTI].norm()
            self.agree(job, {"latents": error.item()}, name)
        return first


def training(bench: Bench) -> Iterator[list[Row]]:
    """Learning a word, a step."""
    for jobs in bench.jobs_by_model():
        yield [row for job in jobs for row in bench.measure("train", "Training", job, bench.names)]


def sampling(bench: Bench) -> Iterator[list[Row]]:
    """Pictures by DDIM with guidance."""
    for jobs in bench.jobs_by_model():
        yield [row for job in jobs for row in bench.measure("sample", "Sampling", job, bench.names)]


def memory(bench: Bench) -> Iterator[list[Row]]:
    """The most memory at any time: of the process on a CPU, of tensors on a GPU."""
    gc.collect()  # those of another part, if the machine is small
    for task in ("Training", "Sampling"):
        table = []
        for job in bench.jobs():
            note(f"memory, {task.lower()}: {job.model}, {job.dtype}")
            # Two steps of sampling take as much memory as fifty.
            few = replace(job, steps=min(job.steps, 2))
            names = [*bench.names, *([CHECKPOINTED] if task == "Training" else [])]
            runs = {name: partial(in_child, name, task, few) for name in names}
            table += rows("memory", few, take_turns(runs, 1), unit="GiB")
        yield table


def loading(bench: Bench) -> Iterator[list[Row]]:
    """A checkpoint folder that was just written or read, so that no disk is measured."""
    table = []
    for job in bench.jobs():
        note(f"load: {job.model}, {job.dtype}")
        runs = {name: partial(in_child, name, "load", job) for name in bench.names if name != COMPILED}
        table += rows("load", job, take_turns(runs, min(bench.rounds(job), 5)))
    yield table


def scaling(bench: Bench) -> Iterator[list[Row]]:
    """The cost as the work grows, along one axis at a time."""
    args = bench.args
    whole = args.full or args.device != "cpu"
    models = args.model if whole else [model for model in args.model if model == "tiny"]
    if models != args.model:
        note("scaling: at tiny size only; --full for all")
    for model in models:
        base = bench.job(model, args.dtype[0])
        for axis, values in (SMALL_AXES if args.small else AXES).items():
            # The loop of the diffusers script learns one word at a time.
            names = [name for name in bench.names if name != PEER or axis != "concepts"]
            task = "Sampling" if axis == "steps" else "Training"
            table = []
            for value in values:
                value = value if axis in COUNTS else max(1, int(value * getattr(base, axis)))
                label = f", {axis.removesuffix('_size')} {value}"
                measured = bench.measure("scaling", task, replace(base, **{axis: value}), names, label=label)
                table += [row for row in measured if row.what.startswith(("training step", "picture"))]
            add_growth(table)
            yield table


def attention(bench: Bench) -> Iterator[list[Row]]:
    """The attention kernel against PyTorch's SDPA, shape by shape."""
    if bench.args.device != "cuda" or importlib.util.find_spec("triton") is None:
        note("attention: left out, since the kernel needs a GPU and triton")
        return
    from minti.model.kernels.operator import supports

    table = []
    for job in bench.jobs():
        device, dtype = torch.device(job.device), DTYPES[job.dtype]
        for shape, keys, gradients in attention_shapes(job):
            q, kv = (
                torch.empty(*shape[:2], n, shape[3], device=device, dtype=dtype) for n in (shape[2], keys)
            )
            if not supports(q, kv, kv):
                note(f"attention: the kernel does not do {'x'.join(map(str, shape))} in {job.dtype}")
                continue
            backend = SDPBackend(torch._fused_sdp_choice(q, kv, kv)).name.lower()
            what = f"{'x'.join(map(str, shape))} to {keys}{', and back' if gradients else ''} ({backend})"
            seconds = attention_seconds(shape, keys, dtype, device, gradients)
            found = {what: {name: [value] for name, value in seconds.items()}}
            table += rows("attention", replace(job, batch_size=shape[0]), found, peer="sdpa")
    yield table


def attention_shapes(job: Job) -> list[tuple[tuple[int, int, int, int], int, bool]]:
    """(shape of the queries, (B, heads, N, d); number of keys; whether gradients are wanted) in the UNet.

    To itself and to the prompt, for a training step and for sampling with guidance.
    """
    with torch.device("meta"):
        unet, vae = build_module(job.model, "unet").config, build_module(job.model, "vae").config
    found = []
    depths = [*unet.transformer_depth[:-1], unet.transformer_depth[-1] or unet.mid_depth]
    for level, (channels, heads, depth) in enumerate(
        zip(unet.block_out_channels, unet.num_attention_heads, depths, strict=True)
    ):
        tokens = (job.size // vae.downscale // 2**level) ** 2
        for keys in (tokens, PROMPT_LENGTH) if depth else ():
            for batch, gradients in ((job.batch_size, True), (2 * job.batch_size, False)):
                found.append(((batch, heads, tokens, channels // heads), keys, gradients))
    return found


def attention_seconds(
    shape: tuple[int, int, int, int], keys: int, dtype: torch.dtype, device: torch.device, gradients: bool
) -> dict[str, float]:
    """Median seconds that SDPA and the kernel take on a GPU, with the backward pass if `gradients`.

    Args:
        shape: of the queries, (B, heads, N, d).
        keys: the number of keys and values.
    """
    from triton.testing import do_bench

    from minti.model.kernels.operator import flash_attention

    B, H, N, D = shape
    q, k, v, do = (
        torch.randn(B, length, H, D, dtype=dtype, device=device).transpose(1, 2)  # heads side by side
        for length in (N, keys, keys, N)
    )
    for x in (q, k, v):
        x.requires_grad_(gradients)

    def run(function: Callable[..., torch.Tensor]) -> None:
        o = function(q, k, v)
        if gradients:
            torch.autograd.grad(o, (q, k, v), do)

    candidates = {"sdpa": torch.nn.functional.scaled_dot_product_attention, "triton": flash_attention}
    return {
        name: 1e-3 * do_bench(partial(run, function), return_mode="median")
        for name, function in candidates.items()
    }


PARTS: dict[str, Callable[[Bench], Iterator[list[Row]]]] = {
    "train": training,
    "sample": sampling,
    "memory": memory,
    "load": loading,
    "scaling": scaling,
    "attention": attention,
}
