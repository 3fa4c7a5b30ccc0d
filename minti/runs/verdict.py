"""What a training run has come to, in plain words, read from the files it left."""

from __future__ import annotations

import csv
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..cli.svg import short
from ..errors import InputError
from ..formats.concept import Concept

LONG = 5.0  # vectors this many times as long as the vocabulary's drown the rest of the prompt
UNMOVED = 0.99  # cosine to the start above which next to nothing has been learned


@dataclass(frozen=True)
class Trend:
    """What became of the evaluation loss.

    Attributes:
        kind: "failed": never clearly below the first; "rising": the last three evaluations have lost over a
            tenth of what was gained at best; "falling": over a tenth was gained in the last quarter of the
            run; "flat": neither; "short": too few evaluations to tell.
        flat_since: the step at which nine tenths of the gain had been made.
    """

    kind: str
    first: float
    first_step: int
    best: float
    best_step: int
    last: float
    flat_since: int


def trend(steps: np.ndarray, losses: np.ndarray) -> Trend:
    """Judge evaluation losses, (N,) each and N at least 1, by step."""
    best = int(losses.argmin())
    gain = losses[0] - losses[best]
    flat = int((losses <= losses[best] + 0.1 * gain).argmax())
    before = np.interp(steps[0] + 0.75 * (steps[-1] - steps[0]), steps, losses)
    if len(steps) < 4:
        kind = "short"
    elif gain < 0.005 * abs(losses[0]):
        kind = "failed"
    elif best < len(steps) - 2 and losses[-3:].min() > losses[best] + 0.1 * gain:
        kind = "rising"
    elif before - losses[-3:].min() > 0.1 * gain:
        kind = "falling"
    else:
        kind = "flat"
    first, lowest, last = (float(losses[i]) for i in (0, best, -1))
    return Trend(kind, first, int(steps[0]), lowest, int(steps[best]), last, int(steps[flat]))


class Run:
    """What a run left in its folder; parts that are missing or unreadable are empty."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config, self.many = _read_config(folder)
        self.log = _read_log(folder / "log.csv")
        try:
            concept = Concept.load(folder / "learned_embeds.safetensors")
            self.word, self.num_vectors = concept.placeholder, len(concept.vectors)
        except (InputError, OSError):
            self.word, self.num_vectors = str(self.config.get("placeholder") or folder.resolve().name), None
        steps, losses = self.series("eval_loss")
        self.trend = trend(steps, losses) if len(steps) else None
        self.last_step = int(self.log["step"][-1]) if len(self.log["step"]) else 0

    def series(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a column where it has any."""
        there = np.isfinite(self.log[column])
        return self.log["step"][there], self.log[column][there]

    def final(self, column: str) -> float | None:
        """The last value of a column."""
        values = self.series(column)[1]
        return float(values[-1]) if len(values) else None

    def numbered(self, name: str, suffix: str) -> list[Path]:
        """The files `step-000500.png` and so on of a folder, by step."""
        return sorted(p for p in (self.folder / name).glob(f"step-*.{suffix}") if p.stem[5:].isdecimal())

    def number(self, key: str) -> float | None:
        """A setting that is a number."""
        try:
            return float(self.config[key])
        except (KeyError, TypeError, ValueError):
            return None


def _read_config(folder: Path) -> tuple[dict[str, Any], bool]:
    """The settings of a run; of a run with several words, those of the word whose folder this is."""
    for path in (folder / "config.yaml", folder.parent / "config.yaml"):
        try:
            config = yaml.safe_load(path.read_bytes())
        except (OSError, yaml.YAMLError):
            continue
        if not isinstance(config, dict):
            continue
        entries = config["concepts"] if isinstance(config.get("concepts"), list) else []
        own = [e for e in entries if isinstance(e, dict) and str(e.get("name")) == folder.resolve().name]
        if path.parent == folder or own:
            config.pop("concepts", None)
            return (config | own[0], True) if own else (config, False)
    return {}, False


def _read_log(path: Path) -> dict[str, np.ndarray]:
    """The columns of log.csv, (steps,) each, nan where there is no number."""

    def value(text: str | None) -> float:
        try:
            return float(text or "nan")
        except ValueError:
            return math.nan

    try:
        with path.open(newline="", errors="replace") as file:
            rows = [row for row in csv.DictReader(file) if math.isfinite(value(row.get("step")))]
    except OSError:
        rows = []
    columns = ("step", "loss", "eval_loss", "lr", "norm", "cosine", "seconds")
    return {column: np.array([value(row.get(column)) for row in rows]) for column in columns}


def verdict(run: Run) -> str:
    """The one line to read if nothing else is read."""
    t = run.trend
    if t is None and not run.last_step:
        return "Nothing has been logged yet."
    if t is None:
        return f"Trained to step {run.last_step:,} without evaluation: judge by the pictures."
    a, b, c = (short(loss, 4) for loss in (t.first, t.best, t.last))
    fell = f"evaluation loss fell from {a} to {b}"
    return {
        "short": f"Too short a run to judge: evaluation loss went from {a} to {c}.",
        "failed": f"No progress to be seen: evaluation loss was {a} at step {t.first_step:,}, at best {b} "
        f"and at last {c}.",
        "rising": f"Best at step {t.best_step:,}, worse afterwards: {fell}, then rose to {c}.",
        "falling": f"Learned, and still learning at the end: {fell}, best at step {t.best_step:,}.",
        "flat": f"Learned: {fell}, best at step {t.best_step:,}; little change since step {t.flat_since:,}.",
    }[t.kind]


def warnings(run: Run) -> list[str]:
    """What should give pause whatever the evaluation says."""
    norm, cosine = run.final("norm"), run.final("cosine")
    found = []
    if norm is not None and norm > LONG:
        found.append(
            f"The vectors have grown to {norm:,.1f} times the length of an ordinary word's. Such a word "
            "drowns the others: the rest of the prompt tends to be ignored."
        )
    if cosine is not None and cosine > UNMOVED:
        found.append("The vectors still point where they started, so they can hold little that is new.")
    return found


def advice(run: Run) -> list[tuple[str, str]]:
    """What to do next: sentences, each with a command to do it, or ""."""
    t, config, steps = run.trend, run.config, run.number("steps")
    kind = t.kind if t else "short"
    best = f" (its vectors at step {t.best_step:,}, the best)" if t and config.get("keep") == "best" else ""
    found = [(f"Use the word{best} in a prompt of your own", sample(run, "learned_embeds.safetensors"))]
    if kind == "rising" and not best:
        saved = {int(path.stem[5:]): path for path in run.numbered("embeds", "safetensors")}
        nearest = min(saved, key=lambda step: abs(step - t.best_step), default=run.last_step)
        if nearest != run.last_step:
            text = f"It was best at step {t.best_step:,}. Compare with the vectors saved at step {nearest:,}"
            found.append((text, sample(run, f"embeds/{saved[nearest].name}")))
    if steps and run.last_step < steps:
        why = "stopped early or was interrupted" if config.get("early_stop") else "was interrupted"
        folder = run.folder.parent if run.many else run.folder
        command = shlex.join(["python", "-m", "minti.train", "--out", str(folder), "--resume"])
        found.append((f"The run {why} at step {run.last_step:,} of {steps:,.0f}. Go on with it", command))
    if kind == "flat" and steps and t.flat_since < 0.5 * steps:
        found.append((f"More steps would not help; next time about {t.flat_since:,} will do", ""))
    if changes := _changes(run, kind):
        flags = [part for flag, (value, _) in changes.items() for part in (flag, value)]
        where = ["--config", str(run.folder / "config.yaml"), "--out", f"{run.folder}-2"]
        # A flag would change the other words of a run, too.
        command = "" if run.many else shlex.join(["python", "-m", "minti.train", *where, *flags])
        found.append((f"Train again with {', '.join(what for _, what in changes.values())}", command))
    if (run.num_vectors or 1) > 2:
        text = f"A word of {run.num_vectors} vectors is closer to the photos, but bends less to the prompt"
        found.append((f"{text}; if it is too stiff, train again with fewer", ""))
    return found


def _changes(run: Run, kind: str) -> dict[str, tuple[str, str]]:
    """Flags for another try, each with its value and what it means."""
    lr, steps, norm = run.number("lr"), run.number("steps"), run.final("norm")
    changes = {}
    if kind == "failed" and lr:
        slow = (run.final("cosine") or 0.0) > UNMOVED
        changes["--lr"] = (
            short(5 * lr if slow else lr / 5),
            f"a {'higher' if slow else 'lower'} learning rate",
        )
    elif lr and (kind == "rising" or (norm or 0.0) > LONG):
        changes["--lr"] = short(lr / 2), "a lower learning rate"
    if kind == "rising":
        changes["--keep"] = "best", "the best vectors kept rather than the last"
    if (norm or 0.0) > LONG:
        changes["--max-norm"] = "3", "a bound on the length of the vectors"
    if kind == "falling" and steps and run.last_step >= steps:
        changes["--steps"] = f"{2 * steps:.0f}", "more steps"
    return changes


def sample(run: Run, file: str) -> str:
    """The command that makes pictures with vectors saved in the folder of the run."""
    config, path = run.config, run.folder / file
    scene = "a house by the sea in the style of" if config.get("templates") == "style" else "a photo of"
    model = ["--checkpoint", str(config.get("checkpoint", "CHECKPOINT"))]
    for key in ("tokenizer", "variant", "vae", "prediction_type", "size"):
        if config.get(key):
            model += [f"--{key.replace('_', '-')}", str(config[key])]
    model += ["--ema"] * (config.get("ema") is True)
    prompt = f"{scene} {run.word}" + " on the beach" * (scene == "a photo of")
    words = ["--concept", str(path), "--prompt", prompt, "--out", f"{path.with_suffix('')}-pictures"]
    return shlex.join(["python", "-m", "minti.sample", *model, *words])
