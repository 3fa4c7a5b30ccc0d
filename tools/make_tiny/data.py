"""The training set on disk: pictures in pairs of twins, and fresh captions for them at every step."""

import multiprocessing
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minti.cli.progress import Progress
from minti.formats.vocabulary import read_tokenizer

from . import bpe
from .captions import FACTS, Caption, caption
from .draw import render, sheet
from .world import Scene, scene, twin

TRAIN_SEED, TEST_SEED = 0, 1
VOCABULARY_CAPTIONS = 40_000


def scene_at(index: int, seed: int = TRAIN_SEED) -> Scene:
    """Pictures 2k and 2k + 1 are twins: alike in all but one attribute."""
    original = scene(seed, index // 2)
    return original if index % 2 == 0 else twin(original, seed, index // 2)[0]


def caption_at(
    index: int, rng: np.random.Generator, seed: int = TRAIN_SEED, contrast: bool = False
) -> Caption:
    """A caption for picture `index`; with `contrast` it names what sets the picture apart from its twin."""
    if not contrast:
        return caption(scene_at(index, seed), rng)
    original = scene(seed, index // 2)
    other, which = twin(original, seed, index // 2)
    return caption(original if index % 2 == 0 else other, rng, must=which)


def picture_at(index: int, seed: int) -> np.ndarray:
    return render(scene_at(index, seed))


def build(work: Path, count: int) -> None:
    """Learn the vocabulary and render `count` pictures, where that is not done yet."""
    tokenizer = work / "world" / "tokenizer"
    if not (tokenizer / "merges.txt").is_file():
        texts = [caption_at(i, np.random.default_rng(i)).text for i in range(VOCABULARY_CAPTIONS)]
        bpe.write(tokenizer, bpe.learn(texts, limit=2000))
    path, part = work / "world" / "pictures.npy", work / "world" / "pictures.part.npy"
    if path.is_file() and len(np.load(path, mmap_mode="r")) >= count:
        return
    pictures = np.lib.format.open_memmap(part, "w+", np.uint8, (count, 64, 64, 3))
    progress = Progress(count, "picture")
    with multiprocessing.get_context("spawn").Pool() as pool:
        rendered = pool.imap(partial(picture_at, seed=TRAIN_SEED), range(count), chunksize=256)
        for i, picture in enumerate(rendered):
            pictures[i] = picture
            progress.step()
    progress.close()
    pictures.flush()
    part.replace(path)
    sheet(list(pictures[:128]), 16).save(work / "world" / "sheet.png")


class Pictures:
    """Random access to the pictures of training, all or the first `limit`, by (seed, step)."""

    def __init__(self, work: Path, limit: int | None = None) -> None:
        self.pixels = np.load(work / "world" / "pictures.npy", mmap_mode="r")[:limit]
        self.tokenizer = read_tokenizer(work / "world" / "tokenizer")

    def __len__(self) -> int:
        return len(self.pixels)

    def indices(self, step: int, count: int, seed: int = 0) -> np.ndarray:
        """(count,) pictures of a step: every epoch visits each once, in an order of its own."""
        per_epoch = len(self) // count
        epoch, i = divmod(step, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(len(self))
        return np.sort(order[i * count : (i + 1) * count])

    def batch(self, indices: np.ndarray) -> Tensor:
        """(B, 3, 64, 64) float32 in [-1, 1]."""
        return to_pixels(self.pixels[indices])

    def ids(self, captions: list[Caption]) -> Tensor:
        return self.tokenizer([c.text for c in captions])


def to_pixels(pictures: np.ndarray) -> Tensor:
    """(B, 64, 64, 3) uint8 -> (B, 3, 64, 64) float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(pixels: Tensor) -> np.ndarray:
    """The way back, clipped and rounded."""
    x = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return x.permute(0, 2, 3, 1).cpu().numpy()


def fact_targets(captions: list[Caption]) -> dict[str, Tensor]:
    """For each fact (B,) class numbers, -100 where a caption does not settle it."""
    return {
        fact: torch.tensor([values.index(c.facts[fact]) if fact in c.facts else -100 for c in captions])
        for fact, values in FACTS.items()
    }
