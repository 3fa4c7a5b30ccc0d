"""Several processes that share out one piece of work, for `torchrun --nproc-per-node N -m minti.train`."""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those that torchrun has started; without torchrun, alone."""

    rank: int = 0  # 0 to world - 1; the first one logs and writes
    world: int = 1

    @classmethod
    def of_torchrun(cls) -> Processes:
        """What torchrun has put in the environment."""
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    def join(self, backend: str | None = None, timeout: datetime.timedelta | None = None) -> None:
        """Find the others. Only the first one goes on logging what is no warning."""
        if self.world > 1:
            dist.init_process_group(backend, timeout=timeout)
        if self.rank:
            logging.getLogger().setLevel(logging.WARNING)

    def join_to_wait(self) -> None:
        """Find the others, in order to wait for them, however long; results are passed on as files."""
        self.join("gloo", datetime.timedelta(days=7))

    def device(self, asked: str) -> str:
        """The device of this process: of several, each has a GPU of its own, unless one was named."""
        if self.world > 1 and torch.cuda.is_available() and asked in ("auto", "cuda"):
            return f"cuda:{os.environ['LOCAL_RANK']}"
        return asked

    def share(self, todo: Sequence[T]) -> list[T]:
        """The part of a list, the same for all, that this process is to do."""
        self.wait()  # until all have the list: it may be a list of files that are not there yet
        return list(todo[self.rank :: self.world])

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.world > 1:
            dist.barrier()

    def leave(self) -> None:
        """Part from the others."""
        if self.world > 1:
            dist.destroy_process_group()
