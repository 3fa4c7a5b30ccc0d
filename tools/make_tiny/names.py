"""Invented names, each of one particular thing with a look of its own, as "bumblebee" is with us.

1,100 names occur in training. 100 more things have a name that only their classifier knows: 50 drawn like the
others, and 50 that have a combination of choices which training never shows. How well a word for one of those
is learned from pictures tells how dense the vocabulary is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from .animals import Factors
from .colors import PATTERNS, two_colors
from .kinds import build, combinations, random_factors, random_kind
from .shapes import Part

FIRST_NAMES = (
    *("blick", "dax", "fep", "gazzer", "kiki", "modi", "nork", "pilu", "quop", "rafu", "sib", "tavo"),
    *("ubo", "vink", "wug", "yub", "zorp", "bimo", "cagi", "dofa", "eldo", "fumo", "gorp", "hibi"),
)
TRAINED, HELD_OUT_THINGS = 1100, 50
RESERVED = {"solo", "pony", "papa", "mama", "dodo", "puma", "kiwi", "tuba", "sofa", "lego", "toga", "robot"}


@dataclass(frozen=True)
class Named:
    """What a name means."""

    name: str
    kind: str
    factors: Mapping
    color: str
    pattern: str
    color2: str | None
    parts: tuple[Part, ...]


def _names(count: int) -> list[str]:
    """Pronounceable words: two syllables, some of them closed. The first 24 are the first edition's."""
    rng = np.random.default_rng(20220803)
    found = dict.fromkeys(FIRST_NAMES)
    while len(found) < count:
        syllables = [
            str(rng.choice(list("bdfgjklmnprtvz"))) + str(rng.choice(list("aeiou"))) for _ in range(2)
        ]
        word = "".join(syllables) + str(rng.choice(["", "", *"bkmnpt"]))
        if word not in RESERVED:
            found[word] = None
    return list(found)


def _look(rng: np.random.Generator) -> tuple[str, str, str | None]:
    """Colour, pattern and second colour."""
    color, color2 = two_colors(rng)
    pattern = PATTERNS[int(rng.choice(4, p=(0.16, 0.28, 0.28, 0.28)))]
    return color, pattern, None if pattern == "plain" else color2


@cache
def _every() -> tuple[Named, ...]:
    """All named things, the held-out ones last; the same on every call."""
    fixed: list[tuple[str, Mapping] | None] = [None] * (TRAINED + HELD_OUT_THINGS) + list(combinations())
    found = []
    for i, (name, pair) in enumerate(zip(_names(len(fixed)), fixed, strict=True)):
        rng = np.random.default_rng((20220802, i))
        kind = pair[0] if pair else random_kind(rng)
        factors: Factors = random_factors(kind, rng, pair[1] if pair else None)
        found.append(Named(name, kind, factors, *_look(rng), build(kind, factors)))
    return tuple(found)


@cache
def trained() -> dict[str, Named]:
    """The things whose names occur in captions."""
    return {thing.name: thing for thing in _every()[:TRAINED]}


@cache
def held_out_things() -> dict[str, Named]:
    """Things like those of the training that it never shows."""
    return {thing.name: thing for thing in _every()[TRAINED : TRAINED + HELD_OUT_THINGS]}


@cache
def held_out_combinations() -> dict[str, Named]:
    """Things with a pair of choices that the training never shows."""
    return {thing.name: thing for thing in _every()[TRAINED + HELD_OUT_THINGS :]}
