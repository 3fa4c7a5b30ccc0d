"""The training set on disk: pictures in pairs of twins, and fresh captions for them at every step.

What a stage computes for every picture lies in a file of records, in order and without a header, so that work
that was stopped goes on with the first record that is missing, and a larger set extends a smaller one.
"""

import multiprocessing
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minti.cli.progress import Progress
from minti.errors import InputError
from minti.formats.vocabulary import read_tokenizer
from minti.model.tokenizer import Tokenizer

from . import bpe
from .captions import FACTS, Caption, caption
from .draw import render, sheet
from .kinds import KINDS, code, code_layout
from .training import Run
from .world import TOY_NAMES, Scene, scene, twin

TRAIN_SEED, TEST_SEED = 0, 1
VOCABULARY_CAPTIONS = 8_000
PICTURE, LATENT = (64, 64, 3), (4, 16, 16)
PART = 1000  # pictures drawn before they are written
CAPTIONS = 8  # of each picture; the last four name what sets it apart from its twin
TOKENS = 77
# A caption as numbers: its tokens, the class of each fact (-100: not settled), the code of what is said of
# the first thing's factors (NaN: not said).
ENCODED = np.dtype(
    [("ids", "<u2", TOKENS), ("facts", "<i2", len(FACTS)), ("code", "<f2", len(code_layout()))]
)


def records(path: Path, shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
    """The complete records of a file, (N, *shape), memory-mapped; none if there is no such file."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    count = path.stat().st_size // size if path.is_file() else 0
    if not count:
        return np.zeros((0, *shape), dtype)
    return np.memmap(path, dtype, "r", shape=(count, *shape))


def append(path: Path, shape: tuple[int, ...], values: np.ndarray) -> None:
    """Write more records, over one that a kill left unfinished."""
    count = len(records(path, shape, values.dtype))
    with open(path, "r+b" if path.is_file() else "w+b") as file:
        file.seek(count * int(np.prod(shape)) * values.itemsize)
        file.write(np.ascontiguousarray(values).tobytes())
        file.truncate()


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


def captions_at(index: int, seed: int = TRAIN_SEED) -> list[Caption]:
    """The captions of picture `index` that are stored."""
    rng = np.random.default_rng((seed, index, 2))
    original = scene(seed, index // 2)
    other, which = twin(original, seed, index // 2)
    shown = original if index % 2 == 0 else other
    return [caption(shown, rng, must=which if k >= CAPTIONS // 2 else None) for k in range(CAPTIONS)]


def encode_captions(captions: list[Caption], tokenizer: Tokenizer) -> np.ndarray:
    """(N,) records of type ENCODED."""
    found = np.zeros(len(captions), ENCODED)
    found["ids"] = tokenizer([c.text for c in captions]).numpy()
    found["code"] = np.nan
    layout = code_layout()
    for row, c in zip(found, captions, strict=True):
        row["facts"] = [v.index(c.facts[f]) if f in c.facts else -100 for f, v in FACTS.items()]
        if not c.factors:
            continue
        for kind in KINDS:
            row["code"][layout[kind,]] = kind == c.kind
        whole = code(c.kind, KINDS[c.kind].example | dict(c.factors))
        for f in c.factors:
            places = [i for key, i in layout.items() if key[:2] == (c.kind, f)]
            row["code"][places] = whole[places]
    return found


load_tokenizer = cache(read_tokenizer)  # once in each process


def encoded_at(index: int, tokenizer: Path) -> np.ndarray:
    return encode_captions(captions_at(index), load_tokenizer(tokenizer))


def vocabulary_texts(count: int = VOCABULARY_CAPTIONS) -> list[str]:
    """Captions, and every invented name often enough to become one symbol."""
    texts = [caption_at(i, np.random.default_rng(i)).text for i in range(count)]
    return texts + 2 * list(TOY_NAMES)


def build(run: Run) -> None:
    """Learn the vocabulary and render pictures until there are `run.steps`."""
    tokenizer, path = run.folder / "tokenizer", run.folder / "pictures.u8"
    if not (tokenizer / "merges.txt").is_file():
        bpe.write(tokenizer, bpe.learn(vocabulary_texts(), limit=4000))
    split = [name for name in TOY_NAMES if len(read_tokenizer(tokenizer).encode(name)) != 1]
    if split:
        raise InputError(f"{tokenizer}: more than one token for {', '.join(split[:5])}; learn more merges")
    fill(run, path, PICTURE, np.uint8, partial(picture_at, seed=TRAIN_SEED))
    drawn = records(path, PICTURE, np.uint8)
    sheet(list(drawn[:128]), 16).save(run.folder / "sheet.png")
    run.steps = len(drawn)
    encode = partial(encoded_at, tokenizer=tokenizer)
    fill(run, run.folder / "captions.bin", (CAPTIONS,), ENCODED, encode)


def fill(
    run: Run,
    path: Path,
    shape: tuple[int, ...],
    dtype: np.typing.DTypeLike,
    make: Callable[[int], np.ndarray],
) -> None:
    """Extend a file of records to `run.steps` of them, made from their numbers by `run.workers` processes."""
    done = len(records(path, shape, dtype))
    progress = Progress(-(-max(0, run.steps - done) // PART), "part")
    run.catch_signals()
    with multiprocessing.get_context("spawn").Pool(run.workers, limit_threads) as pool:
        while done < run.steps and not run.out_of_time():
            part = range(done, min(done + PART, run.steps))
            append(path, shape, np.stack(pool.map(make, part, chunksize=50)).astype(dtype))
            done = part.stop
            progress.step(f"{done} records in {path.name}")
    progress.close()


def limit_threads() -> None:
    torch.set_num_threads(1)


class Pictures:
    """Random access to the pictures of training, all or the first `limit`, by (seed, step)."""

    def __init__(self, work: Path, limit: int | None = None) -> None:
        self.pixels = records(work / "world" / "pictures.u8", PICTURE, np.uint8)[:limit]
        self.captions = records(work / "world" / "captions.bin", (CAPTIONS,), ENCODED)[:limit]
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

    def said(self, indices: np.ndarray, which: np.ndarray) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Of caption `which` of each picture: (B, 77) ids, the classes of its facts, (B, C) its code."""
        return decode_captions(self.captions[indices, which])


def to_pixels(pictures: np.ndarray) -> Tensor:
    """(B, 64, 64, 3) uint8 -> (B, 3, 64, 64) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(pixels: Tensor) -> np.ndarray:
    """The way back, clipped and rounded."""
    x = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return x.permute(0, 2, 3, 1).cpu().numpy()


def decode_captions(rows: np.ndarray) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Records of type ENCODED as tensors: (B, 77) ids, fact -> (B,) classes, (B, C) codes."""
    facts = {fact: torch.from_numpy(rows["facts"][:, i].astype(np.int64)) for i, fact in enumerate(FACTS)}
    ids = torch.from_numpy(rows["ids"].astype(np.int64))
    return ids, facts, torch.from_numpy(rows["code"].astype(np.float32))
