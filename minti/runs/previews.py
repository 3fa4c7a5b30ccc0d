"""Pictures that are made while a run learns; that they fail should not end it."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..cli.command import is_out_of_memory
from ..cli.images import encode_png, image_grid
from ..errors import InputError
from ..formats.atomic import write_atomically
from ..model.stable_diffusion import StableDiffusion

log = logging.getLogger(__name__)

PREVIEWS = 4  # pictures of each prompt


class Previews:
    """Makes pictures of prompts now and then, always with the same seeds.

    If the memory, the disk or the numbers of a picture fail, there is one warning, and no more previews.

    Args:
        wanted: whether to make any.
        options: of `StableDiffusion.sample`.
    """

    def __init__(self, sd: StableDiffusion, wanted: bool, **options: Any) -> None:
        self.sd, self.wanted, self.options = sd, wanted, options

    def make(
        self, folder: Path, step: int, prompts: Sequence[str], shown: Sequence[str] | None = None
    ) -> None:
        """Write `samples/step-000500.png` and so on into a folder.

        Args:
            shown: the prompts as the file should say them; by default as they are.
        """
        if not self.wanted:
            return
        try:
            self.sd.vae.to(self.sd.device)
            images = self.sd.sample(prompts, num_images=PREVIEWS, **self.options)
            text = {"prompts": json.dumps(list(shown or prompts))}
            path = folder / "samples" / f"step-{step:06d}.png"
            write_atomically(path, encode_png(image_grid(images, PREVIEWS), text))
        except (RuntimeError, MemoryError, OSError, InputError) as error:
            if not isinstance(error, OSError | InputError) and not is_out_of_memory(error):
                raise
            why = "out of memory" if is_out_of_memory(error) else str(error)
            text = "no preview at step %d, and none later (%s); --sample-every 0 leaves them out"
            log.warning(text, step, why)
            self.wanted = False
