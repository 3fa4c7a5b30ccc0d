"""report.html: the results of a training run in one file that needs no network and runs no script."""

import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..cli.html import page, picture, table
from ..cli.progress import duration
from ..cli.svg import chart, short
from ..formats.atomic import write_atomically
from ..model.output_embedding import TextEncoderWithOutputs
from ..model.stable_diffusion import StableDiffusion
from .folder import RunRecord
from .verdict import LONG, advice, trend_of, verdict, warnings

MAX_PREVIEWS = 10
KINDS = {
    "per_layer": "for each cross-attention layer of the UNet",
    "output_embedding": "in the place of the text encoder's output (output embedding)",
}
"""What the report says of a word, beside the count of its vectors, where one of these options was given."""


def _tiles(run: RunRecord) -> str:
    t, norm, cosine, seconds = trend_of(run), run.final("norm"), run.final("cosine"), run.series("seconds")[1]
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
        tiles.append(("Time in steps", duration(float(seconds.sum())), note))
    cells = [f"<div><dt>{a}</dt><dd class=value>{b}</dd><dd>{c}</dd></div>" for a, b, c in tiles]
    return f"<dl class=tiles>{''.join(cells)}</dl>" if cells else ""


def _previews(run: RunRecord) -> tuple[str, str]:
    """Preview pictures, newest first, and what they are."""
    paths = run.numbered("samples", "png")[::-1]
    chosen = [
        paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, min(len(paths), MAX_PREVIEWS), dtype=int))
    ]
    steps = [f"step {int(path.stem[5:]):,}" for path in chosen]
    figures = [picture(p, f"Preview pictures at {s}", s) for p, s in zip(chosen, steps, strict=True)]
    prompts = run.config.get("sample_prompt")
    if not isinstance(prompts, list) or not prompts:
        prompts = ["a photo of {}"]
    prompts = ", ".join(f"“{p}”".replace("{}", run.word) for p in prompts)
    about = f"{prompts}, newest first, always from the same noise."
    if len(chosen) < len(paths):
        about += f" Here are {len(chosen)} of {len(paths)}; all are in the folder samples."
    grid = f"{figures[0]}<div class=grid>{''.join(figures[1:])}</div>" if any(figures) else ""
    return grid, about


def _curves(run: RunRecord) -> str:
    length = "In mean lengths of the vocabulary's vectors."
    t = trend_of(run)
    best = t.best_step if t else None
    fixed = "Always on the same photos, noise and times."
    charts = [
        chart("Evaluation loss", run.series("eval_loss"), fixed, log=True, best=best),
        chart("Training loss", run.series("loss"), dots=True, log=True),
        chart("Length of the vectors", run.series("norm"), length, log=True, include=[1]),
        chart("Cosine to the start", run.series("cosine"), "1 is where they started.", include=[1]),
        chart("Learning rate", run.series("lr"), include=[0]),
        chart("Seconds per step", run.series("seconds"), dots=True, include=[0]),
    ]
    return f"<div class=grid>{''.join(charts)}</div>" if any(charts) else ""


def _next(run: RunRecord) -> str:
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

    return table([(f"vector {i}", cell(words)) for i, words in enumerate(nearest, 1) if words])


def _settings(run: RunRecord) -> str:
    def text(value: object) -> str:
        if isinstance(value, list):
            return ", ".join(map(text, value)) or "none"
        return str(value).lower() if isinstance(value, bool) else str(value)

    rows = table([(escape(str(key)), escape(text(value))) for key, value in run.config.items()])
    return f"<div class=columns>{rows}</div>" if rows else ""


def nearest_words(sd: StableDiffusion, vectors: Tensor, count: int = 8) -> list[list[tuple[str, float]]]:
    """For each of the vectors, (n, D), the words of the vocabulary that point the same way, with cosines.

    None for an output embedding: with what the text encoder gives out for every word it would take minutes.
    """
    if isinstance(sd.text_encoder, TextEncoderWithOutputs):
        return []
    tables = [table.weight.float() for table in sd.tables]
    parts = vectors.to(sd.device).split([table.shape[1] for table in tables], dim=1)
    products = torch.stack([part @ table.T for part, table in zip(parts, tables, strict=True)]).sum(dim=0)
    lengths = torch.stack([table.square().sum(dim=1) for table in tables]).sum(dim=0).sqrt()  # (vocab_size,)
    cosines = products / vectors.to(sd.device).norm(dim=1)[:, None] / lengths  # (n, vocab_size)
    names = {i: symbol for symbol, i in sd.tokenizer.vocab.items()}
    best = cosines.topk(min(count, len(lengths)), dim=1)
    return [
        [(names.get(i, str(i)), cosine) for i, cosine in zip(ids, values, strict=True)]
        for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def write_report(folder: Path, nearest: Sequence[Sequence[tuple[str, float]]] = ()) -> None:
    """Write `report.html` into the folder of a run, from the files the run left there.

    Args:
        folder: with config.yaml, log.csv, inputs.png, samples/ and learned_embeds.safetensors; what is
            missing or unreadable is left out.
        nearest: for each vector the words of the vocabulary nearest to it, with their cosines. For these the
            model is needed; without them the report lacks the section.

    Raises:
        OSError: the report cannot be written.
    """
    run = RunRecord(folder)
    word = escape(run.word)
    count = {None: "A learned word", 1: "1 vector"}.get(run.num_vectors, f"{run.num_vectors} vectors")
    for key, text in KINDS.items():
        count += f" {text}" if run.config.get(key) else ""
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
    top = [
        f"<h1>{word}</h1><p class=soft>{count}{start}.</p>",
        f"<p class=verdict>{escape(verdict(run))}</p>",
        *(f"<p class=warn>{escape(text)}</p>" for text in warnings(run)),
        _tiles(run),
    ]
    write_atomically(run.folder / "report.html", page(word, top, sections).encode(errors="replace"))
