"""A learned word: the rows that Textual Inversion adds to the embedding table, and the file they come in.

`python -m minti.concept` looks into such files, converts and merges them; see `concept_cli.py`.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import embedding_files
from .config import InputError
from .files import write_atomically

FAMILIES = {768: "SD 1.x", 1024: "SD 2.x", 1280: "LDM, or SDXL's second encoder"}


def encoder_of(width: int) -> str:
    """What kind of text encoder has word vectors of this width."""
    return f"{width}-wide encoder" + (f" ({FAMILIES[width]})" if width in FAMILIES else "")


class PlaceholderEmbedding(nn.Module):
    """The text encoder's table of word vectors, frozen, with learned rows below it.

    Ids of the vocabulary look a vector up in the table, ids above it in the rows of the placeholder words,
    one word after the other. These rows are parameters of their own, in float32 whatever the table's dtype,
    so that nothing but them can ever receive a gradient.

    Args:
        table: (vocab_size, D) embedding of the checkpoint.
        words: (num_vectors, D) for each placeholder word.
    """

    def __init__(self, table: nn.Embedding, *words: Tensor) -> None:
        super().__init__()
        self.table = table
        self.words = nn.ParameterList()
        for rows in words:
            self.add(rows)

    def add(self, rows: Tensor) -> nn.Parameter:
        """Append a word, (num_vectors, D), frozen at first; its ids follow those of the words before."""
        rows = rows.to(self.table.weight.device, torch.float32, copy=True)
        self.words.append(nn.Parameter(rows, requires_grad=False))
        return self.words[-1]

    @property
    def rows(self) -> Tensor:
        """The rows of all words, (n, D) float32."""
        empty = self.table.weight.new_empty(0, self.table.embedding_dim, dtype=torch.float32)
        return torch.cat([empty, *self.words])

    @property
    def weight(self) -> Tensor:
        """Table and rows as one, (vocab_size + n, D), in the table's dtype."""
        return torch.cat([self.table.weight, self.rows.to(self.table.weight.dtype)])

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, D) in the table's dtype."""
        vocab_size = self.table.num_embeddings
        learned = ids >= vocab_size
        known = self.table(ids.where(~learned, 0))
        if not self.words:
            return known
        rows = F.embedding((ids - vocab_size).where(learned, 0), self.rows).to(known.dtype)
        return torch.where(learned[..., None], rows, known)


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


# `python -m minti.concept` imports the package, and with it this module, before it runs it: no harm in that.
warnings.filterwarnings("ignore", message="'minti.concept' found in sys.modules", category=RuntimeWarning)

if __name__ == "__main__":
    from . import cli, concept_cli

    cli.run("minti.concept", concept_cli.main)
