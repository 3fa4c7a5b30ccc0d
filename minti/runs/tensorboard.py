"""The log of a run for TensorBoard, with `--tensorboard`; log.csv has the same numbers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from .run_word import RunWord


class Board:
    """The log of one word for TensorBoard.

    Args:
        folder: where its files go.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError("--tensorboard: needs a package; pip install tensorboard") from None
        self._open, self._folder, self._writer, self._written = SummaryWriter, folder, None, 0

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Log the rows of log.csv that are not logged yet. Steps that a resumed run repeats are replaced."""
        if self._writer is None:
            self._writer = self._open(str(self._folder), purge_step=0)
        for row in rows[self._written :]:
            for column, value in row.items():
                if value is not None and column != "step":
                    self._writer.add_scalar(column, value, row["step"])
        self._written = len(rows)
        self._writer.flush()


def open_boards(out: Path, words: Sequence[RunWord]) -> list[Board]:
    """A log for each word. Raises InputError if the package tensorboard is not installed."""
    return [Board(out / "tensorboard" / (word.folder.name if word.folder != out else "")) for word in words]
