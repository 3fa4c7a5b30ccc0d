"""Writing files so that a crash, a full disk or Ctrl-C never leaves half of one."""

import contextlib
import glob
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file at `path` by `content`, see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Replace the file at `path` by what the block writes to the path it is given.

    The block writes beside it; then that is flushed to disk and renamed, and the folder is flushed.

    Raises:
        OSError: the disk is full or the folder not writable; whatever was at `path` is still there.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.open("xb").close()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors writes files that only their owner can read
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None  # rather than none, or the temporary one
        raise
    with contextlib.suppress(OSError):  # Windows has no folders to flush
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_temporaries(path: Path) -> None:
    """Remove what killed processes left of `path` beside it."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.????????"):
        temporary.unlink(missing_ok=True)
