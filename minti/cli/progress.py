"""Telling the user how far a long job is, how long it will still take, and how much memory it has used."""

import importlib.util
import logging
import sys
import time

import torch

try:
    import resource
except ImportError:  # on Windows
    resource = None

log = logging.getLogger(__name__)


class Progress:
    """How far a long job is: a bar where tqdm is installed, otherwise a line every few seconds.

    Args:
        total, done: how many units of work there are in all, and how many of them are finished already.
        unit: what a unit is called.
        estimate_after: log how long all will take after so many units, if that is more than a minute.
    """

    EVERY = 5.0  # seconds

    def __init__(self, total: int, unit: str, done: int = 0, estimate_after: int = 0) -> None:
        self.total, self.unit, self.done = total, unit, done
        self._first, self._estimate_at = done, done + estimate_after
        self._start = self._last = time.monotonic()
        self._bar = None
        if sys.stderr is not None and sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit=unit, initial=done)

    def step(self, note: str = "") -> None:
        """One more unit of work is done."""
        self.done += 1
        if self.done == self._estimate_at != self._first:
            rate = (time.monotonic() - self._start) / (self.done - self._first)
            if (seconds := rate * (self.total - self._first)) > 60:
                text = "about %s for all %d %ss on this machine"
                log.info(text, duration(seconds), self.total, self.unit)
        if self._bar is not None:
            self._bar.set_postfix_str(note)
            self._bar.update()
            return
        now = time.monotonic()
        if now - self._last >= self.EVERY or self.done == self.total:
            rate = (self.done - self._first) / max(now - self._start, 1e-9)
            left = int((self.total - self.done) / rate)
            text = f"{self.done}/{self.total} {self.unit}s, {rate:.2f}/s, {left // 60}:{left % 60:02d} left"
            print(f"{text}, {note}" if note else text, file=sys.stderr, flush=True)
            self._last = now

    def close(self) -> None:
        """Leave the terminal tidy, also after an interruption."""
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """A length of time for people: 8.3 s, 4 min 10 s, 2 h 5 min."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {s} s" if minutes else f"{seconds:.1f} s"


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: on an NVIDIA GPU by tensors, elsewhere by the process; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
