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
STYLE = Path(__file__).with_name("report.css").read_text(encoding="utf-8")


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
