"""Placeholder words: where they stand in prompts, which ones cannot be used, and where one is cut off."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import regex

from ..errors import InputError

log = logging.getLogger(__name__)


def words_pattern(words: Iterable[str]) -> regex.Pattern[str]:
    """Where any of some cleaned placeholder words stands in a cleaned text, as a group.

    A word is found wherever it stands alone: next to punctuation ("<toy>.", "(*)"), but a word of letters or
    digits not inside a longer one ("sks" is not in "tasks"). Of two words that could begin at the same place
    the longer one is taken.
    """

    def bounded(word: str) -> str:
        before = r"(?<![\p{L}\p{N}])" if word[0].isalnum() else ""
        after = r"(?![\p{L}\p{N}])" if word[-1].isalnum() else ""
        return before + regex.escape(word) + after

    return regex.compile("(" + "|".join(map(bounded, sorted(words, key=len, reverse=True))) + ")")


def check_text(text: object) -> None:
    """Raise InputError if a prompt or a word is no text, or holds bytes that are no UTF-8."""
    if not isinstance(text, str):
        raise InputError(f"{text!r}: a prompt or a word should be text")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise InputError(f"{text!r}: holds bytes that are no UTF-8; give it in UTF-8")


def check_vocabulary(vocab: Mapping[str, int], needed: Iterable[str], source: str, kind: str) -> None:
    """Raise InputError unless a vocabulary has the symbols that a kind of tokenizer needs."""
    for symbol in needed:
        if symbol not in vocab:
            raise InputError(f"{source}: the vocabulary has no {symbol!r}; is it {kind}'s tokenizer?")


class Vocabulary(Protocol):
    """What `check_placeholder` needs to know of a `Tokenizer`."""

    placeholders: Mapping[str, object]
    unknown_id: int | None

    def encode(self, text: str) -> list[int]: ...


def check_placeholder(word: str, key: str, tokenizer: Vocabulary, replace: bool) -> None:
    """Raise InputError unless a word, whose cleaned form is the key, may become a placeholder.

    Args:
        replace: allow a word that means something already.
    """
    if not key:
        raise InputError(f"placeholder {word!r} is empty; choose something like <toy>")
    if replace:
        return
    if key in tokenizer.placeholders:
        raise InputError(f"placeholder {word!r} is in use already; rename one of the two")
    ids = tokenizer.encode(key)
    if len(ids) == 1 and any(c.isalnum() for c in key) and ids != [tokenizer.unknown_id]:
        why = "is a word the model knows and would lose its meaning"
        raise InputError(f"placeholder {word!r} {why}; choose another, such as <{key}>")


def check_cut(
    prompt: str, pieces: Sequence[tuple[str, Sequence[int]]], room: int, placeholders: Mapping[str, object]
) -> None:
    """Warn of the words of a prompt that are cut off; raise InputError if a placeholder is among them.

    Args:
        pieces: the words of the prompt with their ids.
        room: how many ids fit.
    """
    lost, count = [], 0
    for word, ids in pieces:
        count += len(ids)
        if count <= room:
            continue
        if word in placeholders:
            why = f"with its {len(ids)} vectors does not fit into the {room} tokens of a prompt"
            remedy = f"shorten the text before it, or sample with long_prompts: {prompt[:60]!r}"
            raise InputError(f"{word!r} {why}; {remedy}")
        lost.append(word)
    cut = " ".join(lost)
    log.warning(
        "a prompt has %d tokens at most; cut off: %r", room, cut if len(cut) <= 200 else f"{cut[:200]}..."
    )
