"""Running a command: its exit code, and one clear line when something is wrong."""

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TextIO

import torch

from ..errors import InputError

# What PyTorch says when the memory of a CPU runs out, on Linux and on Windows.
FULL = ("can't allocate memory", "not enough memory", "std::bad_alloc", "bad allocation")

VISIBLE = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n\r"}


def run_command(command: str, main: Callable[[Sequence[str] | None], None]) -> NoReturn:
    """Run a command and exit: 0 done, 2 bad input, 130 interrupted. Whatever is wrong is said in one line."""
    output = sys.stdout = Stream(sys.stdout)
    sys.stderr = Stream(sys.stderr)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    code = 0
    try:
        with out_of_memory("try --batch-size 1 or a smaller --size"):
            main(None)
    except SystemExit as error:  # of --help and --version
        code = error.code
    except InputError as error:
        code = _complain(command, str(error))
    except KeyboardInterrupt:
        print(f"\n{command}: interrupted; what was finished is kept", file=sys.stderr)
        code = 130
    except OSError as error:
        code = _complain(command, _describe(error, error.filename or "a file"))
    output.flush()
    if code == 0 and output.error and not isinstance(output.error, BrokenPipeError):
        code = _complain(command, _describe(output.error, "standard output"))
    sys.exit(code)


def _describe(error: OSError, path: str) -> str:
    remedy = "free some space" if error.errno == errno.ENOSPC else "check the path and its permissions"
    return f"{path}: {error.strerror or error}; {remedy}"


def _complain(command: str, message: str) -> int:
    print(f"{command}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def out_of_memory(advice: str) -> Iterator[None]:
    """Turn a lack of memory in the block into an InputError that gives this advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(f"out of memory; {advice}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the memory of the CPU or of a GPU is exhausted."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or any(text in str(error) for text in FULL)


class Stream:
    """Standard output or error, on which a failure to print is remembered and does not end the command.

    A terminal may be closed, a disk full, and the other end of a pipe gone, while what the command computes
    is still wanted. Control characters, which a learned word may hold, are written as `\\x1b`, so that they
    give no orders to a terminal.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115
        self.error: OSError | None = None
        if hasattr(self._stream, "reconfigure"):  # a character that the terminal lacks is no failure either
            self._stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self._try(self._stream.write, text.translate(VISIBLE))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[..., object], *arguments: object) -> None:
        try:
            action(*arguments)
        except OSError as error:
            self.error = self.error or error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
