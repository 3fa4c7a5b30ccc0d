"""The files that learned words come in. All of them can be read, the first two written.

    diffusers           {word: (n, D)}, or (D,); also {word: (D,), word_1: (D,), ...} for several vectors
    AUTOMATIC1111       {string_to_param: {"*": (n, D)}, name, step, ...} in a pickle; the word is the file's
                        name. As safetensors {emb_params: (n, D)}. Or a picture, see below.
    the official code   {string_to_param: ParameterDict, string_to_token: ...}
    kohya, invoke       {emb_params: (n, D)}; the word is the file's name, here and in all that follow
    OneTrainer          {emp_params: (n, D), emp_params_out: ...}
    SDXL                {clip_l: (n, 768), clip_g: (n, 1280)}, for its two text encoders
    a tensor by itself  (n, D) or (D,)

Nothing here depends on the name's suffix, except what the word is called.
"""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..errors import InputError
from .a1111_png import _is_png, _read_png
from .weightfile import read_metadata, read_nested

log = logging.getLogger(__name__)


MAX_VECTORS = 75  # what a prompt can hold
WEIGHTS = (".weight", ".bias")  # how the names of a whole model's tensors end
SUFFIXES = {"diffusers": (".safetensors", ".bin"), "a1111": (".pt", ".safetensors")}


@dataclass(frozen=True)
class Entry:
    """A word in a file: its (num_vectors, D) float32 vectors, and notes on where it comes from."""

    word: str
    vectors: Tensor
    metadata: Mapping[str, str] = field(default_factory=dict)


def read(path: Path) -> tuple[str, list[Entry]]:
    """Which format a file has, in words, and all that it holds. An SDXL word comes twice, in two widths.

    Raises:
        InputError: the file is missing, damaged, dangerous, or holds something else than learned words.
    """
    if _is_png(path):
        kind, content, texts = "AUTOMATIC1111 picture", _read_png(path), {}
    else:
        kind, content, texts = "", read_nested(path), read_metadata(path)
    if isinstance(content, Tensor):
        kind, content = "a tensor by itself", {path.stem: content}
    if not isinstance(content, dict):
        raise _refusal(path, f"it holds a {type(content).__name__}")
    texts |= {str(key): str(value) for key, value in content.items() if isinstance(value, str | int | float)}

    if "string_to_param" in content:
        # The official code's users write the word as it stands in the file; A1111's, the name of the file. In
        # a picture, which is passed on under any name, it is the name given inside.
        official = not kind and "name" not in content
        kind = kind or ("official Textual Inversion code" if official else "AUTOMATIC1111")
        word = texts.get("name", path.stem) if "picture" in kind else path.stem
        table = content["string_to_param"]
        if not isinstance(table, dict):
            raise _refusal(path, f"string_to_param is a {type(table).__name__}")
        named = [(word if key == "*" and not official else key, rows) for key, rows in table.items()]
    elif content.keys() & {"clip_l", "clip_g"}:
        kind = "SDXL"
        named = [(path.stem, content[key]) for key in ("clip_l", "clip_g") if key in content]
        _note_ignored(path, content, ["clip_l_out", "clip_g_out"])
    elif "emb_params" in content:
        kind, named = "kohya, invoke-training or AUTOMATIC1111", [(path.stem, content["emb_params"])]
    elif "emp_params" in content:
        kind, named = "OneTrainer", [(path.stem, content["emp_params"])]
        _note_ignored(path, content, ["emp_params_out"])
    else:
        kind = kind or "diffusers"
        named = [(key, value) for key, value in content.items() if isinstance(value, Tensor)]

    _check(path, named, one_width=kind != "SDXL")
    words = [(word, rows.detach().reshape(-1, rows.shape[-1]).float()) for word, rows in named]
    if kind == "diffusers":
        words = list(_join_numbered(dict(words)).items())
    for word, rows in words:
        if not rows.isfinite().all():
            raise _refusal(path, f"{word!r} has vectors that are not finite")
    notes = _parse_notes(texts)
    return kind, [Entry(word, rows.clone(), notes.get(word, notes[None])) for word, rows in words]


def _refusal(path: Path, why: str) -> InputError:
    return InputError(
        f"{path}: is not a learned word: {why}; expected a tensor of finite numbers, (n, D) or (D,)"
    )


def _note_ignored(path: Path, content: dict[str, Any], keys: Sequence[str]) -> None:
    if ignored := [key for key in keys if key in content]:
        log.warning("%s: %s ignored: it belongs to the encoder's output", path, " and ".join(ignored))


def _check(path: Path, named: Sequence[tuple[Any, Any]], *, one_width: bool) -> None:
    """Refuse what cannot be learned words, such as a whole model, before any of its data is read."""
    if not named:
        raise _refusal(path, "there is no tensor in it")
    for key, rows in named:
        if not isinstance(rows, Tensor) or not isinstance(key, str):
            raise _refusal(path, f"{key!r} is a {type(rows).__name__}")
        shape = tuple(rows.shape)
        fits = rows.ndim in (1, 2) and 0 < shape[-1] <= 2**16 and 0 < (1, *shape)[-2] <= MAX_VECTORS
        plain = rows.is_floating_point() and rows.layout == torch.strided and rows.device.type == "cpu"
        if not fits or not plain or key.endswith(WEIGHTS):
            beside = f", beside {len(named) - 1} others" if len(named) > 1 else ""
            raise _refusal(path, f"{key!r} is {shape} {str(rows.dtype).removeprefix('torch.')}{beside}")
    widths = sorted({rows.shape[-1] for _, rows in named})
    if one_width and len(widths) > 1:
        raise _refusal(path, f"its {len(named)} tensors have widths {', '.join(map(str, widths))}")


def _join_numbered(words: dict[str, Tensor]) -> dict[str, Tensor]:
    """`w, w_1, w_2, ...`, of one vector each, are the vectors of one word w."""
    joined = dict(words)
    for word, first in words.items():
        vectors = [first]
        while (key := f"{word}_{len(vectors)}") in words:
            vectors.append(words[key])
        if len(vectors) > 1 and all(len(rows) == 1 for rows in vectors):
            for i in range(1, len(vectors)):
                joined.pop(f"{word}_{i}", None)
            joined[word] = torch.cat(vectors)
    return joined


# Notes ---


def _parse_notes(texts: dict[str, str]) -> dict[str | None, dict[str, str]]:
    """What a file says of itself: by word where it holds several, under None what holds for any word."""
    try:
        ours = json.loads(texts["minti"])
        by_word = {word: _strings(notes) for word, notes in ours.items() if isinstance(notes, dict)}
        return {None: {} if by_word else _strings(ours), **by_word}
    except (KeyError, ValueError, AttributeError, RecursionError):
        return {None: texts}


def _strings(notes: dict[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in notes.items()}


def _notes(entries: Sequence[Entry]) -> dict[str, str]:
    """The same to be written. All in one value, as safetensors stores several in random order."""
    notes = {entry.word: dict(entry.metadata) for entry in entries if entry.metadata}
    if len(entries) == 1:
        notes = dict(entries[0].metadata)
    return {"minti": json.dumps(notes, sort_keys=True, ensure_ascii=False)} if notes else {}


# Writing ---


def encode(path: Path, entries: Sequence[Entry], format: str | None = None) -> bytes:
    """The content of a file that is to be called `path`; the same bytes whenever and wherever it is made.

    Args:
        format: "diffusers" (`.safetensors`, `.bin`) or "a1111" (`.pt`, `.safetensors`), for one word only;
            None: as the suffix suggests, diffusers for `.safetensors`.

    Raises:
        InputError: the suffix belongs to another format, or the words do not fit into one file.
    """
    suffix = path.suffix.lower()
    format = format or ("a1111" if suffix == ".pt" else "diffusers")
    if format not in SUFFIXES:
        raise InputError(f"format {format!r}: choose from {', '.join(SUFFIXES)}")
    if suffix not in SUFFIXES[format]:
        raise InputError(f"{path}: a file in {format} format ends in {' or '.join(SUFFIXES[format])}")
    words = {entry.word: entry.vectors.detach().cpu().float().contiguous() for entry in entries}
    if len(words) < len(entries):
        raise InputError(f"{path}: one word is there twice; rename one of the two")
    if format == "diffusers":
        if gone := sorted(words.keys() - _join_numbered(words).keys()):
            raise InputError(
                f"{path}: {gone[0]!r} would be read as a vector of {gone[0].rpartition('_')[0]!r}; rename it"
            )
        # To be told from the names that other formats reserve.
        names = {"__metadata__", "clip_l", "clip_g", "emb_params", "emp_params"}
        if reserved := {word for word in words if word in names or word.endswith(WEIGHTS)}:
            raise InputError(f"{path}: {min(reserved)!r} cannot be a word in this file; rename it")
        return save(words, _notes(entries) or None) if suffix == ".safetensors" else _torch_bytes(words)

    if len(words) != 1:
        raise InputError(f"{path}: an a1111 file holds one word, not {len(words)}; write one file for each")
    ((word, rows),) = words.items()
    notes = _notes(entries)
    if suffix == ".safetensors":
        return save({"emb_params": rows}, notes or None)
    metadata = entries[0].metadata
    step = metadata.get("step", "")
    content = {
        "string_to_token": {"*": 265},  # the id of "*" in CLIP's vocabulary
        "string_to_param": {"*": rows},
        "name": word,
        "step": int(step) if re.fullmatch(r"\d{1,18}", step, re.ASCII) else None,
        "sd_checkpoint": metadata.get("sd_checkpoint"),
        "sd_checkpoint_name": metadata.get("sd_checkpoint_name", metadata.get("base_model")),
    }
    return _torch_bytes(content | notes)


def _torch_bytes(content: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
