"""Where the vectors of a new word start."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from ..formats.concept import Concept
from ..model.stable_diffusion import StableDiffusion
from .batches import generator


def initial_rows(sd: StableDiffusion, kind: str, word: str, num_vectors: int = 1, seed: int = 0) -> Tensor:
    """Where the rows of a new word start, (num_vectors, D) float32.

    Args:
        kind: "word": the vectors of `word`, a coarse description of the concept such as "toy". The k tokens
            of a phrase are spread over the vectors: repeated if too few, averaged if too many.
            "output": the same of the text encoder's output for it (Cross Initialization, arXiv 2312.15905).
            "random": drawn from the normal distribution of the vocabulary.
            "file": the vectors of a concept file at the path `word`, however many there are.

    Raises:
        InputError: `word` is empty or of no use for that kind; a file has another number of vectors than the
            one, more than 1, that was asked for.
    """
    table = sd.vocabulary
    if kind == "file":
        rows = Concept.load(word, width=table.shape[1]).vectors
        if num_vectors not in (1, len(rows)):
            raise InputError(f"{word}: has {len(rows)} vectors, num_vectors is {num_vectors}; leave it out")
        return rows
    if kind == "random":
        mean, std = table.float().mean(0).cpu(), table.float().std(0).cpu()
        return mean + std * torch.randn(num_vectors, len(mean), generator=generator(seed, "init"))
    if kind not in ("word", "output"):
        raise InputError(f"init {kind!r}: choose from word, output, random, file")
    ids = sd.tokenizer.encode(word)
    if not ids:
        raise InputError(f"init word {word!r} is empty; give a coarse description such as toy")
    if len(ids) > 75:
        raise InputError(f"init word {word[:60]!r} has {len(ids)} tokens; give a shorter description")
    if kind == "word":
        vectors = table[torch.tensor(ids, device=table.device)]
    else:
        vectors = sd.encode_prompt([word])[0, 1 : 1 + len(ids)]  # behind the start token
    n, k = num_vectors, len(ids)
    parts = [vectors[i * k // n : max((i + 1) * k // n, i * k // n + 1)] for i in range(n)]
    return torch.stack([part.float().mean(0) for part in parts]).cpu()
