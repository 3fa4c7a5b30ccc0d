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

from .chart import chart, short
from .concept import Concept
from .config import InputError
from .files import write_atomically

MAX_PREVIEWS = 10
MAX_PIXELS = 500_000  # of a picture in the report
LONG = 5.0  # vectors this many times as long as the vocabulary's drown the rest of the prompt

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
    a, b, c = (short(loss, 4) for loss in (t.first, t.best, t.last))
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
            f"The vectors have grown to {short(norm, 2)} times the length of an ordinary word's. Such words "
            "shout: the rest of the prompt tends to be ignored."
        )
    if cosine is not None and cosine > 0.99:
        warnings.append(
            "The vectors have hardly moved from where they started, so little can be new in them."
        )
    return warnings


def _tiles(run: Run) -> str:
    t, norm, cosine, seconds = run.trend, run.final("norm"), run.final("cosine"), run.series("seconds")[1]
    tiles = []
    if t is not None:
        change = 100 * (t.last / t.first - 1) if t.first else 0.0
        note = f"{change:+.1f} % since step {t.first_step:,}".replace("-", "\N{MINUS SIGN}")
        tiles.append(("Evaluation loss", short(t.last, 4), f"{note}; best {short(t.best, 4)}"))
    if norm is not None:
        tiles.append(
            ("Length of the vectors", f"{short(norm, 2)} ×", f"an ordinary word's; {LONG:g} × is long")
        )
    if cosine is not None:
        angle = math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
        tiles.append(("Cosine to the start", f"{cosine:.2f}", f"turned by {angle:.0f}°"))
    if len(seconds):
        note = f"{run.last_step:,} steps, {short(float(np.median(seconds)))} s each"
        tiles.append(("Time in steps", _duration(float(seconds.sum())), note))
    return "".join(
        f"<div><dt>{name}</dt><dd class=value>{value}</dd><dd>{note}</dd></div>"
        for name, value, note in tiles
    )


def _advice(run: Run) -> list[tuple[str, str]]:
    """What to do next, and the command for it, if any."""
    t, folder, config = run.trend, run.folder, run.config
    top = folder.parent if run.many else folder
    lr, steps, norm = run.number("lr"), run.number("steps"), run.final("norm")

    def sample(path: Path) -> str:
        style = config.get("templates") == "style"
        prompt = (
            f"a house by the sea in the style of {run.word}"
            if style
            else f"a photo of {run.word} on the beach"
        )
        flags = [f for k in ("tokenizer", "variant", "prediction_type", "size") if config.get(k) for f in
                 (f"--{k.replace('_', '-')}", str(config[k]))] + ["--ema"] * bool(config.get("ema"))  # fmt: skip
        words = ["--checkpoint", str(config.get("checkpoint", "CHECKPOINT")), *flags, "--concept", str(path)]
        return shlex.join(
            [
                "python",
                "-m",
                "minti.sample",
                *words,
                "--prompt",
                prompt,
                "--out",
                f"{path.with_suffix('')}-pictures",
            ]
        )

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
        advice.append((text, again("--lr", short(lr / 2), "--keep", "best")))
    if kind == "falling" and steps and run.last_step >= steps:
        advice.append(("More steps should make it better still:", again("--steps", f"{2 * steps:.0f}")))
    if kind == "flat" and steps and t.flat_since < 0.5 * steps:
        advice.append((f"More steps would not help; next time about {t.flat_since:,} will do.", ""))
    if kind == "failed" and lr:
        faster = (run.final("cosine") or 0) > 0.99
        text = "hardly moved: try a higher" if faster else "moved, but not to where it helps: try a lower"
        advice.append((f"The vectors {text} learning rate. Are the photos above what you meant to show?",
                       again("--lr", short(lr * 5 if faster else lr / 5))))  # fmt: skip
    if norm is not None and norm > LONG and kind != "failed" and lr:
        text = "If prompts are ignored, bound the length of the vectors, or learn more slowly:"
        advice.append((text, again("--lr", short(lr / 2), "--max-norm", "3")))
    if (run.num_vectors or 1) > 2:
        text = f"With {run.num_vectors} vectors a word looks more like the photos but bends less to prompts."
        advice.append((f"{text} If it is too stiff, learn fewer:", again("--num-vectors", "1")))
    return advice


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


def write_report(folder: Path, nearest: Sequence[Sequence[tuple[str, float]]]) -> None:
    """Write `report.html` into the folder of a run, from the files the run left there.

    Args:
        folder: with config.yaml, log.csv, inputs.png, samples/ and learned_embeds.safetensors; what is missing
            or unreadable is left out.
        nearest: for each vector the words of the vocabulary nearest to it, with their cosines.

    Raises:
        OSError: the report cannot be written.
    """
    run = Run(Path(folder))
    word, t = escape(run.word), run.trend
    vectors = f"{run.num_vectors} vector{'s' * (run.num_vectors != 1)}" if run.num_vectors else "A word"
    start = f", started from “{escape(str(run.config['init_word']))}”" if run.config.get("init_word") else ""
    page = [
        f"<header><h1>{word}</h1><p class=soft>{vectors}{start}. Textual Inversion with minti.</p></header>",
        f"<p class=verdict>{_verdict(run)}</p>" if run.last_step else "",
        *(f"<p class=warn>{text}</p>" for text in _warnings(run)),
        f"<dl class=tiles>{tiles}</dl>" if (tiles := _tiles(run)) else "",
    ]

    def section(title: str, content: str, intro: str = "") -> None:
        if content:
            intro = f"<p class=soft>{intro}</p>" if intro else ""
            page.append(f"<section><h2>{title}</h2>{intro}{content}</section>")

    samples = {int(m[1]): p for p in sorted((run.folder / "samples").glob("*"))
               if (m := re.fullmatch(r"step-(\d+)\.png", p.name))}  # fmt: skip
    steps = sorted(samples, reverse=True)
    shown = [
        steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MAX_PREVIEWS)).astype(int))
    ]
    previews = [_picture(samples[s], f"Preview pictures after step {s}", f"step {s:,}") for s in shown]
    prompts = [str(p).replace("{}", run.word) for p in run.config.get("sample_prompt") or ["a photo of {}"]]
    intro = "Always the same seeds, newest first. " + " / ".join(f"“{escape(p)}”" for p in prompts)
    intro += f". {len(shown)} of {len(steps)} are shown; all are in samples/." * (len(shown) < len(steps))
    section("Previews", f'<div class="grid pictures">{"".join(previews)}</div>' * any(previews), intro)
    section(
        "Photos as trained", _picture(run.folder / "inputs.png", "The training photos as the model saw them")
    )
    advice = [f"<p>{escape(text)}</p>" + f"<pre>{escape(c)}</pre>" * bool(c) for text, c in _advice(run)]
    section("What to do next", "".join(advice))
    charts = [
        chart("Evaluation loss", run.series("eval_loss"), "always on the same photos, noise and times.",
               log=True, best=t and t.best_step),
        chart("Training loss", run.series("loss"), dots=True, log=True),
        chart("Length of the vectors", run.series("norm"), "in lengths of an ordinary word's.", log=True, include=[1]),
        chart("Cosine to the start", run.series("cosine"), "1: not moved.", include=[1]),
        chart("Learning rate", run.series("lr"), include=[0]),
        chart("Seconds per step", run.series("seconds"), dots=True, log=True, include=[0]),
    ]  # fmt: skip
    section("Curves", f"<div class=grid>{''.join(charts)}</div>" * any(charts))
    rows = [(f"vector {i}", "".join(f"<span>{escape(w.removesuffix('</w>'))} <i>{c:.2f}</i></span>" for w, c in words))
            for i, words in enumerate(nearest, 1)]  # fmt: skip
    intro = "Words of the vocabulary that point the same way, with the cosine; 1 is the same direction."
    section("Nearest words", _table(rows) if rows else "", intro)
    settings = [
        (escape(str(key).replace("_", " ")), escape(_value(value))) for key, value in run.config.items()
    ]
    section("Settings", f"<div class=columns>{_table(settings)}</div>" if settings else "")
    head = (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; img-src data:; style-src "
        "'unsafe-inline'\">"
        f"<title>{word} · minti</title><style>{STYLE}</style></head><body>"
    )
    html = head + "\n".join(part for part in page if part) + "</body></html>\n"
    write_atomically(run.folder / "report.html", html.encode(errors="replace"))
