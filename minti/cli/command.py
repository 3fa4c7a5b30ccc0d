"""Running a command: exit codes, and one clear line when something is wrong."""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch

from ..errors import InputError


def run_command(command: str, main: Callable[[Sequence[str] | None], None]) -> NoReturn:
    """Run a command and exit: 0 done, 2 bad input, 130 interrupted. Whatever is wrong is said in one line."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        main(None)
    except InputError as error:
        _fail(command, str(error))
    except KeyboardInterrupt:
        print(f"\n{command}: interrupted; what was finished is kept", file=sys.stderr)
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        full = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(
            error
        )
        if not full:
            raise
        _fail(command, "out of memory; try --batch-size 1, --dtype float16 or a smaller --size")
    except OSError as error:
        remedy = "free some space" if error.errno == errno.ENOSPC else "check the path and its permissions"
        _fail(command, f"{error.filename or 'a file'}: {error.strerror or error}; {remedy}")
    sys.exit(0)


def _fail(command: str, message: str) -> NoReturn:
    print(f"{command}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
