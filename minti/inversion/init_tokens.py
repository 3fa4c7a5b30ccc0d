"""Chooses the tokens of an init word, and tells of words that the vocabulary lacks."""

from __future__ import annotations

import logging

from ..errors import InputError
from ..model.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def init_tokens(tokenizer: Tokenizer, phrase: str, num_vectors: int) -> list[int]:
    """The ids whose vectors a new word starts from.

    A word that the vocabulary lacks is cut into pieces, whose mean means little. Where there are too few
    vectors for one each, such a word is left out if others remain. Either way a notice says so.

    Raises:
        InputError: the phrase is empty, or too long.
    """
    words, names = list(tokenizer.pieces(phrase)), {i: name for name, i in tokenizer.vocab.items()}
    cut = {word: ids for word, ids in words if len(ids) > 1 and word not in tokenizer.placeholders}
    ids = [i for _, ids in words for i in ids]
    whole = [i for word, ids in words if word not in cut for i in ids]
    for word, pieces in cut.items() if num_vectors < len(ids) else ():
        text = ", ".join(repr(names[i].removesuffix("</w>")) for i in pieces)
        taken = "it is left out" if whole else "their mean is taken; better choose a word that it has"
        log.warning("init word %r: the vocabulary has no %r, only %s; %s", phrase, word, text, taken)
    ids = whole if whole and num_vectors < len(ids) else ids
    check_tokens(phrase, ids)
    return ids


def check_tokens(word: str, ids: list[int]) -> None:
    """Raise InputError unless these can be the tokens of an init word."""
    if not ids:
        raise InputError(f"init word {word!r} is empty; give a coarse description such as toy")
    if len(ids) > 75:
        raise InputError(f"init word {word[:60]!r} has {len(ids)} tokens; give a shorter description")
