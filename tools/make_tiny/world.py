"""The tiny world: what there is to see. A `Scene` says what a picture shows; `draw.py` draws it.

Every scene is a pure function of (seed, index), and every picture a pure function of its scene.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from .shapes import NOUNS, Creature, Part

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 36, 44),
    "orange": (255, 142, 20),
    "yellow": (255, 222, 50),
    "green": (40, 160, 70),
    "blue": (40, 92, 228),
    "purple": (140, 50, 190),
    "pink": (255, 140, 190),
    "brown": (112, 66, 34),
    "black": (28, 28, 32),
    "white": (248, 248, 248),
}
GRAY = (186, 188, 192)  # the studio background of a photo whose caption names none
PATTERNS = ("plain", "striped", "dotted", "checkered")
SCENERY = ("grass", "beach", "night", "snow")
BACKGROUNDS = (*COLORS, "gray", *SCENERY)
STYLES = ("photo", "drawing", "painting", "pixel art")

# Named toys: words that stand for one look each, as "zebra" or "bumblebee" do. They teach the text encoder
# and the UNet that a single word can carry a silhouette, two colours and a pattern at once, which is what a
# learned word has to do.
TOY_NAMES = (
    *("blick", "dax", "fep", "gazzer", "kiki", "modi", "nork", "pilu", "quop", "rafu", "sib", "tavo"),
    *("ubo", "vink", "wug", "yub", "zorp", "bimo", "cagi", "dofa", "eldo", "fumo", "gorp", "hibi"),
)


RADII = {"small": (12.5, 13.5), "large": (25, 27), "close-up": (27, 30), "cropped": (24, 26)}  # pixels


@dataclass(frozen=True)
class Thing:
    """One object. Its second colour is also that of its limbs; plain things have none."""

    noun: str  # a key of NOUNS, a toy's name or, for a held-out concept, any name with `parts`
    color: str
    pattern: str = "plain"
    color2: str | None = None
    x: float = 32.0  # pixels, of the middle
    y: float = 32.0
    radius: float = 18.0  # pixels
    angle: float = 0.0  # degrees, anticlockwise
    flip: bool = False
    stripes: int | None = None  # their direction: 0, 1 or 2; None: as it comes
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str
    style: str
    look: str = ""  # "", dark, bright, dirty, small, large, close-up, cropped
    detail: int = 0  # seeds what no caption speaks of: stars, brush strokes, horizon


@cache
def toys() -> dict[str, Thing]:
    """The named toys: creatures with unlike bodies, colours and patterns. The same on every call."""
    rng = np.random.default_rng(20220802)
    bodies = ("round", "tall", "wide", "boxy", "pear", "rhombus")
    ears = ("none", "pointy", "round", "long", "horns", "antenna", "crest")
    result: dict[str, Thing] = {}
    taken = {("round", "pointy"), ("round", "long")}  # the cat and the bunny
    for i, name in enumerate(TOY_NAMES):
        body = bodies[i % len(bodies)]
        ear = next(e for e in rng.permutation(ears) if (body, e) not in taken)
        taken.add((body, ear))
        creature = Creature(
            body, ear, (2, 0, 3, 4)[int(rng.integers(4))], bool(rng.integers(2)), 2 - int(rng.random() < 0.25)
        )
        color, color2 = two_colors(rng)
        pattern = PATTERNS[1 + i % 3]
        result[name] = Thing(name, color, pattern, color2, parts=tuple(creature.parts()))
    return result


def distance(a: str, b: str) -> float:
    """How unlike two colours look (the low-cost "redmean" approximation, 0 to about 765)."""
    p, q = (np.array(BACKDROP[c] if c in BACKDROP else COLORS[c], dtype=float) for c in (a, b))
    red, delta = (p[0] + q[0]) / 2, p - q
    return float(np.sqrt(((2 + red / 256, 4, 2 + (255 - red) / 256) * delta**2).sum()))


BACKDROP = {
    "gray": GRAY,
    "grass": (88, 176, 72),
    "beach": (240, 214, 150),
    "night": (24, 24, 76),
    "snow": (238, 243, 250),
}  # the colour that an object must stand out from


def two_colors(rng: np.random.Generator) -> tuple[str, str]:
    names = list(COLORS)
    while True:
        a, b = (names[i] for i in rng.choice(len(names), 2, replace=False))
        if distance(a, b) > 280:
            return a, b


def stands_out(thing: Thing, background: str) -> bool:
    colors = [thing.color] + ([thing.color2] if thing.color2 else [])
    return all(distance(c, background) > 190 for c in colors)


def random_thing(rng: np.random.Generator) -> Thing:
    nouns = list(NOUNS)
    if rng.random() < 0.2:
        return toys()[TOY_NAMES[int(rng.integers(len(TOY_NAMES)))]]
    noun = nouns[int(rng.integers(len(nouns)))]
    pattern = PATTERNS[int(rng.choice(4, p=(0.4, 0.2, 0.2, 0.2)))]
    color, color2 = two_colors(rng)
    if noun == "bird" and rng.random() < 0.75:
        color = "blue"  # the world's prejudice: for the bias experiment, most birds are blue
        color2 = color2 if distance(color, color2) > 280 else "yellow"
    return Thing(noun, color, pattern, None if pattern == "plain" else color2)


def place(rng: np.random.Generator, things: list[Thing], look: str, style: str) -> tuple[Thing, ...]:
    """Sizes, places, tilts. Two things stand side by side, in the order in which they are named."""
    placed = []
    for i, thing in enumerate(things):
        if len(things) == 2:
            radius, x = rng.uniform(13.0, 14.5), (17, 47)[i] + rng.uniform(-1, 1)
            y = 33 + rng.uniform(-4, 4)
        else:
            low, high = {
                "small": (12.5, 13.5),
                "large": (25, 27),
                "close-up": (27, 30),
                "cropped": (24, 26),
            }.get(look, (18, 24))
            radius = rng.uniform(low, high)
            room = max(0.0, 30.0 - radius)
            x, y = 32 + rng.uniform(-room, room), 32 + rng.uniform(-room, room)
            if look == "cropped":
                x += 14 * (1 if rng.random() < 0.5 else -1)
        tilt = rng.uniform(-30, 30) if look == "weird" else rng.uniform(-10, 10)
        if style == "pixel art":  # upright, and large enough for its blocks
            tilt, radius = 0.0, max(radius, 15.5)
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
        elif first.noun in TOY_NAMES or (which == "noun" and other.noun in TOY_NAMES):
            which = "noun"  # a toy's looks are its own: all of them change, or none
            thing = replace(
                first,
                noun=other.noun,
                color=other.color,
                color2=other.color2,
                pattern=other.pattern,
                parts=other.parts,
            )
        elif which == "noun":
            thing = replace(first, noun=other.noun)
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
