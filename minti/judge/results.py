"""What an evaluation leaves: a table of scores, evaluation.json, plot.svg and sheets of the pictures."""

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


def score_table(evaluations: Sequence[Evaluation]) -> str:
    """The scores as text in columns, each with the margin of its interval."""
    lines = [("", "CLIP-I", "CLIP-T", "CLIP-T pairwise", "trade-off")]
    for e in evaluations:
        scores = ["-" if getattr(e, name) is None else str(getattr(e, name)) for name in SCORES]
        lines.append((e.name, *scores))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation as plain numbers of six digits, with the intervals and the scores of each prompt."""

    def flat(item: Any) -> dict[str, Any]:
        values = {key: value for key, value in vars(item).items() if key != "prompts"}
        scores = {name: value for name, value in values.items() if isinstance(value, Score)}
        intervals = {n: [round(x, 6) for x in s.interval] for n, s in scores.items() if s.interval}
        values |= {name: round(score.value, 6) for name, score in scores.items()}
        return values | {"intervals": intervals}

    return flat(evaluation) | {"prompts": [flat(prompt) for prompt in evaluation.prompts]}


def report(evaluations: Sequence[Evaluation], model: Mapping[str, Any], settings: Mapping[str, Any]) -> bytes:
    """evaluation.json: first the scores of the best word, or of the last one that was scored; then all."""
    scored = [e for e in evaluations if e.prompts]
    lead = as_json(best(evaluations) or ([e for e in scored if e.kind == "word"] or scored)[-1])
    keys = ("name", *SCORES, "intervals")
    value = {key: lead[key] for key in keys} | {"model": model, "settings": settings}
    value |= {"prompts": lead["prompts"], "evaluations": [as_json(e) for e in evaluations]}
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def score_point(evaluation: Evaluation, series: str, joined: bool) -> Point:
    """CLIP-T and CLIP-I of an evaluation as a point of a plot. Only joined points use `series`."""
    e = evaluation
    label = e.name if len(e.name) <= 36 else f"{e.name[:33]}..."
    if not joined:
        series = "reference" if e.kind.endswith("only") else e.kind
    return Point(e.clip_t.value, e.clip_i.value, label, series, joined, e.clip_t.interval, e.clip_i.interval)


def score_plot(points: Sequence[Point]) -> str:
    """Reconstruction against editability as SVG; "" if there are no points."""
    labels = "editability, CLIP-T", "reconstruction, CLIP-I"
    return scatter("Reconstruction against editability", *labels, points)


def plot(evaluations: Sequence[Evaluation]) -> str:
    """The plot of evaluations that have a CLIP-T; the steps of a run are joined."""
    return score_plot(
        [
            score_point(e, "word", e.kind == "word" and e.name.startswith("step "))
            for e in evaluations
            if e.clip_t
        ]
    )


def write_sheet(path: Path, pictures: Mapping[str, Sequence[Image.Image]]) -> None:
    """Write a sheet with a line of pictures for each prompt; they may differ in number and size."""
    columns = min(COLUMNS, max(map(len, pictures.values())))
    blank = Image.new("RGB", (1, 1), "white")
    cells = []
    for line in pictures.values():
        cells += [*line[:columns], *[blank] * (columns - len(line))]
    about = {"prompts": json.dumps(list(pictures), ensure_ascii=False)}
    write_atomically(path, encode_png(image_grid(thumbnails(cells), columns), about))
