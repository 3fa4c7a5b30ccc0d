"""Ending a run early, with everything saved."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist


class Stop:
    """Notices that a run is to end: by Ctrl-C, by SIGTERM, or by a terminal that is closed (SIGHUP).

    The run ends after its current step, with everything saved; after a second Ctrl-C at once. As a context it
    gives the signals back to those who had them.
    """

    def __init__(self) -> None:
        self.asked = False
        self._handlers = {}

    def __enter__(self) -> Stop:
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):  # Windows lacks the third, others the fourth
            number = getattr(signal, name, None)
            # A process that was started with nohup ignores SIGHUP, and is to go on doing so.
            if number is not None and (name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN):
                self._handlers[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def anywhere(self, world: int) -> bool:
        """Whether any of the processes has been asked to stop. All of them call this after the same step."""
        if world == 1:
            return self.asked
        flag = torch.tensor(int(self.asked))
        dist.all_reduce(flag)
        return bool(flag)
