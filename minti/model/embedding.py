"""The table of word vectors that a text encoder begins with, and the rows of learned words behind it."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LearnedWord(Protocol):
    """What the model needs to know of a `Concept`: the word, and its vectors, (num_vectors, D) float32."""

    placeholder: str
    vectors: Tensor


FAMILIES = {768: "SD 1.x", 1024: "SD 2.x", 1280: "LDM, or SDXL's second encoder", 2048: "SDXL, 768 + 1280"}


def encoder_of(width: int) -> str:
    """What kind of text encoder has word vectors of this width."""
    return f"{width}-wide encoder" + (f" ({FAMILIES[width]})" if width in FAMILIES else "")


class TokenEmbedding(nn.Module):
    """A table of word vectors, frozen, with the rows of learned words below it.

    Ids of the vocabulary look a vector up in the table, ids above it in the rows of the placeholder words,
    one word after the other. The rows are parameters of their own, in float32 whatever the table's dtype, so
    that nothing but them can ever receive a gradient.

    Attributes:
        weight: (vocab_size, D), the checkpoint's own vectors.
        words: (num_vectors, D) for each learned word; wider where two encoders share the rows of a word.
        columns: the D columns of such shared rows that are read here.
    """

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        weight = torch.empty(vocab_size, width)
        self.weight = nn.Parameter(weight if weight.is_meta else weight.normal_())
        self.words = nn.ParameterList()
        self.columns = slice(0, width)

    @property
    def rows(self) -> Tensor:
        """The rows of all words, (n, D) float32."""
        if not self.words:
            return self.weight.new_empty(0, self.weight.shape[1], dtype=torch.float32)
        return torch.cat(list(self.words))[:, self.columns]

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, D) in the table's dtype."""
        vocab_size = len(self.weight)
        learned = ids >= vocab_size
        known = F.embedding(ids.where(~learned, 0), self.weight)
        if not self.words:
            return known
        rows = F.embedding((ids - vocab_size).where(learned, 0), self.rows).to(known.dtype)
        return torch.where(learned[..., None], rows, known)


class WordTables:
    """The tables of word vectors of a model, which has one text encoder or two side by side."""

    text_encoder: nn.Module

    @property
    def vocabulary(self) -> Tensor:
        """The checkpoint's own word vectors, (vocab_size, D), without any learned ones."""
        tables = [table.weight for table in self.tables]
        return tables[0] if len(tables) == 1 else torch.cat(tables, dim=1)

    @property
    def widths(self) -> tuple[int, ...]:
        """The columns of a word's vectors for each text encoder; () where there is one encoder."""
        widths = tuple(table.weight.shape[1] for table in self.tables)
        return widths if len(widths) > 1 else ()

    @property
    def tables(self) -> list[TokenEmbedding]:
        """The tables of word vectors: one for each text encoder; a word has columns in every one of them."""
        return [module for module in self.text_encoder.modules() if isinstance(module, TokenEmbedding)]

    def look_up(self, ids: Tensor) -> Tensor:
        """The vectors that the text encoders begin with, (B, L) -> (B, L, D)."""
        return torch.cat([table(ids) for table in self.tables], dim=-1)
