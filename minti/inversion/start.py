"""Where the vectors of a new word start."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..errors import InputError
from ..formats.concept import Concept
from ..model.stable_diffusion import StableDiffusion
from .batches import generator

log = logging.getLogger(__name__)


def initial_rows(sd: StableDiffusion, kind: str, word: str, num_vectors: int = 1, seed: int = 0) -> Tensor:
    """Where the rows of a new word start, (num_vectors, D) float32.

    Args:
        kind: "word": the vectors of `word`, a coarse description of the concept such as "toy", or a word that
            was learned before. The k tokens of a phrase are spread over the vectors: repeated if too few,
            averaged if too many (see `_tokens`).
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
    ids = _tokens(sd, word, num_vectors) if kind == "word" else sd.tokenizer.encode(word)
    if not ids:
        raise InputError(f"init word {word!r} is empty; give a coarse description such as toy")
    if len(ids) > 75:
        raise InputError(f"init word {word[:60]!r} has {len(ids)} tokens; give a shorter description")
    if kind == "word":
        with torch.no_grad():
            vectors = sd.look_up(torch.tensor([ids], device=table.device))[0]
    else:
        vectors = sd.encode_prompt([word])[0, 1 : 1 + len(ids)]  # behind the start token
    n, k = num_vectors, len(ids)
    parts = [vectors[i * k // n : max((i + 1) * k // n, i * k // n + 1)] for i in range(n)]
    return torch.stack([part.float().mean(0) for part in parts]).cpu()


def _tokens(sd: StableDiffusion, phrase: str, num_vectors: int) -> list[int]:
    """The ids that a phrase is averaged over.

    A word that the vocabulary lacks is cut into pieces, whose mean means little. Where there are too few
    vectors for one each, such a word is left out if others remain. Either way a notice says so.
    """
    words, names = list(sd.tokenizer.pieces(phrase)), {i: name for name, i in sd.tokenizer.vocab.items()}
    cut = {word: ids for word, ids in words if len(ids) > 1 and word not in sd.tokenizer.placeholders}
    ids = [i for _, ids in words for i in ids]
    whole = [i for word, ids in words if word not in cut for i in ids]
    for word, pieces in cut.items() if num_vectors < len(ids) else ():
        text = ", ".join(repr(names[i].removesuffix("</w>")) for i in pieces)
        taken = "it is left out" if whole else "their mean is taken; better choose a word that it has"
        log.warning("init word %r: the vocabulary has no %r, only %s; %s", phrase, word, text, taken)
    return whole if whole and num_vectors < len(ids) else ids
