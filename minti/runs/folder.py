"""The folder of a training run: what is in it, when it may be replaced, and from what a run goes on."""

from __future__ import annotations

import argparse
import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..cli.work_folder import WorkFolder
from ..errors import InputError
from ..inversion.batches import Word

MAY_DIFFER = ("out", "resume", "overwrite", "device")  # between a run and its continuation
WRITTEN = (  # without the first, nothing goes on from the others: it is the first to be cleared away
    "state.safetensors",
    "learned_embeds.safetensors",
    "log.csv",
    "inputs.png",
    "report.html",
)
NUMBERED = ("embeds", "samples")
COLUMNS = ("step", "loss", "eval_loss", "lr", "norm", "cosine", "seconds")


@dataclass
class Run:
    """One word of a run: where it is kept, and how it has done so far."""

    word: Word
    placeholder: str  # as others will write it; `word` may be learned under an alias
    folder: Path
    init_word: str
    photos_hash: Tensor  # of the photos as trained, and of the prompts
    rows: list[dict[str, float | None]] = field(default_factory=list)  # log.csv
    best: Tensor | None = None  # the vectors at the lowest eval loss
    best_loss: float = float("inf")
    best_step: int = 0
    final: Tensor | None = None  # the vectors when it had converged; it is not learned any further

    @property
    def evaluations(self) -> list[float]:
        return [row["eval_loss"] for row in self.rows if row["eval_loss"] is not None]

    def has_converged(self, args: argparse.Namespace) -> bool:
        """DVAR's rule (arXiv 2302.04841): the eval loss varies much less than at first."""
        window, losses = args.early_stop_window, self.evaluations
        if args.early_stop is None or len(losses) < 2 * window:
            return False
        if args.progressive and len(self.rows) <= args.progressive[-1]:
            return False  # the last vector has not learned anything yet
        return bool(np.var(losses[-window:]) < args.early_stop * np.var(losses[:window]))


def is_name(name: str) -> bool:
    """Whether a word's folder can have this name beside what else a run writes."""
    return bool(re.fullmatch(r"\w[\w.-]*", name)) and name not in (*WRITTEN, *NUMBERED, "config.yaml")


def made(settings: Mapping[str, Any]) -> list[str]:
    """The names in its folder of all that a run with these settings writes, beside `config.yaml`.

    Raises:
        InputError: these are not the settings of a run.
    """
    words = settings.get("concepts")
    if words is None:
        return [*WRITTEN, *NUMBERED]
    if not isinstance(words, list) or not all(
        isinstance(w, dict) and is_name(str(w.get("name"))) for w in words
    ):
        raise InputError("concepts: are not those of a run of minti.train; give another --out")
    return [WRITTEN[0], *(f"{word['name']}/{name}" for word in words for name in (*WRITTEN, *NUMBERED))]


def run_folder(args: argparse.Namespace, defaults: Mapping[str, Any], active: bool = True) -> WorkFolder:
    """The folder of the run that the options ask for."""
    return WorkFolder(
        args.out,
        "minti.train",
        vars(args),
        defaults=defaults,
        made=made,
        may_differ=MAY_DIFFER,
        signature=("init_word", "save_every", "eval_size"),
        active=active,
    )


def refuse_lost_start(out: Path, specs: Sequence[Mapping[str, Any]]) -> None:
    """Raises InputError if a word starts from a file in `out`, which is to be replaced."""
    for spec in specs:
        if spec["init"] == "file" and out.resolve() in Path(spec["init_word"]).resolve().parents:
            raise InputError(
                f"{spec['init_word']}: is in --out, which is to be replaced; copy it to another place first"
            )


def read_state(path: Path) -> dict[str, Tensor]:
    """What a run was saved as; nothing if it was not. Raises InputError if the file is damaged."""
    try:
        return load_file(path) if path.exists() else {}
    except SafetensorError as error:
        raise InputError(f"{path}: is damaged ({error}); remove it to start again") from None


def read_log(path: Path, steps: int) -> list[dict[str, float | None]]:
    """The rows of the first `steps` steps in a log.csv. Raises InputError unless they are all there."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(file)]
        rows = [row | {"step": int(row["step"])} for row in rows[:steps]]
    except (ValueError, KeyError, TypeError, csv.Error):
        rows = []
    if [row["step"] for row in rows] != [*range(1, steps + 1)]:
        raise InputError(f"{path}: is damaged; to learn the word again, --overwrite")
    return rows


def log_csv(rows: Sequence[dict[str, float | None]]) -> bytes:
    """Rows as a log.csv."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()
