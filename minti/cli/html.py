"""HTML reports: the page, its style, tables and pictures."""

import base64
import hashlib
import io
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from ..errors import InputError
from ..formats.photos import reading_picture

MAX_PIXELS = 500_000  # of a picture in the report
MAX_PNG = 100_000  # bytes

HEAD = """<!doctype html>
<html lang=en><head><meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<meta http-equiv=Content-Security-Policy
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'{policy}">
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


def picture(path: Path, alt: str, caption: str = "") -> str:
    """A picture, embedded as PNG, or as JPEG where that would be large; "" if it is unreadable."""
    try:
        with reading_picture(path), Image.open(path) as file:
            image = file.convert("RGB")
    except InputError:
        return ""
    shrink = math.sqrt(MAX_PIXELS / (image.width * image.height))
    if shrink < 1:
        image = image.resize((max(1, int(image.width * shrink)), max(1, int(image.height * shrink))))
    small = f' class=small style="max-width:{4 * image.width}px"' if image.width < 600 else ""
    size = f"width={image.width} height={image.height}"
    caption = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure>{caption}<img{small} src="{source(image)}" {size} alt="{escape(alt)}"></figure>'


def source(image: Image.Image) -> str:
    """A picture as an address that holds all of it: as PNG, or as JPEG where that would be large."""
    kind, content = "png", io.BytesIO()
    image.save(content, "PNG", optimize=True)
    if content.tell() > MAX_PNG:
        kind, content = "jpeg", io.BytesIO()
        image.save(content, "JPEG", quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def page(
    title: str,
    top: Iterable[str],
    sections: Iterable[tuple[str, str, str]] = (),
    style: str = "",
    script: str = "",
) -> str:
    """A page that needs no network, and runs no script but the one given.

    Args:
        title: as HTML.
        top: HTML above the sections; "" is left out.
        sections: heading, introduction in plain text, or "", and HTML; those without HTML are left out.
        style: CSS beside that of all reports.
        script: JavaScript.
    """
    body = [part for part in top if part]
    for heading, intro, content in sections:
        if content:
            text = f"<p class=soft>{escape(intro)}</p>" if intro else ""
            body.append(f"<section><h2>{heading}</h2>{text}{content}</section>")
    policy = ""
    if script:
        policy = (
            f"; script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        )
        body.append(f"<script>{script}</script>")
    head = f"{HEAD.format(policy=policy)}<title>{title} · minti</title><style>{STYLE}{style}</style></head>"
    joined = "\n".join(body)
    return f"{head}\n<body>{joined}</body></html>\n"


def table(rows: Sequence[tuple[str, str]]) -> str:
    """A table of two columns, heading and text, both as HTML; "" if it is empty."""
    cells = "".join(f"<tr><th scope=row>{head}</th><td>{cell}</td></tr>" for head, cell in rows)
    return f"<table>{cells}</table>" if rows else ""
