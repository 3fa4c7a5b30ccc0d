"""The embedding table of the text encoder with the rows of learned words behind it."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LearnedWord(Protocol):
    """What the model needs to know of a `Concept`: the word, and its vectors, (num_vectors, D) float32."""

    placeholder: str
    vectors: Tensor


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
