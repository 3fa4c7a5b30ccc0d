"""The folder of a training run: what is in it, when it may be replaced, and from what a run goes on."""

from __future__ import annotations

import argparse
import csv
import io
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..cli.work_folder import check_unchanged, to_yaml
from ..cli.yaml_files import read_yaml
from ..errors import InputError
from ..formats.atomic import write_atomically
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
    fingerprint: Tensor  # of the photos as trained, and of the prompts
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


def folders_of(out: Path) -> list[Path]:
    """The folder of the run in `out`, and those of its words if it has several.

    Raises:
        InputError: there is none.
    """
    saved = out / "config.yaml"
    config = read_yaml(saved) if saved.exists() else {}
    words = config.get("concepts") or []
    ours = {"init_word", "save_every", "eval_size"} <= config.keys() and isinstance(words, list)
    if not ours or not all(isinstance(word, dict) and is_name(str(word.get("name"))) for word in words):
        raise InputError(f"{out}: holds something that is not a run of minti.train; give another --out")
    return [out, *(out / str(word["name"]) for word in words)]


def check_out(out: Path, args: argparse.Namespace, specs: Sequence[Mapping[str, Any]]) -> bool:
    """See that nothing would be lost. Returns whether there is a run to go on with.

    Raises:
        InputError: --out is in use; or the run there was another one than is to be resumed.
    """
    saved = out / "config.yaml"
    if args.resume and saved.exists():
        check_unchanged(saved, args, MAY_DIFFER)
        return True
    # A run that was killed while it wrote its very first file leaves a hidden one.
    if out.exists() and (not out.is_dir() or any(not path.name.startswith(".") for path in out.iterdir())):
        if not args.overwrite:
            raise InputError(f"{out}: exists already; give another --out, or --resume, or --overwrite")
        folders_of(out)
    for spec in specs:
        if spec["init"] == "file" and out.resolve() in Path(spec["init_word"]).resolve().parents:
            raise InputError(
                f"{spec['init_word']}: is in --out, which is to be replaced; copy it to another place first"
            )
    return False


def clear_temporaries(folders: Sequence[Path]) -> None:
    """Remove what was being written when a run was killed."""
    patterns = [f".{name}.*" for name in (*WRITTEN, "config.yaml")] + [f"{name}/.step-*" for name in NUMBERED]
    for folder in folders:
        for path in [path for pattern in patterns for path in folder.glob(pattern)]:
            path.unlink(missing_ok=True)


def start_out(out: Path, args: argparse.Namespace) -> None:
    """Clear away the files of the run before, and no others; write down the settings of this one.

    Until these are written, those of the run before stay: killed at any moment, it can be done again.
    """
    folders = folders_of(out) if (out / "config.yaml").exists() else [out]
    clear_temporaries(folders)
    for folder in folders:
        for name in WRITTEN:
            (folder / name).unlink(missing_ok=True)
        for name in NUMBERED:
            shutil.rmtree(folder / name, ignore_errors=True)
    write_atomically(out / "config.yaml", to_yaml(args))


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
