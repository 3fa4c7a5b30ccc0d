"""The tiny world: what there is to see. A `Scene` says what a picture shows; `draw.py` draws it.

Every scene is a pure function of (seed, index), and every picture a pure function of its scene.
"""

from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np

from . import names
from .colors import COLORS, PATTERNS, distance, two_colors
from .kinds import build, random_factors, random_kind
from .shapes import NOUNS, Part

SCENERY = ("grass", "beach", "night", "snow")
BACKGROUNDS = (*COLORS, "gray", *SCENERY)
STYLES = ("photo", "drawing", "painting", "pixel art")

TOY_NAMES = tuple(names.trained())  # words that stand for one look each


RADII = {"small": (12.5, 13.5), "large": (25, 27), "close-up": (27, 30), "cropped": (24, 26)}  # pixels


@dataclass(frozen=True)
class Thing:
    """One object. Its second colour is also that of its limbs; plain things have none."""

    noun: str  # a key of NOUNS, a toy's name, "" for what has no name, or for what is held out any name
    color: str
    pattern: str = "plain"
    color2: str | None = None
    x: float = 32.0  # pixels, of the middle
    y: float = 32.0
    radius: float = 18.0  # pixels
    angle: float = 0.0  # degrees, anticlockwise
    flip: bool = False
    stripes: int | None = None  # their direction: 0, 1 or 2; None: as it comes
    parts: tuple[Part, ...] = field(default=(), compare=False)
    kind: str = ""  # a key of KINDS, of what is drawn from factors
    factors: tuple[tuple[str, str | int | float], ...] = ()

    @property
    def looks_as_named(self) -> bool:
        """Whether its name alone says its colours and its pattern."""
        own = toys().get(self.noun)
        return own is not None and (own.color, own.color2, own.pattern) == (
            self.color,
            self.color2,
            self.pattern,
        )


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str
    style: str
    look: str = ""  # "", dark, bright, dirty, small, large, close-up, cropped
    detail: int = 0  # seeds what no caption speaks of: stars, brush strokes, horizon


@cache
def toys() -> dict[str, Thing]:
    """The named things, each with its own look. The same on every call."""
    return {name: named_thing(named) for name, named in names.trained().items()}


def named_thing(named: names.Named) -> Thing:
    return Thing(
        *(named.name, named.color, named.pattern, named.color2),
        parts=named.parts,
        kind=named.kind,
        factors=tuple(named.factors.items()),
    )


def stands_out(thing: Thing, background: str) -> bool:
    colors = [thing.color] + ([thing.color2] if thing.color2 else [])
    return all(distance(c, background) > 190 for c in colors)


def random_look(rng: np.random.Generator) -> tuple[str, str, str | None]:
    """Colour, pattern and second colour, which plain things have not."""
    pattern = PATTERNS[int(rng.choice(4, p=(0.4, 0.2, 0.2, 0.2)))]
    color, color2 = two_colors(rng)
    return color, pattern, None if pattern == "plain" else color2


def random_thing(rng: np.random.Generator) -> Thing:
    """A noun, a named thing in its own look or another, or a thing without a name."""
    color, pattern, color2 = random_look(rng)
    which = rng.random()
    if which < 0.52:
        toy = toys()[TOY_NAMES[int(rng.integers(len(TOY_NAMES)))]]
        if which < 0.36:
            return toy
        return replace(toy, color=color, pattern=pattern, color2=color2)
    if which < 0.72:
        kind = random_kind(rng)
        factors = random_factors(kind, rng)
        look = (color, pattern, color2)
        return Thing("", *look, parts=build(kind, factors), kind=kind, factors=tuple(factors.items()))
    noun = list(NOUNS)[int(rng.integers(len(NOUNS)))]
    if noun == "bird" and rng.random() < 0.75:
        color = "blue"  # the world's prejudice: for the bias experiment, most birds are blue
        if color2 and distance(color, color2) <= 280:
            color2 = "yellow"
    return Thing(noun, color, pattern, color2)


def place(rng: np.random.Generator, things: list[Thing], look: str, style: str) -> tuple[Thing, ...]:
    """Sizes, places, tilts. Two things stand side by side, in the order in which they are named."""
    placed = []
    for i, thing in enumerate(things):
        if len(things) == 2:
            radius, x = rng.uniform(13.0, 14.5), (17, 47)[i] + rng.uniform(-1, 1)
            y = 33 + rng.uniform(-4, 4)
        else:
            low, high = RADII.get(look, (19, 25))
            radius = rng.uniform(low, high)
            room = max(0.0, 30.0 - radius)
            x, y = 32 + rng.uniform(-room, room), 32 + rng.uniform(-room, room)
            if look == "cropped":
                x += 14 * (1 if rng.random() < 0.5 else -1)
        tilt = rng.uniform(-30, 30) if look == "weird" else rng.uniform(-10, 10)
        if style == "pixel art":  # upright, and large enough for its blocks
            tilt, radius = 0.0, max(radius, 20.0 if len(things) == 1 else 15.5)
        placed.append(
            replace(
                thing,
                x=float(x),
                y=float(y),
                radius=float(radius),
                angle=float(tilt),
                flip=bool(rng.random() < 0.5),
            )
        )
    return tuple(placed)


def scene(seed: int, index: int) -> Scene:
    """Scene number `index` of the endless sequence `seed`."""
    rng = np.random.default_rng((seed, index))
    style = STYLES[int(rng.integers(len(STYLES)))]
    looks = ("dark", "bright", "dirty", "small", "large", "close-up", "cropped", "weird")
    look = looks[int(rng.integers(len(looks)))] if rng.random() < 0.25 else ""
    while True:
        things = [random_thing(rng)]
        if not look and rng.random() < 0.1:
            things.append(random_thing(rng))
        background = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
        if rng.random() < 0.35:
            background = SCENERY[int(rng.integers(len(SCENERY)))]
        if all(stands_out(t, background) for t in things):
            break
    return Scene(place(rng, things, look, style), background, style, look, int(rng.integers(2**31)))


def twin(original: Scene, seed: int, index: int) -> tuple[Scene, str]:
    """A scene that differs from `original` in one attribute of its first thing or of the whole: a hard
    negative for its caption. Also the name of that attribute."""
    rng = np.random.default_rng((seed, index, 1))
    first = original.things[0]
    while True:
        which = str(rng.choice(["noun", "color", "color2", "pattern", "background", "style"]))
        other, (color, color2) = random_thing(rng), two_colors(rng)
        thing, background, style = first, original.background, original.style
        if which == "background":
            background = str(rng.choice(BACKGROUNDS))
        elif which == "style":
            style = str(rng.choice(STYLES))
        elif which == "noun":
            shape = {"noun": other.noun, "parts": other.parts, "kind": other.kind, "factors": other.factors}
            thing = replace(first, **shape)
        elif which == "color":
            thing = replace(first, color=color)
        elif which == "color2":
            thing = replace(first, color2=first.color2 and color2)
        else:
            pattern = str(rng.choice(PATTERNS))
            thing = replace(
                first, pattern=pattern, color2=None if pattern == "plain" else first.color2 or color2
            )
        new = replace(original, things=(thing, *original.things[1:]), background=background, style=style)
        clear = thing.color2 is None or distance(thing.color, thing.color2) > 280
        if new != original and clear and all(stands_out(t, background) for t in new.things):
            return new, which
