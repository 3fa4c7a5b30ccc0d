"""The table of word vectors that a text encoder begins with, and the rows of learned words behind it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Module):
    """A table of vectors, (count, width).

    `nn.Embedding` would import all of PyTorch's compiler on the meta device, which takes seconds.
    """

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        weight = torch.empty(count, width)
        self.weight = nn.Parameter(weight if weight.is_meta else weight.normal_())


class TokenEmbedding(Embedding):
    """A table of word vectors, frozen, with the rows of learned words below it.

    Ids of the vocabulary look a vector up in the table, ids above it in the rows of the placeholder words,
    one word after the other. The rows are parameters of their own, so that the table needs no gradient, and
    float32 whatever the table's dtype, since the steps of an optimizer are small.

    Attributes:
        weight: (vocab_size, D), the checkpoint's own vectors.
        words: (num_vectors, D) for each learned word; wider where several tables share the rows of a word.
        columns, key: the D columns of such shared rows that are read here, and what a file calls them.
    """

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__(vocab_size, width)
        self.words = nn.ParameterList()
        self.columns, self.key = slice(0, width), ""

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
