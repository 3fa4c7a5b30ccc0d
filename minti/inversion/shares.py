"""A step in parts: samples that several processes share, and batches whose gradients are added up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from .batches import Batch


@dataclass(frozen=True)
class Share:
    """What one process does of every step.

    Attributes:
        batch_size, accumulate: see `Settings`.
        rank, world: which of how many processes this is.
    """

    batch_size: int
    accumulate: int
    rank: int = 0
    world: int = 1

    @property
    def count(self) -> int:
        """How many samples of each word there are in a step, in all processes together."""
        return self.batch_size * self.accumulate * self.world

    def parts(self, drawn: Sequence[Batch]) -> Iterator[list[Batch]]:
        """Of the `count` samples of each word those of this process, one batch after another."""
        for i in range(self.accumulate):
            first = (i * self.world + self.rank) * self.batch_size
            yield [batch[first : first + self.batch_size] for batch in drawn]

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors, in place, by their sums over all processes."""
        if self.world > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)
