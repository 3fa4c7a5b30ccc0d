"""The folder of a training run: the names of what is in it, and reading it, whatever state it is in."""

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..cli.work_folder import WorkFolder
from ..cli.yaml_files import read_yaml
from ..errors import InputError
from ..formats.concept import Concept
from ..formats.reading import check_regular

# Options that may change when a run is resumed. The vectors do not depend on them, or the state of the run
# remembers what they lead to: a hash of the weights, of the photos and their captions, and of the templates.
MAY_DIFFER = (
    *("out", "device", "save_every", "sample_every", "sample_prompt", "sample_steps", "tensorboard"),
    *("checkpoint", "images", "templates", "unet", "text_encoder"),
)
SIGNATURE = ("init_word", "save_every", "eval_size")  # options that only minti.train has
STATE = "state.safetensors"  # the first to be removed: without it, nothing is resumed from the others
FILES = (STATE, "learned_embeds.safetensors", "log.csv", "inputs.png", "report.html")
NUMBERED = ("embeds", "samples")  # folders of files such as step-000500.png
COLUMNS = ("step", "loss", "eval_loss", "lr", "norm", "cosine", "seconds")
# Windows has no files of these names, whatever their ending.
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def is_name(name: str) -> bool:
    """Whether the folder of a word can have this name, beside the other files of a run, on all systems."""
    taken = name.lower() in (*FILES, *NUMBERED, "config.yaml", "tensorboard")
    return bool(re.fullmatch(r"\w([\w.-]*[\w-])?", name)) and not (taken or RESERVED.fullmatch(name))


def made(settings: Mapping[str, Any]) -> list[str]:
    """The names of all that a run with these settings writes into its folder, beside `config.yaml`.

    Raises:
        InputError: these are not the settings of a run.
    """
    words = settings.get("concepts")
    if words is None:
        return [*FILES, *NUMBERED, "tensorboard"]
    good = isinstance(words, list) and all(isinstance(w, dict) and is_name(str(w.get("name"))) for w in words)
    if not good:
        raise InputError("concepts: are not those of a run of minti.train; give another --out")
    names = [f"{word['name']}/{name}" for word in words for name in (*FILES, *NUMBERED)]
    return [STATE, *names, "tensorboard"]


def run_folder(
    out: str | Path,
    settings: Mapping[str, Any],
    defaults: Mapping[str, Any],
    *,
    resume: bool = False,
    active: bool = True,
) -> WorkFolder:
    """The folder of the run that these options ask for.

    Raises:
        InputError: the run is to be resumed with more steps than its schedule was made for.
    """
    may_differ = [*MAY_DIFFER]
    if settings["init"] == "file":
        may_differ.append("init_word")  # a path; the state holds the vectors
    path = Path(out) / "config.yaml"
    before = read_yaml(path).get("steps") if resume and path.exists() else None
    if isinstance(before, int) and settings["steps"] > before:
        ended = ["the learning rate has fallen to zero"] if settings["lr_schedule"] != "constant" else []
        ended += ["the vectors have been averaged"] if settings["average"] > 1 else []
        if ended:
            change = f"steps was {before}, now it is {settings['steps']}"
            remedy = "start another run with --init file --init-word .../learned_embeds.safetensors"
            raise InputError(f"{path}: {change}, but {ended[0]} by then; {remedy}")
        may_differ.append("steps")
    how = {"may_differ": may_differ, "signature": SIGNATURE, "active": active}
    return WorkFolder(out, "minti.train", settings, defaults=defaults, made=made, **how)


def read_state(path: Path) -> dict[str, Tensor]:
    """The saved state of a run, {} if there is none. Raises InputError if the file is damaged."""
    try:
        return load_file(check_regular(path)) if path.exists() else {}
    except SafetensorError as error:
        raise InputError(f"{path}: is damaged ({error}); remove it to start again") from None


def read_log(path: Path, steps: int) -> list[dict[str, float | None]]:
    """The rows of the first `steps` steps in a log.csv, after that of step 0 where it is there.

    Raises:
        InputError: rows are missing or damaged.
    """
    read = _read_columns(path)
    first = 0 if len(read["step"]) and read["step"][0] == 0 else 1
    columns = {name: values[: steps + 1 - first].tolist() for name, values in read.items()}
    if columns["step"] != [*range(first, steps + 1)] or any(map(math.isnan, columns["lr"][1 - first :])):
        raise InputError(f"{path}: is damaged; to learn the word again, --overwrite")
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [
        {k: None if math.isnan(v) else v for k, v in row.items()} | {"step": int(row["step"])} for row in rows
    ]


def log_csv(rows: Sequence[dict[str, float | None]]) -> bytes:
    """Rows as a log.csv."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


class RunRecord:
    """What a run has left in its folder, or in that of one of its words.

    Parts that are missing or damaged are empty; nothing is raised.

    Attributes:
        config: the settings; of one of several words, those of this word.
        many: whether this is one of several words.
        log: column of log.csv -> its values, (steps,) each, nan where there is no number.
        word: the learned word.
        num_vectors: how many vectors it has; None if there are none yet.
        last_step: the last step in the log.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config, self.many = _read_config(self.folder)
        self.log = _read_columns(self.folder / "log.csv")
        try:
            concept = Concept.load(self.folder / "learned_embeds.safetensors")
            self.word, self.num_vectors = concept.placeholder, len(concept.vectors)
        except (InputError, OSError):
            name = self.folder.resolve().name
            self.word, self.num_vectors = str(self.config.get("placeholder") or name), None
        self.last_step = int(self.log["step"][-1]) if len(self.log["step"]) else 0

    def series(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """The steps that have a number in a column, and these numbers, (N,) each."""
        there = np.isfinite(self.log[column])
        return self.log["step"][there], self.log[column][there]

    def final(self, column: str) -> float | None:
        """The last number in a column."""
        values = self.series(column)[1]
        return float(values[-1]) if len(values) else None

    def numbered(self, name: str, suffix: str) -> list[Path]:
        """The files `step-000500.png` and so on of a folder, by step."""
        return sorted(p for p in (self.folder / name).glob(f"step-*.{suffix}") if p.stem[5:].isdecimal())

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
            config = read_yaml(path) if path.is_file() else {}
        except InputError:
            continue
        entries = config["concepts"] if isinstance(config.get("concepts"), list) else []
        own = [e for e in entries if isinstance(e, dict) and str(e.get("name")) == folder.resolve().name]
        if config and (path.parent == folder or own):
            config.pop("concepts", None)
            return (config | own[0], True) if own else (config, False)
    return {}, False


def _read_columns(path: Path) -> dict[str, np.ndarray]:
    def value(text: str | None) -> float:
        try:
            return float(text or "nan")
        except ValueError:
            return math.nan

    try:
        with check_regular(path).open(newline="", encoding="utf-8", errors="replace") as file:
            rows = [row for row in csv.DictReader(file) if math.isfinite(value(row.get("step")))]
    except (InputError, OSError, csv.Error):
        rows = []
    return {column: np.array([value(row.get(column)) for row in rows]) for column in COLUMNS}
