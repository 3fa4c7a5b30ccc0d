"""Pictures that are made in order to be scored: how they are made, what is measured, what is kept."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..cli.images import COLUMNS, THUMBNAIL, encode_png, image_grid, thumbnails
from ..cli.processes import Processes
from ..cli.progress import Progress
from ..errors import InputError
from ..formats.atomic import write_atomically
from ..formats.photos import open_image, reading_picture
from ..formats.reading import check_regular
from ..model.model_hash import model_hash
from ..model.stable_diffusion import StableDiffusion
from .scorer import Scorer

log = logging.getLogger(__name__)

OnStep = Callable[[], None]  # called after each step of a long job
Measure = Callable[[Sequence[Image.Image]], dict[str, Tensor]]
"""Takes n pictures and returns what is known of them, each tensor with n rows; see `Scorer.measure`."""


@dataclass(frozen=True)
class Protocol:
    """How pictures are made in order to be scored. The defaults are those of arXiv 2208.01618, section 5.

    Attributes:
        num_images: pictures of each prompt; picture i has the seed `seed + i`.
        steps: DDIM steps.
        size: in pixels, or (width, height); None: what the model was trained on.
        batch_size: pictures at a time; it changes memory and speed, not the pictures.
    """

    num_images: int = 64
    steps: int = 50
    guidance_scale: float = 5.0
    eta: float = 0.0
    seed: int = 0
    size: int | tuple[int, int] | None = None
    batch_size: int = 8


PAPER = Protocol()


@dataclass(frozen=True)
class PictureJob:
    """The pictures of one prompt.

    Attributes:
        name: the name under which a store keeps them.
        inputs: all that the pictures and their measurements depend on, as JSON can hold it.
        make: makes the pictures, and calls its argument `steps` times.
        num_images, steps: how many pictures, and how many calls of the UNet, there are to make.
        disk: bytes that the store needs for it, at most.
    """

    name: str
    inputs: Mapping[str, Any]
    make: Callable[[OnStep], list[Image.Image]]
    num_images: int = 0
    steps: int = 1
    disk: int = 0

    def measure(
        self, measure: Measure, store: PictureStore | None = None, on_step: OnStep = lambda: None
    ) -> dict[str, Tensor]:
        """What `measure` says of the pictures: from the store if it is there, otherwise made, and kept."""
        if store and (kept := store.load(self)) is not None:
            return kept
        images = self.make(on_step)
        found = measure(images)
        if store:
            store.save(self, found, images)
        return found


def models_of(sd: StableDiffusion, scorer: Scorer) -> dict[str, str]:
    """Hashes of the models that make and judge pictures, and the dtype of the first."""
    return {
        "model": model_hash(sd.text_encoder, sd.unet, sd.vae),
        "dtype": str(sd.dtype),
        "clip": model_hash(scorer.image_encoder),
    }


def prompt_job(
    sd: StableDiffusion, prompt: str, protocol: Protocol, inputs: Mapping[str, Any], name: str
) -> PictureJob:
    """The pictures that a model makes of a prompt.

    The prompt, with the learned words in it, is identified by the vectors that the text encoder looks up.

    Args:
        inputs: what else the pictures and their measurements depend on; see `models_of`.

    Raises:
        InputError: the prompt has no room for the word, or the size does not suit the model.
    """
    vectors = sd.look_up(sd.tokenizer([prompt]).to(sd.device)).detach().float()
    width, height = sd.check_size(protocol.size)
    prompt_hash = hashlib.sha256(vectors.cpu().numpy().tobytes()).hexdigest()[:12]
    inputs = {**inputs, **asdict(protocol), "size": [width, height], "prompt": prompt_hash}
    del inputs["batch_size"]
    n = protocol.num_images
    return PictureJob(
        name,
        inputs,
        partial(make_pictures, sd, prompt, protocol),
        num_images=n,
        steps=protocol.steps * -(-n // protocol.batch_size),
        disk=n * (3 * min(width, THUMBNAIL) * min(height, THUMBNAIL) + 4 * 1024),
    )


def make_pictures(sd: StableDiffusion, prompt: str, protocol: Protocol, on_step: OnStep) -> list[Image.Image]:
    """The pictures of one prompt; the same ones as those of `sd.sample`."""
    options = asdict(protocol)
    seeds = range(options.pop("seed"), protocol.seed + options.pop("num_images"))
    return list(sd.sample_each([(prompt, seed) for seed in seeds], on_step=on_step, **options))


def files_job(scorer: Scorer, paths: Sequence[Path], name: str) -> PictureJob:
    """Pictures that exist already, as files."""
    stats = [path.stat() for path in paths]
    files = [[str(p), s.st_size, s.st_mtime_ns] for p, s in zip(paths, stats, strict=True)]

    def read(on_step: OnStep) -> list[Image.Image]:
        images = [open_image(path) for path in paths]
        on_step()
        return images

    inputs = {"files": files, "clip": model_hash(scorer.image_encoder)}
    return PictureJob(name, inputs, read, num_images=len(paths))


def file_name(text: str) -> str:
    """A readable file name for a text, with a hash at the end, so that no two texts have the same."""
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    readable = "-".join(words)[:40].strip("-")
    return "-".join(filter(None, [readable, hashlib.sha256(text.encode()).hexdigest()[:6]]))


def make_all(
    jobs: Iterable[PictureJob],
    measure: Measure,
    store: PictureStore,
    processes: Processes,
    first_batch: int = 1,
) -> None:
    """Make and measure all pictures that the store lacks; every process takes its share of the jobs.

    Args:
        first_batch: the steps after which the time of all is estimated.
    """
    todo = list({job.name: job for job in jobs if store.load(job) is None}.values())
    log.info("To make: %s", cost(todo))
    mine = processes.share(todo)
    with closing(
        Progress(sum(job.steps for job in mine), "sampling step", estimate_after=first_batch)
    ) as progress:
        for job in mine:
            job.measure(measure, store, progress.step)
    processes.wait()


def cost(jobs: Sequence[PictureJob]) -> str:
    """What jobs cost, for people."""
    pictures, steps, disk = (sum(getattr(j, key) for j in jobs) for key in ("num_images", "steps", "disk"))
    return f"{pictures:,} pictures in {steps:,} calls of the UNet, at most {disk / 1e6:,.0f} MB on disk"


def _hash(measurements: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(save(dict(measurements))).hexdigest()[:12]


class PictureStore:
    """What is left of the pictures of finished jobs, in a folder.

    `NAME.png` shows small versions of the pictures; `NAME.safetensors` holds the measurements and is written
    last, in one piece. A job is finished if both are there, and the second is whole and of the same inputs.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def load(self, job: PictureJob) -> dict[str, Tensor] | None:
        """The measurements of a job; None unless it is finished."""
        try:
            check_regular(self.folder / f"{job.name}.png")
            path = check_regular(self.folder / f"{job.name}.safetensors")
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (InputError, OSError, SafetensorError):
            return None
        known = json.dumps(job.inputs | {"hash": _hash(found)}, sort_keys=True)
        return found if metadata.get("inputs") == known else None

    def save(
        self, job: PictureJob, measurements: Mapping[str, Tensor], images: Sequence[Image.Image]
    ) -> None:
        """Keep what a job made. Raises OSError if it cannot be written."""
        sheet = image_grid(thumbnails(images), COLUMNS)
        write_atomically(self.folder / f"{job.name}.png", encode_png(sheet, {"num_images": str(len(images))}))
        tensors = {key: tensor.contiguous() for key, tensor in measurements.items()}
        # One entry only: safetensors writes several in an order that changes from run to run.
        about = json.dumps(job.inputs | {"hash": _hash(tensors)}, sort_keys=True)
        content = save(tensors, {"inputs": about})
        write_atomically(self.folder / f"{job.name}.safetensors", content)

    def thumbnails(self, name: str) -> list[Image.Image]:
        """Small versions of the pictures of a finished job, by name, at most THUMBNAIL pixels wide and high.

        Raises:
            InputError: the file is damaged. Without it, the pictures are made again.
        """
        path = self.folder / f"{name}.png"
        with reading_picture(path), Image.open(path, formats=["PNG"]) as file:
            sheet, count = file.convert("RGB"), int(file.text["num_images"])
            if not 0 < count <= sheet.width * sheet.height:
                raise ValueError(f"it cannot show {count} pictures")
        width, height = sheet.width // min(COLUMNS, count), sheet.height // -(-count // COLUMNS)
        corners = [(width * (i % COLUMNS), height * (i // COLUMNS)) for i in range(count)]
        return [sheet.crop((x, y, x + width, y + height)) for x, y in corners]
