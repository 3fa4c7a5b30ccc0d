"""The folder of a run of tuning: pictures of the class, previews, the tuned weights, and resuming."""

import argparse
import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..cli.images import encode_png
from ..cli.progress import Progress, peak_memory
from ..errors import InputError
from ..formats.atomic import replacing, write_atomically
from ..formats.photos import Photo
from ..formats.reading import check_regular
from ..model.stable_diffusion import StableDiffusion
from ..runs.folder import STATE
from ..runs.previews import PREVIEWS, Previews
from ..runs.stop import Stop
from .tuner import Tuner

log = logging.getLogger(__name__)

COLUMNS = "step,loss,prior_loss,grad_norm,seconds"  # of log.csv


def make_class_pictures(sd: StableDiffusion, args: argparse.Namespace, folder: Path) -> list[Photo]:
    """The pictures of the class, which are made unless they are there.

    They are made in batches that are always the same, so that an interruption changes not one bit of them.
    """
    paths = [folder / f"{i:04d}.png" for i in range(args.class_images)]
    batches = [range(len(paths))[i : i + PREVIEWS] for i in range(0, len(paths), PREVIEWS)]
    todo = [batch for batch in batches if not all(paths[i].exists() for i in batch)]
    how = {"steps": args.sample_steps, "guidance_scale": args.guidance_scale, "size": args.size}
    with closing(Progress(len(todo) * args.sample_steps, "sampling step")) as progress:
        on_step = partial(progress.step, "pictures of the class")
        for batch in todo:
            each = [(args.class_prompt, args.seed + i) for i in batch]
            images = sd.sample_each(each, batch_size=PREVIEWS, on_step=on_step, **how)
            for i, image in zip(batch, images, strict=True):
                write_atomically(paths[i], encode_png(image, {"prompt": args.class_prompt}))
    return [Photo(path) for path in paths]


def as_bytes(text: str) -> Tensor:
    """A text as a tensor, (n,) uint8, for a file of tensors."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def refuse_others(path: Path, state: Mapping[str, Tensor], checks: Mapping[str, Tensor]) -> None:
    """Raises InputError if the state at a path was saved by a run that depends on something else."""
    for what, now in checks.items():
        if what not in state or not torch.equal(state[what], now):
            remedy = "continue as it began, or start again with --overwrite"
            raise InputError(f"{path}: was begun with another {what}, or is damaged; {remedy}")


class Run:
    """The folder of a run: what is in it of an earlier process, and saving.

    Args:
        checks: what the run depends on, beside its settings, as tensors that are compared on resume.
        notes: what the files of weights say of where they come from.
    """

    def __init__(
        self, args: argparse.Namespace, tuner: Tuner, checks: Mapping[str, Tensor], notes: Mapping[str, str]
    ) -> None:
        self.args, self.tuner, self.checks, self.notes = args, tuner, checks, notes
        self.out, self.lines = Path(args.out), [COLUMNS]
        how = {"steps": args.sample_steps, "guidance_scale": args.guidance_scale, "size": args.size}
        self._previews = Previews(tuner.sd, bool(args.sample_every), **how)

    def resume(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a saved state. Raises InputError if it is damaged or of something else."""
        path = self.out / STATE
        refuse_others(path, state, self.checks)
        try:
            self.tuner.load_state_dict(state)
        except InputError as error:
            raise InputError(f"{path}: {error}; remove it to start again") from None
        if (self.out / "log.csv").exists():
            text = check_regular(self.out / "log.csv").read_text(encoding="utf-8", errors="replace")
            self.lines = text.splitlines()[: 1 + self.tuner.step_count]
        log.info("resumed after step %d", self.tuner.step_count)

    def train(self, stop: Stop, prompts: Sequence[str]) -> bool:
        """Take all steps that are left. False if it was asked to stop before. Raises Diverged."""
        tuner, args = self.tuner, self.args
        with closing(Progress(args.steps, "step", tuner.step_count, estimate_after=5)) as progress:
            if not tuner.step_count:
                self._previews.make(self.out, tuner.step_count, prompts)
            while tuner.step_count < args.steps and not stop.asked:
                start = time.monotonic()
                loss, prior, norm = tuner.step()
                numbers = (loss, "" if prior is None else prior, norm, round(time.monotonic() - start, 4))
                self.lines.append(",".join(map(str, (tuner.step_count, *numbers))))
                progress.step(f"loss {loss:.4f}, {peak_memory(tuner.sd.device) / 1e6:.0f} MB")
                done, last = tuner.step_count, tuner.step_count == args.steps
                if last or stop.asked or done % args.save_every == 0:
                    self.save()
                if args.sample_every and (last or done % args.sample_every == 0) and not stop.asked:
                    self._previews.make(self.out, tuner.step_count, prompts)
        done = tuner.step_count >= args.steps
        if done and not all((self.out / f"{part}.safetensors").exists() for part in tuner.weights):
            self.save()  # of an earlier process, lost since
        return done

    def save(self) -> None:
        """Write the tuned weights, the log, and last the state from which `resume` continues."""
        for part, weights in self.tuner.weights.items():
            hashes = {"base_hash": self.notes[f"{part}_hash"], "step": str(self.tuner.step_count)}
            common = {key: value for key, value in self.notes.items() if not key.endswith("_hash")}
            about = {"minti": json.dumps(common | hashes, sort_keys=True)}
            write_tensors(self.out / f"{part}.safetensors", weights, about)
        write_atomically(self.out / "log.csv", "\n".join([*self.lines, ""]).encode())
        write_tensors(self.out / STATE, self.tuner.state_dict() | self.checks)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: dict[str, str] | None = None) -> None:
    """Write a safetensors file in one piece or not at all."""
    with replacing(path) as temporary:
        save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, temporary, about)
