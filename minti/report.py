"""report.html: what a training run has to show, in one file that opens anywhere, without network or scripts."""

from __future__ import annotations

import base64
import csv
import io
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from .concept import Concept
from .config import InputError
from .files import write_atomically

MAX_PREVIEWS = 10
MAX_PIXELS = 500_000  # of a picture in the report
LONG = 5.0  # vectors this many times as long as the vocabulary's drown the rest of the prompt
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 220, 52, 12, 12, 34  # of a chart and its margins

STYLE = """
:root { color-scheme: light; --paper: #fff; --ink: #1d2327; --soft: #5d676e; --rule: #dde1e4; --tint: #f4f6f7;
  --data: #0072b2; --mark: #c04f00; }
@media screen and (prefers-color-scheme: dark) { :root { color-scheme: dark; --paper: #16191c; --ink: #e4e7e9;
  --soft: #9ba6ad; --rule: #343a3f; --tint: #1f2428; --data: #56b4e9; --mark: #f0a030; } }
* { box-sizing: border-box; }
body { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: 2.4rem; line-height: 1.15; overflow-wrap: anywhere; }
h2 { margin: 2.8rem 0 .8rem; padding-top: .9rem; border-top: 1px solid var(--rule); font-size: 1.25rem; }
p { max-width: 44rem; margin: .5rem 0; } .soft, figcaption { color: var(--soft); font-size: .875rem; }
.verdict { margin: 1.1rem 0 0; font-size: 1.2rem; }
.warn { padding-left: .8rem; border-left: 4px solid var(--mark); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(12.5rem, 1fr)); gap: .75rem;
  margin: 1.5rem 0 0; }
.tiles div { padding: .8rem 1rem; border-radius: .5rem; background: var(--tint); }
.tiles dt { color: var(--soft); font-size: .875rem; } .tiles dd { margin: 0; font-size: .875rem; }
.tiles dd.value { font-size: 1.7rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; break-inside: avoid; } .pictures figure { margin-bottom: 1.2rem; }
figure b { display: block; } figcaption { margin-bottom: .3rem; } figcaption b { color: var(--ink); }
img { display: block; width: 100%; height: auto; border-radius: .3rem; } .small { image-rendering: pixelated; }
svg { display: block; width: 100%; height: auto; font-size: 12px; }
svg text { fill: var(--soft); } svg path { fill: none; stroke-linecap: round; stroke-linejoin: round; }
.rule { stroke: var(--rule); } .line { stroke: var(--data); stroke-width: 1.8; }
.dots { stroke: var(--data); stroke-width: 2.4; stroke-opacity: .3; }
.points { stroke: var(--data); stroke-width: 5; } .level { stroke: var(--soft); stroke-dasharray: 3 5; }
.best { fill: none; stroke: var(--mark); stroke-width: 2.2; } svg .bestword { fill: var(--mark); font-weight: 600; }
pre { margin: .4rem 0 1rem; padding: .7rem .9rem; border-radius: .5rem; background: var(--tint);
  font: .85rem/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; user-select: all; }
ul { max-width: 44rem; padding-left: 1.2rem; } li { margin: .6rem 0; }
table { border-collapse: collapse; font-size: .9rem; } tr { break-inside: avoid; }
th, td { padding: .3rem 1.2rem .3rem 0; border-bottom: 1px solid var(--rule); text-align: left;
  vertical-align: top; overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 400; white-space: nowrap; }
td span { display: inline-block; margin-right: 1.3rem; white-space: nowrap; } td i { color: var(--soft); }
.columns { columns: 24rem; column-gap: 2.5rem; } .columns table { width: 100%; } .columns th { width: 45%; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } h2 { break-after: avoid; } }
"""


@dataclass(frozen=True)
class Trend:
    """What became of the evaluation loss.

    Attributes:
        kind: "failed": never clearly below the first; "rising": the last three evaluations have lost over a
            tenth of what was gained at best; "falling": over a tenth was gained in the last quarter of the
            run; "flat": neither; "short": too few evaluations to tell.
        flat_since: the step from which 95 % of the gain had been made for good.
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
    above = np.nonzero(losses > losses[best] + 0.05 * gain)[0]
    flat = min(int(above[-1]) + 1, len(steps) - 1) if len(above) else 0
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
            self.concept = Concept.load(folder / "learned_embeds.safetensors")
            self.word, self.num_vectors = self.concept.placeholder, len(self.concept.vectors)
        except (InputError, OSError):
            self.concept, self.num_vectors = None, self.config.get("num_vectors")
            self.word = str(self.config.get("placeholder") or folder.resolve().name)
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
        entries = [e for e in config.get("concepts") or [] if isinstance(e, dict)]
        own = [e for e in entries if str(e.get("name")) == folder.resolve().name]
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


def _short(value: float, digits: int = 3) -> str:
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
    return re.sub(r"e([+-])0*", r"e\1", text).replace("e+", "e")


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {s} s" if minutes else f"{seconds:.1f} s"


def _verdict(run: Run) -> str:
    """The one line to read if nothing else is read."""
    t = run.trend
    if t is None:
        return f"Trained for {run.last_step:,} steps without evaluation: the previews have to tell."
    a, b, c = (_short(loss, 4) for loss in (t.first, t.best, t.last))
    fell = f"evaluation loss fell from {a} to {b}"
    return {
        "short": f"Too short a run to judge: evaluation loss went from {a} to {c}.",
        "failed": f"No progress to be seen: evaluation loss was {a} at step {t.first_step:,}, at best {b} "
        f"and at last {c}.",
        "rising": f"Best at step {t.best_step:,}, worse afterwards: {fell}, then rose to {c}.",
        "falling": f"Learned, and still learning at the end: {fell}, best at step {t.best_step:,}.",
        "flat": f"Learned: {fell}, best at step {t.best_step:,}, and has been flat since step {t.flat_since:,}.",
    }[t.kind]


def _warnings(run: Run) -> list[str]:
    norm, cosine = run.final("norm"), run.final("cosine")
    warnings = []
    if norm is not None and norm > LONG:
        warnings.append(
            f"The vectors have grown to {_short(norm, 2)} times the length of an ordinary word's. Such words "
            "shout: the rest of the prompt tends to be ignored."
        )
    if cosine is not None and cosine > 0.99:
        warnings.append("The vectors have hardly moved from where they started, so little can be new in them.")
    return warnings


def _tiles(run: Run) -> str:
    t, norm, cosine, seconds = run.trend, run.final("norm"), run.final("cosine"), run.series("seconds")[1]
    tiles = []
    if t is not None:
        change = 100 * (t.last / t.first - 1) if t.first else 0.0
        note = f"{change:+.1f} % since step {t.first_step:,}".replace("-", "\N{MINUS SIGN}")
        tiles.append(("Evaluation loss", _short(t.last, 4), f"{note}; best {_short(t.best, 4)}"))
    if norm is not None:
        tiles.append(("Length of the vectors", f"{_short(norm, 2)} ×", f"an ordinary word's; {LONG:g} × is long"))
    if cosine is not None:
        angle = math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
        tiles.append(("Cosine to the start", f"{cosine:.2f}", f"turned by {angle:.0f}°"))
    if len(seconds):
        note = f"{run.last_step:,} steps, {_short(float(np.median(seconds)))} s each"
        tiles.append(("Time in steps", _duration(float(seconds.sum())), note))
    return "".join(
        f"<div><dt>{name}</dt><dd class=value>{value}</dd><dd>{note}</dd></div>" for name, value, note in tiles
    )


def _advice(run: Run) -> list[tuple[str, str]]:
    """What to do next, and the command for it, if any."""
    t, folder, config = run.trend, run.folder, run.config
    top = folder.parent if run.many else folder
    lr, steps, norm = run.number("lr"), run.number("steps"), run.final("norm")

    def sample(path: Path) -> str:
        style = config.get("templates") == "style"
        prompt = f"a house by the sea in the style of {run.word}" if style else f"a photo of {run.word} on the beach"
        flags = [f for k in ("tokenizer", "variant", "prediction_type", "size") if config.get(k) for f in
                 (f"--{k.replace('_', '-')}", str(config[k]))] + ["--ema"] * bool(config.get("ema"))  # fmt: skip
        words = ["--checkpoint", str(config.get("checkpoint", "CHECKPOINT")), *flags, "--concept", str(path)]
        return shlex.join(["python", "-m", "minti.sample", *words, "--prompt", prompt, "--out", f"{path.with_suffix('')}-pictures"])

    def again(*flags: str) -> str:
        if run.many:  # flags would change the other words, too
            return ""
        again = ["--config", str(folder / "config.yaml"), "--out", f"{folder}-2", *flags]
        return shlex.join(["python", "-m", "minti.train", *again])

    advice = [("Use the word in a prompt of your own:", sample(folder / "learned_embeds.safetensors"))]
    if steps and run.last_step < steps:
        why = "stopped early or was interrupted" if config.get("early_stop") else "was interrupted"
        command = shlex.join(["python", "-m", "minti.train", "--out", str(top), "--resume"])
        advice.append((f"The run {why} at step {run.last_step:,} of {steps:,.0f}. To go on:", command))
    kind = t.kind if t else "short"
    if kind == "rising" and config.get("keep") != "best":
        saved = {int(m[1]): p for p in sorted((folder / "embeds").glob("*"))
                 if (m := re.fullmatch(r"step-(\d+)\.safetensors", p.name))}  # fmt: skip
        near = min(saved, key=lambda step: abs(step - t.best_step), default=run.last_step)
        if near != run.last_step:
            text = f"Evaluation was best at step {t.best_step:,}; the word as saved nearest to that:"
            advice.append((text, sample(saved[near])))
    if kind == "rising" and lr:
        text = "Or learn more slowly, and keep the best vectors rather than the last:"
        advice.append((text, again("--lr", _short(lr / 2), "--keep", "best")))
    if kind == "falling" and steps and run.last_step >= steps:
        advice.append(("More steps should make it better still:", again("--steps", f"{2 * steps:.0f}")))
    if kind == "flat" and steps and t.flat_since < 0.5 * steps:
        advice.append((f"More steps would not help; next time about {t.flat_since:,} will do.", ""))
    if kind == "failed" and lr:
        faster = (run.final("cosine") or 0) > 0.99
        text = "hardly moved: try a higher" if faster else "moved, but not to where it helps: try a lower"
        advice.append((f"The vectors {text} learning rate. Are the photos above what you meant to show?",
                       again("--lr", _short(lr * 5 if faster else lr / 5))))  # fmt: skip
    if norm is not None and norm > LONG and kind != "failed" and lr:
        text = "If prompts are ignored, bound the length of the vectors, or learn more slowly:"
        advice.append((text, again("--lr", _short(lr / 2), "--max-norm", "3")))
    if (run.num_vectors or 1) > 2:
        text = f"With {run.num_vectors} vectors a word looks more like the photos but bends less to prompts."
        advice.append((f"{text} If it is too stiff, learn fewer:", again("--num-vectors", "1")))
    return advice


def _ticks(low: float, high: float, log: bool) -> list[tuple[float, str]]:
    """About five round numbers between low and high, with labels; `log`: of 10 ** low to 10 ** high."""
    if log:
        numbers = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
        numbers = [v for v in numbers if low <= math.log10(v) <= high]
        keep = numbers if len(numbers) < 7 else [v for v in numbers if f"{v:e}".startswith("1.")]
        return [(math.log10(v), _short(v)) for v in keep]
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= (high - low) / 5)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    numbers = [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return [(v, f"{v:,.{decimals}f}" if decimals < 4 else _short(v)) for v in numbers]


def _chart(
    title: str,
    series: tuple[np.ndarray, np.ndarray],
    note: str = "",
    *,
    dots: bool = False,
    log: bool = False,
    include: Sequence[float] = (),
    best: int | None = None,
) -> str:
    """A curve over steps as SVG.

    Args:
        dots: values scatter: show each as a dot, and their running median as the curve.
        log: use a logarithmic scale where values span more than a factor of 30.
        include: values that the axis must reach; the first is drawn as a dashed line unless it is 0.
        best: step to mark as the best.
    """
    steps, values = series
    n = len(steps)
    if not n:
        return ""
    log = log and values.min() > 0 and values.max() > 30 * values.min()
    scale = np.log10 if log else np.asarray
    inside = scale([v for v in (*values, *include) if v > 0 or not log])
    low, high = float(inside.min()), float(inside.max())
    margin = max(0.06 * (high - low), 0.01 * abs(high), 1e-9)
    low, high = low - margin * (0 if low == 0 else 4 if best is not None else 1), high + margin
    end = max(float(steps[-1]), 1.0)

    def points(x: np.ndarray, y: np.ndarray, count: int) -> list[str]:
        keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), count)).round().astype(int))
        px = LEFT + x[keep] / end * (WIDTH - LEFT - RIGHT)
        py = HEIGHT - BOTTOM - (scale(y[keep]) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return [f"{a:.1f} {b:.1f}" for a, b in zip(px, py, strict=True)]

    svg = []
    for v, label in _ticks(low, high, log):
        y = HEIGHT - BOTTOM - (v - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        svg.append(f'<path class=rule d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        svg.append(f'<text x={LEFT - 7} y={y + 4:.1f} text-anchor=end>{label}</text>')
    for v, label in _ticks(0, end, False):
        if v == int(v):
            x = LEFT + v / end * (WIDTH - LEFT - RIGHT)
            anchor = "end" if v > 0.95 * end else "middle"
            svg.append(f'<text x={x:.1f} y={HEIGHT - BOTTOM + 17} text-anchor={anchor}>{label}</text>')
    svg.append(f'<text x={(LEFT + WIDTH - RIGHT) / 2} y={HEIGHT - 2} text-anchor=middle>step</text>')
    if include and include[0]:
        y = points(np.zeros(1), np.array(include[:1]), 1)[0].split()[1]
        svg.append(f'<path class=level d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
    if dots and n > 40:
        half = max(3, n // 60)
        centres = np.unique(np.linspace(0, n - 1, min(n, 300)).round().astype(int))
        medians = np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in centres])
        svg.append(f'<path class=dots d="M{"h0M".join(points(steps, values, 1500))}h0"/>')
        svg.append(f'<path class=line d="M{"L".join(points(steps[centres], medians, 300))}"/>')
        note = f"dots: single steps; line: median of {2 * half + 1} steps. {note}"
    else:
        svg.append(f'<path class=line d="M{"L".join(points(steps, values, 400))}"/>')
        if n <= 40:
            svg.append(f'<path class=points d="M{"h0M".join(points(steps, values, 40))}h0"/>')
    if best is not None:
        x, y = points(steps[steps == best][:1], values[steps == best][:1], 1)[0].split()
        anchor = "start" if float(x) < 140 else "end" if float(x) > WIDTH - 100 else "middle"
        svg.append(f'<circle class=best cx={x} cy={y} r=6 />')
        svg.append(f'<text class=bestword x={x} y={float(y) + 21:.1f} text-anchor={anchor}>best: step {best:,}</text>')
    label = f"{title}: {_short(float(values[0]), 4)} at step {steps[0]:.0f}, {_short(float(values[-1]), 4)} at step {steps[-1]:.0f}"
    return (
        f"<figure><figcaption><b>{title}</b> {note}{' Logarithmic scale.' * log}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{label}">{"".join(svg)}</svg></figure>'
    )


def _picture(path: Path, alt: str, caption: str = "") -> str:
    """A picture with the file inside: as PNG, or as JPEG where that would be too large; "" if unreadable."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError):
        return ""
    shrink = math.sqrt(MAX_PIXELS / (image.width * image.height))
    if shrink < 1:
        image = image.resize((max(1, int(image.width * shrink)), max(1, int(image.height * shrink))))
    kind, content = "png", io.BytesIO()
    image.save(content, "PNG", optimize=True)
    if content.tell() > 100_000:
        kind, content = "jpeg", io.BytesIO()
        image.save(content, "JPEG", quality=85)
    data = base64.b64encode(content.getvalue()).decode()
    small = f' class=small style="max-width:{4 * image.width}px"' if image.width < 600 else ""
    return (
        f"<figure{' class=wide' * (image.width > 1.8 * image.height)}><figcaption>{escape(caption)}</figcaption>"
        f'<img{small} src="data:image/{kind};base64,{data}" width={image.width} height={image.height} alt="{escape(alt)}"></figure>'
    )


def _value(value: object) -> str:
    """A setting as it could stand in the YAML file."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "<table>" + "".join(f"<tr><th scope=row>{a}</th><td>{b}</td></tr>" for a, b in rows) + "</table>"
