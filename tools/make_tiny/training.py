"""What all stages share: the loop, checkpoints that survive a kill, stopping in time."""

import copy
import csv
import io
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minti.cli.processes import Processes
from minti.cli.progress import Progress
from minti.errors import InputError
from minti.formats.atomic import write_atomically
from minti.formats.weightfile import WeightFile


@dataclass
class Run:
    """One stage's settings, its folder and its clock."""

    name: str
    work: Path
    steps: int
    minutes: float
    device: torch.device
    seed: int
    lr: float
    batch: int
    ema_decay: float = 0.999
    start: Path | None = None  # a folder of weights to begin with, in the layout of diffusers
    workers: int = 1  # processes that draw
    processes: Processes = field(default_factory=Processes)  # that share its batches
    began: float = field(default_factory=time.monotonic)
    interrupted: bool = False

    @property
    def folder(self) -> Path:
        return self.work / self.name

    def catch_signals(self) -> None:
        def stop(number: int, frame: object) -> None:
            self.interrupted = True

        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)

    def out_of_time(self) -> bool:
        return self.interrupted or time.monotonic() - self.began > 60 * self.minutes

    def average(self, parameters: Sequence[Tensor]) -> bool:
        """Replace gradients by their means over the processes. Whether one of these is out of time."""
        stop = self.out_of_time()
        if self.processes.world == 1:
            return stop
        grads = [p.grad for p in parameters if p.grad is not None]
        sums = torch.cat([*(g.flatten() for g in grads), torch.tensor([float(stop)]).to(grads[0])])
        dist.all_reduce(sums)
        parts = (sums[:-1] / self.processes.world).split([g.numel() for g in grads])
        for grad, mean in zip(grads, parts, strict=True):
            grad.copy_(mean.view_as(grad))
        return bool(sums[-1])

    def learning_rate(self, step: int) -> float:
        """Warm up, hold, then fall to zero over the last 40 % (`--steps` can be raised later)."""
        warm = min(1.0, (step + 1) / min(200, 1 + self.steps // 10))
        return self.lr * warm * min(1.0, max(0.02, (self.steps - step) / (0.4 * self.steps)))

    def rng(self, step: int) -> torch.Generator:
        """Whatever is random about a step."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + step)

    def autocast(self) -> torch.autocast:
        """bfloat16 where the hardware multiplies it: on a GPU, and not on CPUs that only emulate it."""
        fast = self.device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
        return torch.autocast(self.device.type, torch.bfloat16, enabled=fast)


def ema_of(work: Path, stage: str) -> dict[str, dict[str, Tensor]]:
    """The averaged weights of each model of a finished (or stopped) stage."""
    path = work / stage / "state.pt"
    if not path.is_file():
        raise InputError(f"{path}: not there; run the stage {stage!r} first")
    return torch.load(path, map_location="cpu", weights_only=True)["ema"]


def read(path: Path) -> dict[str, Tensor]:
    """The weights of a file, in float32."""
    file = WeightFile(path)
    return {key: value.float() for key, value in file.read(list(file.shapes), copied=True)}


def train(
    run: Run,
    models: dict[str, nn.Module],
    loss_of: Callable[[int], tuple[Tensor, dict[str, float]]],
    preview: Callable[[dict[str, nn.Module], int], None],
    every: int = 500,
) -> None:
    """Minimise `loss_of` over the parameters of `models`; keep their moving averages.

    Continues from `state.pt`. Writes it, and a preview, every `every` steps and on stopping. Of several
    processes, which must not differ but in what `loss_of` gives, the first one writes and reports.

    Args:
        loss_of: step -> its loss, and values to report; of several processes, those of a share of the batch.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    run.catch_signals()
    torch.manual_seed(run.seed)
    ema = {name: copy.deepcopy(model).requires_grad_(False).eval() for name, model in models.items()}
    parameters = [p for model in models.values() for p in model.parameters()]
    averages = [p for model in ema.values() for p in model.parameters()]
    decay = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(decay, lr=run.lr, betas=(0.9, 0.99), fused=True)
    path, step = run.folder / "state.pt", 0
    if path.is_file():
        state = torch.load(path, map_location=run.device, weights_only=True)
        step = state["step"]
        optimizer.load_state_dict(state["optimizer"])
        for name, model in models.items():
            model.load_state_dict(state["models"][name])
            ema[name].load_state_dict(state["ema"][name])
        if run.processes.rank == 0:
            print(f"{run.name}: continuing at step {step}", flush=True)

    def save() -> None:
        state = {
            "step": step,
            "optimizer": optimizer.state_dict(),
            "models": {name: m.state_dict() for name, m in models.items()},
            "ema": {name: m.state_dict() for name, m in ema.items()},
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(path, buffer.getvalue())
        preview(ema, step)

    first, stop = run.processes.rank == 0, run.out_of_time()
    progress, means, saved = Progress(run.steps - step, "step") if first else None, {}, step
    with open(run.folder / "log.csv", "a", newline="") as log:
        while step < run.steps and not stop:
            for group in optimizer.param_groups:
                group["lr"] = run.learning_rate(step)
            optimizer.zero_grad()
            loss, values = loss_of(step)
            loss.backward()
            stop = run.average(parameters)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
            rate = min(run.ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - rate)
            if not first:
                continue
            for key, value in {"loss": loss.item(), **values}.items():
                means[key] = value if step == 1 or key not in means else 0.98 * means[key] + 0.02 * value
            if step % 50 == 0:
                csv.writer(log).writerow([step, *(f"{k}={v:.5g}" for k, v in means.items())])
                log.flush()
            progress.step(f"step {step}: " + " ".join(f"{k} {v:.4g}" for k, v in means.items()))
            if step % every == 0:
                save()
                saved = step
    if not first:
        return
    progress.close()
    if step != saved or not path.is_file():
        save()
    print(f"{run.name}: stopped at step {step} of {run.steps}", flush=True)
