"""What an evaluation has to show: a table, evaluation.json, plot.svg and grids of the pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..cli.images import COLUMNS, encode_png, image_grid, thumbnails
from ..cli.svg import Point, scatter
from ..formats.atomic import write_atomically
from .benchmark import Evaluation, best
from .scores import Score

SCORES = ("clip_i", "clip_t", "clip_t_pairwise", "tradeoff")


def table(evaluations: Sequence[Evaluation]) -> str:
    """The scores for people, each with its interval."""
    rows = [("", "CLIP-I", "CLIP-T", "CLIP-T pairwise", "trade-off")]
    for e in evaluations:
        scores = ["-" if getattr(e, name) is None else str(getattr(e, name)) for name in SCORES]
        rows.append((e.name, *scores))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation as plain numbers, with the intervals beside them and a row for each prompt.

    Six digits are what float32 has, and are the same on every machine, or nearly so.
    """

    def flat(item: Any) -> dict[str, Any]:
        values = {key: value for key, value in vars(item).items() if key != "rows"}
        scores = {name: value for name, value in values.items() if isinstance(value, Score)}
        intervals = {n: [round(x, 6) for x in s.interval] for n, s in scores.items() if s.interval}
        values |= {name: round(score.value, 6) for name, score in scores.items()}
        return values | {"intervals": intervals}

    return flat(evaluation) | {"prompts": [flat(row) for row in evaluation.rows]}


def report(evaluations: Sequence[Evaluation], model: Mapping[str, Any], settings: Mapping[str, Any]) -> bytes:
    """evaluation.json: on top what the best word came to, or the last one that was scored; then all."""
    scored = [e for e in evaluations if e.rows]
    lead = as_json(best(evaluations) or ([e for e in scored if e.kind == "word"] or scored)[-1])
    keys = ("name", *SCORES, "intervals")
    value = {key: lead[key] for key in keys} | {"model": model, "settings": settings}
    value |= {"prompts": lead["prompts"], "evaluations": [as_json(e) for e in evaluations]}
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def plot(evaluations: Sequence[Evaluation]) -> str:
    """Reconstruction against editability as SVG; the steps of a run are joined."""

    def point(e: Evaluation) -> Point:
        label = e.name if len(e.name) <= 36 else f"{e.name[:33]}..."
        series = "reference" if e.kind.endswith("only") else e.kind
        joined = e.kind == "word" and e.name.startswith("step ")
        intervals = e.clip_t.interval, e.clip_i.interval
        return Point(e.clip_t.value, e.clip_i.value, label, series, joined, *intervals)

    points = [point(e) for e in evaluations if e.clip_t]
    return scatter(
        "Reconstruction against editability", "editability, CLIP-T", "reconstruction, CLIP-I", points
    )


def write_sheet(path: Path, pictures: Mapping[str, Sequence[Image.Image]]) -> None:
    """A grid with a row of pictures for each prompt; they may differ in number and size."""
    rows = pictures.values()
    columns = min(COLUMNS, max(map(len, rows)))
    blank = Image.new("RGB", (1, 1), "white")
    cells = [cell for row in rows for cell in [*row[:columns], *[blank] * (columns - len(row))]]
    about = {"prompts": json.dumps(list(pictures), ensure_ascii=False)}
    write_atomically(path, encode_png(image_grid(thumbnails(cells), columns), about))
