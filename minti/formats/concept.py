"""A learned word: the rows that Textual Inversion adds to the embedding table, and the file they come in.

`python -m minti.concept` looks into such files, converts and merges them; see `minti/concept.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..errors import InputError
from ..model.embedding import encoder_of
from . import embedding_files
from .atomic import write_atomically


@dataclass(frozen=True)
class Concept:
    """A word and its vectors.

    Attributes:
        placeholder: the word as it is written in prompts.
        vectors: (num_vectors, D) float32; D is 768 for SD 1.x, 1024 for SD 2.x.
        metadata: where it comes from, for people: base model, init word, step, ...
    """

    placeholder: str
    vectors: Tensor
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path, placeholder: str | None = None, *, width: int | None = None) -> Concept:
        """Read the one word of a file in any of the formats of `embedding_files`.

        Args:
            placeholder: use this word instead of the one in the file.
            width: take the vectors of this width, from a file for SDXL, which has two text encoders.

        Raises:
            InputError: naming the file and what is wrong with it.
        """
        concepts = cls.load_all(path, width=width)
        if len(concepts) > 1:
            words = ", ".join(repr(concept.placeholder) for concept in concepts)
            raise InputError(
                f"{path}: holds {len(concepts)} words ({words}), where one was expected; "
                "Concept.load_all reads them all"
            )
        (concept,) = concepts
        return cls(placeholder or concept.placeholder, concept.vectors, concept.metadata)

    @classmethod
    def load_all(cls, path: str | Path, *, width: int | None = None) -> list[Concept]:
        """Read all words of a file; otherwise like `load`."""
        path = Path(path)
        _, entries = embedding_files.read(path)
        widths = sorted({entry.vectors.shape[1] for entry in entries})
        if width is None and len(widths) > 1:
            raise InputError(
                f"{path}: is a word for SDXL, which needs two sets of vectors, {widths[0]} and {widths[1]} "
                "wide; here a word has one, choose it with --width (in Python width=...)"
            )
        if width is not None and width not in widths:
            raise InputError(
                f"{path}: {entries[0].word!r} was learned on a {encoder_of(widths[0])}, "
                f"not on a {encoder_of(width)}; use the model it was learned on"
            )
        chosen = [entry for entry in entries if width in (None, entry.vectors.shape[1])]
        return [cls(entry.word, entry.vectors, entry.metadata) for entry in chosen]

    def save(self, path: str | Path, *, format: str | None = None) -> None:
        """Write a file that others read too, in one piece or not at all; see `save_concepts`."""
        save_concepts(path, [self], format=format)

    @property
    def digest(self) -> str:
        """A short hash of the vectors, to tell versions of a word apart."""
        return hashlib.sha256(self.vectors.contiguous().numpy().tobytes()).hexdigest()[:12]


def save_concepts(path: str | Path, concepts: Sequence[Concept], *, format: str | None = None) -> None:
    """Write words into one file. The same words give the same bytes.

    Args:
        path: `.safetensors`, `.bin` or `.pt`. Only safetensors keep the metadata of a diffusers file.
        format: "diffusers", or "a1111" for AUTOMATIC1111's interface, where the word is the name of the file;
            by default a1111 for `.pt`, diffusers for the others.

    Raises:
        InputError: the suffix does not belong to the format, or the words clash.
        OSError: the file cannot be written; what was there is still there.
    """
    path = Path(path)
    entries = [embedding_files.Entry(c.placeholder, c.vectors, c.metadata) for c in concepts]
    write_atomically(path, embedding_files.encode(path, entries, format))
