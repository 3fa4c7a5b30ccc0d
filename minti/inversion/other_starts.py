"""Other places for the vectors of a new word to start than those of a word that describes the concept."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from ..formats.concept import Concept
from ..model.stable_diffusion import StableDiffusion
from .batches import generator
from .init_tokens import check_tokens
from .start import spread, word_rows


def initial_rows(sd: StableDiffusion, kind: str, word: str, num_vectors: int = 1, seed: int = 0) -> Tensor:
    """Where the rows of a new word start, (num_vectors, D) float32.

    Args:
        kind: "word": see `word_rows`.
            "output": the text encoder's output for `word`, spread over the vectors in the same way (Cross
            Initialization, arXiv 2312.15905).
            "random": drawn from the normal distribution of the vocabulary's vectors.
            "file": the vectors of a concept file at the path `word`, however many there are.

    Raises:
        InputError: `word` is empty or of no use for that kind; a file has another number of vectors than the
            one, more than 1, that was asked for.
    """
    if kind == "word":
        return word_rows(sd, word, num_vectors)
    if kind == "output":
        ids = sd.tokenizer.encode(word)
        check_tokens(word, ids)
        return spread(sd.encode_prompt([word])[0, 1 : 1 + len(ids)], num_vectors)  # behind the start token
    if kind == "random":
        tables = [table.weight.float() for table in sd.tables]
        mean, std = (torch.cat([f(table, dim=0) for table in tables]).cpu() for f in (torch.mean, torch.std))
        return mean + std * torch.randn(num_vectors, len(mean), generator=generator(seed, "init"))
    if kind == "file":
        rows = Concept.load(word, width=sum(table.weight.shape[1] for table in sd.tables)).vectors
        if num_vectors not in (1, len(rows)):
            raise InputError(f"{word}: has {len(rows)} vectors, num_vectors is {num_vectors}; leave it out")
        return rows
    raise InputError(f"init {kind!r}: choose from word, output, random, file")
