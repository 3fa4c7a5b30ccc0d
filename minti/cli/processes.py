"""Several processes that share one piece of work, as in `torchrun --nproc-per-node 2 -m minti.train`."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from ..errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those that torchrun has started; alone if torchrun has not started it.

    Attributes:
        rank: the number of this process, 0 to world - 1. Process 0 logs and writes files.
        world: the number of processes.
        local_rank: the number of this process among those of the same machine.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Processes:
        """The processes that the environment variables of torchrun describe.

        Raises:
            InputError: the variables contradict each other, or some of them are missing.
        """
        rank, world = _read_variable("RANK", 0), _read_variable("WORLD_SIZE", 1)
        if not 0 <= rank < world:
            raise InputError(f"RANK is {rank} and WORLD_SIZE is {world}; unset both, or use torchrun")
        missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if world > 1 and n not in os.environ]
        if missing:
            raise InputError(f"WORLD_SIZE is {world}, but {missing[0]} is not set; unset it, or use torchrun")
        return cls(rank, world, _read_variable("LOCAL_RANK", rank))

    @contextlib.contextmanager
    def joined(self, *, for_barriers: bool = False) -> Iterator[None]:
        """Connect to the other processes, and disconnect again however the block ends.

        Args:
            for_barriers: the processes exchange results as files and only wait for each other, however long.

        Raises:
            InputError: the others cannot be reached, or one of them has ended before its time.
        """
        if self.rank:
            logging.getLogger().setLevel(logging.WARNING)
        if self.world == 1:
            yield
            return
        # The functions of this module take the default group as a default argument, evaluated at import. The
        # optimizers import it at their first step. If the group existed by then, these defaults would keep it
        # and its threads alive after `destroy_process_group`, and a thread that is still there when Python
        # shuts down aborts the process ("terminate called without an active exception").
        importlib.import_module("torch.distributed.nn.functional")
        try:
            if for_barriers:
                dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
            else:
                dist.init_process_group()
            yield
        except RuntimeError as error:
            if not (isinstance(error, dist.DistError) or "Connection closed" in str(error)):
                raise
            reason = str(error).splitlines()[0]
            raise InputError(
                f"process {self.rank} has lost the others ({reason}); see what they say"
            ) from None
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    def device(self, asked: str) -> str:
        """The device for this process: of several, each has its own GPU, unless one was named."""
        if self.world > 1 and torch.cuda.is_available() and asked in ("auto", "cuda"):
            return f"cuda:{self.local_rank}"
        return asked

    def share(self, todo: Sequence[T]) -> list[T]:
        """The part of a list that this process is to do. The list must be the same in all processes."""
        self.wait()  # The list may depend on files that the processes are about to write.
        return list(todo[self.rank :: self.world])

    def wait(self) -> None:
        """Return when all processes have called this."""
        if self.world > 1:
            dist.barrier()


def _read_variable(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.strip().isdecimal():
        raise InputError(f"the environment variable {name} is {text!r}; unset it, or use torchrun")
    return int(text)
