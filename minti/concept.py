"""A learned word: the rows that Textual Inversion adds to the embedding table, and the file they come in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from .config import InputError
from .files import write_atomically
from .weightfile import WeightFile, read_metadata


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
    def load(cls, path: str | Path, placeholder: str | None = None) -> Concept:
        """Read `{word: (num_vectors, D)}`, or (D,) as older files have it: `.safetensors`, or `.bin` of
        torch.

        Args:
            placeholder: use this word instead of the one in the file.

        Raises:
            InputError: naming the file and what is wrong with it.
        """
        path = Path(path)
        file = WeightFile(path)
        if len(file.shapes) != 1:
            keys = ", ".join(list(file.shapes)[:3])
            raise InputError(
                f"{path}: holds {len(file.shapes)} tensors ({keys}), where one word was expected"
            )
        ((word, vectors),) = file.read(list(file.shapes), copied=True)
        if vectors.ndim not in (1, 2) or not vectors.is_floating_point() or not vectors.isfinite().all():
            raise InputError(
                f"{path}: {word!r} is not a learned word; expected finite vectors, (n, D) or (D,)"
            )
        vectors = vectors.reshape(-1, vectors.shape[-1]).to(torch.float32, copy=True)  # (D,) -> (1, D)
        return cls(placeholder or word, vectors, read_metadata(path))

    def save(self, path: str | Path) -> None:
        """Write the file that diffusers and the common user interfaces read, in one piece or not at all."""
        write_atomically(Path(path), save({self.placeholder: self.vectors.contiguous()}, dict(self.metadata)))

    @property
    def digest(self) -> str:
        """A short hash of the vectors, to tell versions of a word apart."""
        return hashlib.sha256(self.vectors.contiguous().numpy().tobytes()).hexdigest()[:12]
