"""Pictures made in order to be judged: how they are made, and how finished ones are kept."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..cli.images import COLUMNS, image_grid, thumbnails
from ..cli.processes import Processes
from ..cli.progress import Progress
from ..formats.atomic import write_atomically
from ..formats.photos import open_image
from ..model.model_hash import model_hash
from ..model.stable_diffusion import StableDiffusion
from .scorer import Scorer

log = logging.getLogger(__name__)

Tick = Callable[[], None]  # called after every step of a long job


@dataclass(frozen=True)
class Protocol:
    """How pictures are made in order to be scored. The defaults are the paper's (arXiv 2208.01618)."""

    num_images: int = 64  # of each prompt; picture i has seed + i
    steps: int = 50
    guidance_scale: float = 5.0
    eta: float = 0.0
    seed: int = 0
    size: int | tuple[int, int] | None = None  # pixels; None: what the model was trained on
    batch_size: int = 8  # changes memory and speed, not the pictures


PAPER = Protocol()


@dataclass(frozen=True)
class Job:
    """One prompt whose pictures are wanted.

    Attributes:
        name: under which a store keeps them.
        about: all that they and their embeddings depend on, as JSON has it.
        make: makes the pictures, and calls what it is given `ticks` times.
    """

    name: str
    about: Mapping[str, Any]
    make: Callable[[Tick], list[Image.Image]]
    ticks: int = 1

    def embed(self, scorer: Scorer, store: Store | None = None, tick: Tick = lambda: None) -> Tensor:
        """(N, P) embeddings of the pictures: from the store, or else made, and then kept there."""
        if store and (kept := store.load(self)) is not None:
            return kept
        images = self.make(tick)
        embeddings = scorer.embed_images(images)
        if store:
            store.save(self, embeddings, images)
        return embeddings


def models(sd: StableDiffusion, scorer: Scorer) -> dict[str, str]:
    """What tells the models apart that make and judge pictures."""
    return {
        "model": model_hash(sd.text_encoder, sd.unet, sd.vae),
        "dtype": str(sd.dtype),
        "clip": model_hash(scorer.image_encoder),
    }


def prompt_job(
    sd: StableDiffusion, prompt: str, protocol: Protocol, about: Mapping[str, Any], name: str
) -> Job:
    """Pictures that a model makes of a prompt.

    The prompt, and with it the learned word, is known by the vectors that the text encoder looks up for it.

    Args:
        about: what else the pictures depend on, see `models`.

    Raises:
        InputError: the prompt has no room for the word; an impossible size.
    """
    vectors = sd.look_up(sd.tokenizer([prompt]).to(sd.device)).detach().float()
    prompt_hash = hashlib.sha256(vectors.cpu().numpy().tobytes()).hexdigest()[:12]
    size = list(sd.check_size(protocol.size))
    about = {**about, **asdict(protocol), "size": size, "prompt": prompt_hash}
    del about["batch_size"]
    batches = -(-protocol.num_images // protocol.batch_size)
    return Job(name, about, partial(make_pictures, sd, prompt, protocol), batches * protocol.steps)


def make_pictures(sd: StableDiffusion, prompt: str, protocol: Protocol, tick: Tick) -> list[Image.Image]:
    """The pictures of one prompt, those of `sd.sample`; `tick` is called after each step of each batch."""
    how = {key: getattr(protocol, key) for key in ("steps", "guidance_scale", "eta", "size")}
    seeds = range(protocol.seed, protocol.seed + protocol.num_images)
    images = []
    for i in range(0, len(seeds), protocol.batch_size):
        batch = seeds[i : i + protocol.batch_size]
        for x_t in sd.denoise([prompt] * len(batch), batch, **how):
            latents = x_t
            tick()
        images += sd.decode_latents(latents)
    return images


def files_job(scorer: Scorer, paths: Sequence[Path], name: str) -> Job:
    """Pictures that are there already, as files."""
    stats = [path.stat() for path in paths]
    files = [[str(p), s.st_size, s.st_mtime_ns] for p, s in zip(paths, stats, strict=True)]

    def read(tick: Tick) -> list[Image.Image]:
        images = [open_image(path) for path in paths]
        tick()
        return images

    return Job(name, {"files": files, "clip": model_hash(scorer.image_encoder)}, read)


def file_name(text: str) -> str:
    """A name for people, and one that no two texts share."""
    readable = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    return "-".join(
        [*"-".join(readable)[:40].strip("-").split(), hashlib.sha256(text.encode()).hexdigest()[:6]]
    )


def make_all(jobs: Iterable[Job], scorer: Scorer, store: Store, processes: Processes) -> None:
    """Make and embed every picture that is not there yet; every process takes its share of the jobs."""
    todo = {job.name: job for job in jobs if store.load(job) is None}
    log.info("%d sets of pictures are still to be made", len(todo))
    mine = processes.share(list(todo.values()))
    progress = Progress(sum(job.ticks for job in mine), "sampling step")
    try:
        for job in mine:
            job.embed(scorer, store, progress.step)
    finally:
        progress.close()
    processes.wait()


class Store:
    """The pictures of finished jobs in a folder: as embeddings, and small in a grid, `<name>.png`.

    A job counts as finished once its embeddings are there, which are written last and in one piece.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def load(self, job: Job) -> Tensor | None:
        """The (N, P) embeddings, if they are there and were made just as the job wants them."""
        try:
            with safe_open(self.folder / f"{job.name}.safetensors", framework="pt") as file:
                same = (file.metadata() or {}).get("about") == _text(job.about)
                return file.get_tensor("embeddings") if same else None
        except (OSError, SafetensorError):
            return None

    def save(self, job: Job, embeddings: Tensor, images: Sequence[Image.Image]) -> None:
        """Keep what a job made. Raises OSError if it cannot be written."""
        buffer = io.BytesIO()
        image_grid(thumbnails(images), COLUMNS).save(buffer, "PNG")
        write_atomically(self.folder / f"{job.name}.png", buffer.getvalue())
        content = save({"embeddings": embeddings.contiguous()}, {"about": _text(job.about)})
        write_atomically(self.folder / f"{job.name}.safetensors", content)

    def pictures(self, job: Job) -> list[Image.Image]:
        """The pictures of a finished job as they are in the grid: at most 128 pixels wide and high."""
        with safe_open(self.folder / f"{job.name}.safetensors", framework="pt") as file:
            count = file.get_slice("embeddings").get_shape()[0]
        with Image.open(self.folder / f"{job.name}.png") as file:
            grid = file.convert("RGB")
        width, height = grid.width // min(COLUMNS, count), grid.height // -(-count // COLUMNS)
        corners = [(width * (i % COLUMNS), height * (i // COLUMNS)) for i in range(count)]
        return [grid.crop((x, y, x + width, y + height)) for x, y in corners]


def _text(about: Mapping[str, Any]) -> str:
    return json.dumps(about, sort_keys=True)
