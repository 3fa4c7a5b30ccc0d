"""What a training run has come to, in plain words, and what to do next."""

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..cli.model_options import OF_A_MODEL
from ..cli.svg import short
from .folder import RunRecord

LONG = 5.0  # vectors this many times as long as the vocabulary's drown the rest of the prompt
UNMOVED = 0.99  # cosine to the start above which next to nothing has been learned


@dataclass(frozen=True)
class Trend:
    """The course of the evaluation loss.

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


def trend_of(run: RunRecord) -> Trend | None:
    """The trend of a run's evaluation loss; None if it was never evaluated."""
    steps, losses = run.series("eval_loss")
    return trend(steps, losses) if len(steps) else None


def verdict(run: RunRecord) -> str:
    """The result in one sentence."""
    t = trend_of(run)
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


def warnings(run: RunRecord) -> list[str]:
    """Signs of a bad word that the evaluation loss does not show."""
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


def advice(run: RunRecord) -> list[tuple[str, str]]:
    """What to do next: sentences, each with the command that does it, or ""."""
    t, config, steps = trend_of(run), run.config, run.number("steps")
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
        command = command_line(["python", "-m", "minti.train", "--out", str(folder), "--resume"])
        found.append((f"The run {why} at step {run.last_step:,} of {steps:,.0f}. Go on with it", command))
    if kind == "flat" and steps and t.flat_since < 0.5 * steps:
        found.append((f"More steps would not help; next time about {t.flat_since:,} will do", ""))
    if changes := _changes(run, kind):
        flags = [part for flag, (value, _) in changes.items() for part in (flag, value)]
        where = ["--config", str(run.folder / "config.yaml"), "--out", f"{run.folder}-2"]
        # A flag would change the other words of a run, too.
        command = "" if run.many else command_line(["python", "-m", "minti.train", *where, *flags])
        found.append((f"Train again with {', '.join(what for _, what in changes.values())}", command))
    if (run.num_vectors or 1) > 2:
        text = f"A word of {run.num_vectors} vectors is closer to the photos, but bends less to the prompt"
        found.append((f"{text}; if it is too stiff, train again with fewer", ""))
    return found


def _changes(run: RunRecord, kind: str) -> dict[str, tuple[str, str]]:
    """Flags for another run, each with its value and what it means."""
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


def sample(run: RunRecord, file: str) -> str:
    """The command that makes pictures with vectors saved in the folder of the run."""
    config, path = run.config, run.folder / file
    scene = "a house by the sea in the style of" if config.get("templates") == "style" else "a photo of"
    model = ["--checkpoint", str(config.get("checkpoint", "CHECKPOINT"))]
    for key in (*OF_A_MODEL, "size"):
        flag, value = f"--{key.replace('_', '-')}", config.get(key)
        if value not in (None, False, "auto"):
            model += [flag] if value is True else [flag, str(value)]
    prompt = f"{scene} {run.word}"
    if scene == "a photo of":
        prompt += " on the beach"
    words = ["--concept", str(path), "--prompt", prompt, "--out", f"{path.with_suffix('')}-pictures"]
    return command_line(["python", "-m", "minti.sample", *model, *words])


def command_line(parts: Sequence[str], windows: bool = os.name == "nt") -> str:
    """A command to be pasted into a shell: of POSIX, or cmd and PowerShell on Windows."""
    if not windows:
        return shlex.join(parts)
    quoted = ['"' + part.replace('"', '\\"') + '"' for part in parts]
    return " ".join(p if re.fullmatch(r"[\w.:/\\-]+", p) else q for p, q in zip(parts, quoted, strict=True))
