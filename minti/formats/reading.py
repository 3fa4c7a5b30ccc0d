"""Opening other people's files: one boundary, which turns whatever goes wrong into one line for the user."""

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError


def check_regular(path: Path) -> Path:
    """The path of a regular file. Raises InputError for anything else, before it is opened.

    Opening a pipe would wait for a writer, and a device may never end.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        if path.is_symlink():
            raise InputError(
                f"{path}: is a link to a file that is not there; the download did not finish, repeat it"
            ) from None
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path}: cannot be read ({reason}); is the path right, the folder complete?"
        ) from None
    if not stat.S_ISREG(mode):
        what = "Is a directory" if stat.S_ISDIR(mode) else "it is a pipe or a device"
        raise InputError(f"{path}: cannot be read ({what}); give the path of a file")
    return path


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a small file. Raises InputError if it is missing or has more than `limit` bytes."""
    size = check_regular(path).stat().st_size
    if size > limit:
        raise InputError(f"{path}: has {size:,} bytes, where {limit:,} are plenty; is it the right file?")
    with naming(path, "a file that can be read"):
        return path.read_bytes()


@contextmanager
def naming(path: Path | str, what: str) -> Iterator[None]:
    """Turn any exception of the body into an InputError that names the file, and `what` it should be.

    Damaged or hostile files make their readers fail in any way whatever, so every class of exception is
    caught, except those that say nothing about the file (lack of memory, an interruption).
    """
    try:
        yield
    except InputError as error:
        raise error if str(path) in str(error) else InputError(f"{path}: {error}") from None
    except MemoryError:
        raise
    except KeyError as error:
        raise InputError(f"{path}: is not {what} (no {str(error.args[0])[:200]})") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # decoders raise an OSError without one
            raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise InputError(
            f"{path}: truncated or damaged, or not {what} ({reason}); download it again"
        ) from None
