"""report.html: what a training run has to show, in one file that needs no network and runs no script."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from .chart import chart, short
from .files import write_atomically
from .verdict import LONG, Run, advice, verdict, warnings

MAX_PREVIEWS = 10
MAX_PIXELS = 500_000  # of a picture in the report
MAX_PNG = 100_000  # bytes

HEAD = """<!doctype html>
<html lang=en><head><meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<meta http-equiv=Content-Security-Policy
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
"""
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
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem;
  margin: 1.5rem 0 0; }
.tiles div { padding: .7rem .8rem; border-radius: .5rem; background: var(--tint); }
.tiles dt { color: var(--soft); font-size: .875rem; } .tiles dd { margin: 0; font-size: .875rem; }
.tiles dd.value { font-size: 1.4rem; line-height: 1.5; white-space: nowrap; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.5rem; }
figure { margin: 0 0 1.2rem; break-inside: avoid; } .grid figure { margin: 0; }
figcaption b { display: block; color: var(--ink); } figcaption { margin-bottom: .3rem; }
img { display: block; width: 100%; height: auto; border-radius: .3rem; }
.small { image-rendering: pixelated; }
svg { display: block; width: 100%; height: auto; font-size: 12px; }
svg text { fill: var(--soft); } svg path { fill: none; stroke-linecap: round; stroke-linejoin: round; }
.rule { stroke: var(--rule); } .line { stroke: var(--data); stroke-width: 1.8; }
.dots { stroke: var(--data); stroke-width: 2.4; stroke-opacity: .4; }
.points { stroke: var(--data); stroke-width: 5; } .level { stroke: var(--soft); stroke-dasharray: 3 5; }
.best { fill: none; stroke: var(--mark); stroke-width: 2.2; }
svg .bestword { fill: var(--mark); font-weight: 600; }
pre span { white-space: nowrap; }
pre { margin: .4rem 0 1rem; padding: .7rem .9rem; border-radius: .5rem; background: var(--tint);
  font: .85rem/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; user-select: all; }
table { border-collapse: collapse; font-size: .9rem; } tr { break-inside: avoid; }
th, td { padding: .3rem 1.2rem .3rem 0; border-bottom: 1px solid var(--rule); text-align: left;
  vertical-align: top; overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 400; white-space: nowrap; }
td span { display: inline-block; margin-right: 1.3rem; white-space: nowrap; } td i { color: var(--soft); }
.columns { columns: 24rem; column-gap: 2.5rem; } .columns table { width: 100%; } .columns th { width: 45%; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } h2, h2 + p { break-after: avoid; }
  img { width: auto; max-width: 100%; max-height: 6cm; } .columns { columns: 2; }
  .grid { grid-template-columns: 1fr 1fr; } }
"""


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {s} s" if minutes else f"{seconds:.1f} s"


def _tiles(run: Run) -> str:
    t, norm, cosine, seconds = run.trend, run.final("norm"), run.final("cosine"), run.series("seconds")[1]
    tiles = []
    if t is not None:
        change = 100 * (t.last / t.first - 1) if t.first else 0.0
        note = f"{change:+.1f} % since step {t.first_step:,}".replace("-", "\N{MINUS SIGN}")
        tiles.append(("Evaluation loss", short(t.last, 4), f"{note}; best {short(t.best, 4)}"))
    if norm is not None:
        note = f"as long as ordinary words; over {LONG:g} is too long"
        tiles.append(("Length of the vectors", f"{norm:,.1f} times", note))
    if cosine is not None:
        angle = math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
        tiles.append(("Cosine to the start", f"{cosine:.2f}", f"turned by {angle:.0f}°"))
    if len(seconds):
        note = f"{len(seconds):,} steps, median {short(float(np.median(seconds)))} s"
        tiles.append(("Time in steps", _duration(float(seconds.sum())), note))
    cells = [f"<div><dt>{a}</dt><dd class=value>{b}</dd><dd>{c}</dd></div>" for a, b, c in tiles]
    return f"<dl class=tiles>{''.join(cells)}</dl>" * bool(cells)


def picture(path: Path, alt: str, caption: str = "") -> str:
    """A picture, embedded as PNG, or as JPEG where that would be large; "" if it is unreadable."""
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
    if content.tell() > MAX_PNG:
        kind, content = "jpeg", io.BytesIO()
        image.save(content, "JPEG", quality=85)
    source = f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
    small = f' class=small style="max-width:{4 * image.width}px"' if image.width < 600 else ""
    size = f"width={image.width} height={image.height}"
    caption = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure>{caption}<img{small} src="{source}" {size} alt="{escape(alt)}"></figure>'


def _previews(run: Run) -> tuple[str, str]:
    """Preview pictures, newest first, and what they are."""
    paths = run.numbered("samples", "png")[::-1]
    chosen = [
        paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, min(len(paths), MAX_PREVIEWS), dtype=int))
    ]
    steps = [f"step {int(path.stem[5:]):,}" for path in chosen]
    figures = [picture(p, f"Preview pictures at {s}", s) for p, s in zip(chosen, steps, strict=True)]
    prompts = run.config.get("sample_prompt") or ["a photo of {}"]
    prompts = ", ".join(f"“{p}”".replace("{}", run.word) for p in prompts)
    about = f"{prompts}, newest first, always from the same noise."
    if len(chosen) < len(paths):
        about += f" Here are {len(chosen)} of {len(paths)}; all are in the folder samples."
    grid = f"{figures[0]}<div class=grid>{''.join(figures[1:])}</div>" if any(figures) else ""
    return grid, about


def _curves(run: Run) -> str:
    length = "In mean lengths of the vocabulary's vectors."
    best = run.trend.best_step if run.trend else None
    fixed = "Always on the same photos, noise and times."
    charts = [
        chart("Evaluation loss", run.series("eval_loss"), fixed, log=True, best=best),
        chart("Training loss", run.series("loss"), dots=True, log=True),
        chart("Length of the vectors", run.series("norm"), length, log=True, include=[1]),
        chart("Cosine to the start", run.series("cosine"), "1 is where they started.", include=[1]),
        chart("Learning rate", run.series("lr"), "Of AdamW.", include=[0]),
        chart("Seconds per step", run.series("seconds"), dots=True, include=[0]),
    ]
    return f"<div class=grid>{''.join(charts)}</div>" * any(charts)


def _next(run: Run) -> str:
    parts = []
    for text, command in advice(run):
        parts.append(f"<p>{escape(text)}{':' if command else '.'}</p>")
        if command:  # a line may end before a flag, but not within "--"
            flags = re.sub(r"(?<= )(--[\w-]+)", r"<span>\1</span>", escape(command))
            parts.append(f"<pre>{flags}</pre>")
    return "".join(parts)


def _nearest(nearest: Sequence[Sequence[tuple[str, float]]]) -> str:
    def cell(words: Sequence[tuple[str, float]]) -> str:
        return "".join(
            f"<span>{escape(w.removesuffix('</w>'))} <i>{cosine:.2f}</i></span>" for w, cosine in words
        )

    return _table([(f"vector {i}", cell(words)) for i, words in enumerate(nearest, 1) if words])


def _settings(run: Run) -> str:
    def text(value: object) -> str:
        if isinstance(value, list):
            return ", ".join(map(text, value)) or "none"
        return str(value).lower() if isinstance(value, bool) else str(value)

    table = _table([(escape(str(key)), escape(text(value))) for key, value in run.config.items()])
    return f"<div class=columns>{table}</div>" * bool(table)


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th scope=row>{head}</th><td>{cell}</td></tr>" for head, cell in rows)
    return f"<table>{cells}</table>" * bool(rows)


def write_report(folder: Path, nearest: Sequence[Sequence[tuple[str, float]]]) -> None:
    """Write `report.html` into the folder of a run, from the files the run left there.

    Args:
        folder: with config.yaml, log.csv, inputs.png, samples/ and learned_embeds.safetensors; what is
            missing or unreadable is left out.
        nearest: for each vector the words of the vocabulary nearest to it, with their cosines.

    Raises:
        OSError: the report cannot be written.
    """
    run = Run(Path(folder))
    word = escape(run.word)
    count = {None: "A learned word", 1: "1 vector"}.get(run.num_vectors, f"{run.num_vectors} vectors")
    source = run.config.get("init_word") if run.config.get("init") != "random" else "random numbers"
    start = f", started from “{escape(str(source))}”" if source else ""
    previews, about = _previews(run)
    inputs = picture(run.folder / "inputs.png", "The training photos as the model saw them")
    same = "Words of the vocabulary that point the same way, with the cosine: 1 is the same direction."
    sections = [
        ("Previews", about, previews),
        ("Photos as trained", "", inputs),
        ("What to do next", "", _next(run)),
        ("Curves", "", _curves(run)),
        ("Nearest words", same, _nearest(nearest)),
        ("Settings", "", _settings(run)),
    ]
    body = [
        f"<h1>{word}</h1><p class=soft>{count}{start}.</p>",
        f"<p class=verdict>{escape(verdict(run))}</p>",
        *(f"<p class=warn>{escape(text)}</p>" for text in warnings(run)),
        _tiles(run),
    ]
    for title, intro, content in sections:
        if content:
            intro = f"<p class=soft>{escape(intro)}</p>" if intro else ""
            body.append(f"<section><h2>{title}</h2>{intro}{content}</section>")
    body = "\n".join(part for part in body if part)
    html = f"{HEAD}<title>{word} · minti</title><style>{STYLE}</style></head>\n<body>{body}</body></html>\n"
    write_atomically(run.folder / "report.html", html.encode(errors="replace"))
