"""Placeholder words: where they stand in prompts, which ones cannot be used, and where one is cut off."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import regex

from ..errors import InputError

log = logging.getLogger(__name__)


def words_pattern(words: Iterable[str]) -> regex.Pattern[str]:
    """Where any of some cleaned placeholder words stands in a cleaned text, as a group."""

    def bounded(word: str) -> str:
        before = r"(?<![\p{L}\p{N}])" if word[0].isalnum() else ""
        after = r"(?![\p{L}\p{N}])" if word[-1].isalnum() else ""
        return before + regex.escape(word) + after

    return regex.compile("(" + "|".join(map(bounded, sorted(words, key=len, reverse=True))) + ")")


def check_placeholder(
    word: str, key: str, ids: Sequence[int], used: Iterable[str], unknown: int | None
) -> None:
    """Raise InputError unless a word may become a placeholder.

    Args:
        word, key: as it was given, and cleaned.
        ids: how the vocabulary spells it.
        used: the placeholders that there are.
        unknown: `Tokenizer.unknown_id`.
    """
    if key in used:
        raise InputError(f"placeholder {word!r} is in use already; rename one of the two")
    if len(ids) == 1 and any(c.isalnum() for c in key) and ids != [unknown]:
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
