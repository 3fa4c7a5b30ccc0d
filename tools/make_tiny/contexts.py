"""What the UNet is told of every picture, computed once: its training never runs the text encoder.

Three of a picture's captions, each with all 77 tokens, as the finished model has them. In two of them the
vectors of invented names are moved about (see `words.py`).
"""

import hashlib
from pathlib import Path

import numpy as np
import torch

from minti.cli.progress import Progress
from minti.errors import InputError

from . import models
from .colors import COLORS, PATTERNS
from .data import TOKENS, Pictures, append, records
from .text import load_text_encoder
from .training import Run, ema_of
from .words import NOISE, Disturbed, name_ids

VARIANTS = ((0, NOISE), (1, NOISE), (5, 0.0))  # which caption, and how far its names are moved
CONTEXT = (len(VARIANTS), TOKENS, models.CONTEXT)


def stored_contexts(work: Path) -> np.ndarray:
    """(N, 3, 77, 128) float16.

    Raises:
        InputError: they were computed with other weights than the text encoder has now.
    """
    made_with = work / "contexts" / "text_encoder.sha256"
    if made_with.is_file() and made_with.read_text() != weights_hash(work, "text", "text_encoder"):
        raise InputError(f"{made_with.parent}: of an older text encoder; delete it and run `contexts` again")
    return records(work / "contexts" / "contexts.f16", CONTEXT, np.float16)


def bare_names(pictures: Pictures) -> np.ndarray:
    """(K, 2) pictures, and which of their VARIANTS calls a thing by its name and says no more of its look."""
    encode, found = pictures.tokenizer.encode, []
    looks = [encode(word)[0] for word in (*COLORS, *PATTERNS)]
    for k, (which, _) in enumerate(VARIANTS):
        ids = pictures.captions["ids"][:, which]  # (N, 77)
        is_name = np.isin(ids[:, 1:], name_ids(pictures.tokenizer).numpy())
        rows = np.flatnonzero((is_name & ~np.isin(ids[:, :-1], looks)).any(axis=1))
        found.append(np.stack([rows, np.full_like(rows, k)], axis=1))
    return np.concatenate(found)


def weights_hash(work: Path, stage: str, part: str) -> str:
    """Of the weights that a stage has left."""
    digest = hashlib.sha256()
    for key, value in sorted(ema_of(work, stage)[part].items()):
        digest.update(key.encode() + value.numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def stage(run: Run) -> None:
    """Goes on with the first picture that has no contexts; `run.steps` of them, or all."""
    pictures = Pictures(run.work, run.steps or None)
    text, names = load_text_encoder(run.work, pictures.tokenizer, run.device), name_ids(pictures.tokenizer)
    run.folder.mkdir(parents=True, exist_ok=True)
    path, done = run.folder / "contexts.f16", len(stored_contexts(run.work))
    (run.folder / "text_encoder.sha256").write_text(weights_hash(run.work, "text", "text_encoder"))
    progress = Progress(-(-max(0, len(pictures) - done) // run.batch), "part")
    run.catch_signals()
    while done < len(pictures) and not run.out_of_time():
        indices = np.arange(done, min(done + run.batch, len(pictures)))
        found = np.zeros((len(indices), *CONTEXT), np.float16)
        for k, (which, noise) in enumerate(VARIANTS):
            ids, _, _ = pictures.said(indices, np.full(len(indices), which))
            with Disturbed(text.token_embedding, names.to(run.device), noise, run.rng(done + k)):
                found[:, k] = text(ids.to(run.device)).context.cpu().numpy()
        append(path, CONTEXT, found)
        done += len(indices)
        progress.step()
    progress.close()
    print(f"{len(stored_contexts(run.work))} pictures have contexts", flush=True)
