"""How contenders are run: what they are given, the clock, taking turns, and processes of their own."""

import dataclasses
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minti.errors import InputError
from minti.inversion.batches import Batch

from .models import INIT_WORD

MINTI, COMPILED, PEER = "minti", "minti compiled", "diffusers"
CHECKPOINTED = "minti, checkpointing"
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    MINTI: ("tools.benchmark.ours", {}),
    COMPILED: ("tools.benchmark.ours", {"compiled": True}),
    CHECKPOINTED: ("tools.benchmark.ours", {"checkpointing": True}),
    PEER: ("tools.benchmark.theirs", {}),
}
"""Its module, with `Training`, `Sampling` and `load`, and what the first two are given besides the job."""

Seconds = dict[str, float]  # by what took them
median = statistics.median


@dataclass(frozen=True)
class Job:
    """What is to be done; the same for all contenders."""

    model: str
    checkpoint: str
    photos: str
    device: str
    dtype: str
    batch_size: int
    size: int  # pixels
    steps: int  # of sampling
    vectors: int = 1
    lr: float = 5e-3  # of AdamW
    init_word: str = INIT_WORD
    concepts: int = 1
    attention: str = "sdpa"  # minti's, see `minti.model.kernels.use`


class Training(Protocol):
    """A word about to be learned."""

    def step(self, samples: Batch | None = None) -> Tensor:
        """One update: on these samples, or on some of its own choice. Returns the loss."""

    def rows(self) -> Tensor:
        """The word's vectors as they are now, (vectors, D) float32 on the CPU."""


class Sampling(Protocol):
    """A model about to make pictures."""

    def latents(self) -> Tensor:
        """The finished latents of pictures with seeds 0, 1, ..., (B, C, h, w)."""

    def decode(self, latents: Tensor) -> None:
        """Latents to pictures, as Pillow has them."""


def build(name: str, task: str, job: Job) -> Any:
    """A contender's "Training" or "Sampling"."""
    module, options = CONTENDERS[name]
    return getattr(importlib.import_module(module), task)(job, **options)


def clock(device: str) -> float:
    """Now, in seconds, with all that was asked of the device done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def train(contender: Training, job: Job) -> Seconds:
    """Steps in a row, since a GPU may still be busy with one when the next begins."""
    count = 20 if torch.device(job.device).type == "cuda" else 1
    start = clock(job.device)
    for _ in range(count):
        contender.step()
    return {"training step": (clock(job.device) - start) / count}


def sample(contender: Sampling, job: Job) -> Seconds:
    """Pictures, from the prompt on."""
    start = clock(job.device)
    latents = contender.latents()
    denoised = clock(job.device)
    contender.decode(latents)
    end = clock(job.device)
    return {
        "picture": end - start,
        "sampling step": (denoised - start) / job.steps,
        "decoding": end - denoised,
    }


def load(name: str, job: Job) -> Seconds:
    """A checkpoint whose files the system has at hand; packages have been imported."""
    side = importlib.import_module(CONTENDERS[name][0])
    start = clock(job.device)
    modules: list[nn.Module] = side.load(job)
    loaded = clock(job.device)
    # A file that is mapped into memory is only read once somebody looks.
    for p in (p for module in modules for p in module.parameters()):
        p.sum()
    return {"loading": loaded - start, "loading and looking": clock(job.device) - start}


def take_turns(runs: Mapping[str, Callable[[], Seconds]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """A B A B ...: whatever else slows the machine down slows all of them. Seconds by what, then by whom."""
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            for what, value in run().items():
                found.setdefault(what, {}).setdefault(name, []).append(value)
    return found


# Fresh processes -------------------------------------------------------------------------------------------


def in_child(name: str, task: str, job: Job) -> dict[str, float]:
    """What `child` returns, from a process that has done nothing else.

    Raises:
        InputError: it failed; it has said why on stderr.
    """
    order = json.dumps([name, task, dataclasses.asdict(job)])
    command = [sys.executable, str(Path(__file__).parents[1] / "bench.py"), "--child", order]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        raise InputError(f"{name}, {task}: its process failed, see above")
    return json.loads(process.stdout.splitlines()[-1])


def child(order: str) -> dict[str, float]:
    """Seconds of "load", or GiB at most in memory while doing "Training" or "Sampling"."""
    name, task, job = json.loads(order)
    job = Job(**job)
    if task == "load":
        return load(name, job)
    run = train if task == "Training" else sample
    contender, what = build(name, task, job), f"memory, {task.lower()}"
    if torch.device(job.device).type != "cuda":
        _repeat(run, contender, job)
        return {what: peak_memory() / 2**30}
    before = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _repeat(run, contender, job)
    steps = torch.cuda.max_memory_allocated()
    return {what: max(before, steps) / 2**30, f"{what}, after set-up": steps / 2**30}


def _repeat(run: Callable[[Any, Job], Seconds], contender: Training | Sampling, job: Job) -> None:
    for _ in range(2):  # the second may find what the first has left
        run(contender, job)


def peak_memory() -> int:
    """The most bytes this process has held."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held when it started this process
        lines: Iterable[str] = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
