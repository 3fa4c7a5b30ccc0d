"""Where the vectors of a new word start: at a word that describes the concept coarsely."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..errors import InputError
from ..model.stable_diffusion import StableDiffusion

log = logging.getLogger(__name__)


@torch.no_grad()
def word_rows(sd: StableDiffusion, word: str, num_vectors: int = 1) -> Tensor:
    """The vectors of a word or phrase, (num_vectors, D) float32 on the CPU.

    Args:
        word: a coarse description of the concept, such as "toy", or a word that was learned before.

    Raises:
        InputError: `word` is empty, or too long.
    """
    ids = _tokens(sd, word, num_vectors)
    check_tokens(word, ids)
    return spread(sd.look_up(torch.tensor([ids], device=sd.device))[0], num_vectors)


def check_tokens(word: str, ids: list[int]) -> None:
    """Raise InputError unless these can be the tokens of an init word."""
    if not ids:
        raise InputError(f"init word {word!r} is empty; give a coarse description such as toy")
    if len(ids) > 75:
        raise InputError(f"init word {word[:60]!r} has {len(ids)} tokens; give a shorter description")


def spread(vectors: Tensor, n: int) -> Tensor:
    """Spread k vectors, (k, D), over n: repeated if too few, averaged if too many. Returns (n, D) float32."""
    k = len(vectors)
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
