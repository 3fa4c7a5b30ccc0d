"""Previews that fail, which should not end a run."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..cli.command import is_out_of_memory
from ..errors import InputError

log = logging.getLogger(__name__)


@contextmanager
def previewing(step: int, give_up: Callable[[], None]) -> Iterator[None]:
    """Turn a preview that fails for want of memory, disk or finite numbers into one warning, and give up."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError, InputError) as error:
        if not isinstance(error, OSError | InputError) and not is_out_of_memory(error):
            raise
        why = "out of memory" if is_out_of_memory(error) else str(error)
        text = "no preview at step %d, and none later (%s); --sample-every 0 leaves them out"
        log.warning(text, step, why)
        give_up()
