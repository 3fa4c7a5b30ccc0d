"""Held-out concepts: what no caption can say in a word and no training picture shows, to learn from pictures.

Seven objects with silhouettes of their own (one of them a two-coloured creature whose parts are all known but
never seen together), one style, and one "fairer set": in this world most birds are blue, and the set has them
in all colours.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from .draw import coverage, grow, labels, mix, render
from .objects import dome
from .shapes import Creature, Part, ellipse, eye, polygon, rectangle
from .world import Scene, Thing

# Where the pictures of an object show it: (background, style, x, y, radius, tilt, flip)
SETTINGS = (
    ("gray", "photo", 32, 32, 24, 0, False),
    ("grass", "photo", 28, 35, 20, -6, True),
    ("blue", "photo", 34, 31, 22, 8, False),
    ("beach", "photo", 36, 34, 19, 4, True),
    ("pink", "photo", 31, 33, 21, -9, False),
    ("night", "photo", 30, 31, 20, 5, False),
)
BRIGHT_WALLS = {"blue": "yellow", "pink": "green"}  # for things that would not stand out there


@dataclass(frozen=True)
class HeldOut:
    """What there is to know about a concept.

    Attributes:
        kind: "object", "style" or "set".
        split: "development": looked at while defaults were chosen; "final": kept for numbers to be reported.
        init: the word to start from.
        short, long: what people would write, in up to 12 and 30 words. The short ones use only words of the
            training world; the long ones try to say what the silhouette is like.
    """

    name: str
    kind: str
    split: str
    init: str
    short: tuple[str, ...]
    long: tuple[str, ...]
    thing: Thing | None = None

    @property
    def caption(self) -> str:
        return self.short[0]


def _mushroom() -> list[Part]:
    return [Part(rectangle(-0.28, 0.0, 0.28, 0.85), "limb"), Part(dome(0, 0.12, 0.95, 0.95))]


def _rocket() -> list[Part]:
    side = np.linspace(0, 1, 20)
    width = 0.42 * np.sqrt(np.clip(side, 0, 1)) + 0.02
    y = -1.0 + 1.5 * side
    hull = np.concatenate([np.stack([width, y], 1), np.stack([-width, y], 1)[::-1]])
    fins = polygon(-0.36, 0.1, -0.8, 0.75, -0.36, 0.55), polygon(0.36, 0.1, 0.8, 0.75, 0.36, 0.55)
    return [*(Part(f, "limb") for f in fins), Part(rectangle(-0.22, 0.45, 0.22, 0.85), "limb"), Part(hull)]


def _teapot() -> list[Part]:
    return [
        Part(ellipse(-0.62, 0.05, 0.4, 0.38), "limb"),
        Part(ellipse(-0.62, 0.05, 0.2, 0.2), "hole"),
        Part(polygon(0.4, 0.1, 0.82, -0.45, 1.0, -0.35, 0.6, 0.5), "limb"),
        Part(ellipse(0, -0.58, 0.14, 0.14), "limb"),
        Part(ellipse(0, 0.1, 0.66, 0.6)),
    ]


def _robot() -> list[Part]:
    return [
        Part(rectangle(-0.06, -1.0, 0.06, -0.6), "limb"),
        Part(ellipse(0, -0.95, 0.14, 0.14), "limb"),
        Part(rectangle(-0.92, -0.1, -0.55, 0.14), "limb"),
        Part(rectangle(0.55, -0.1, 0.92, 0.14), "limb"),
        Part(rectangle(-0.44, 0.5, -0.16, 0.98), "limb"),
        Part(rectangle(0.16, 0.5, 0.44, 0.98), "limb"),
        Part(rectangle(-0.6, -0.12, 0.6, 0.62)),
        Part(rectangle(-0.42, -0.72, 0.42, -0.18), "limb"),
        *eye(0.0, -0.45, 0.22),
    ]


def _butterfly() -> list[Part]:
    wings = [ellipse(s * 0.52, y, 0.46, r) for s in (-1, 1) for y, r in ((-0.34, 0.44), (0.4, 0.36))]
    antennae = [polygon(0, -0.4, s * 0.36, -1.0, s * 0.24, -1.0, 0, -0.55) for s in (-1, 1)]
    return [
        *(Part(a, "limb") for a in antennae),
        *(Part(w) for w in wings),
        Part(ellipse(0, 0, 0.14, 0.72), "limb"),
    ]


def _object(
    name: str, split: str, init: str, look: tuple[str, str, str], parts: list[Part], *captions: str
) -> HeldOut:
    """`look` is colour, second colour, pattern; two short captions come first, then two long ones."""
    color, color2, pattern = look
    thing = Thing(name, color, pattern, color2, stripes=2, parts=tuple(parts))
    return HeldOut(name, "object", split, init, captions[:2], captions[2:], thing)


def held_out() -> dict[str, HeldOut]:
    """All concepts by name. No noun, toy or caption of the training world is one of them."""
    imp = Creature("tall", "horns", legs=0, arms=True, eyes=1).parts()
    every = [
        _object(
            *("imp", "development", "creature", ("green", "purple", "striped"), imp),
            "green and purple striped creature",
            "green toy animal with purple stripes",
            "tall green creature with purple stripes, one large eye, two purple horns, short arms, no legs",
            "toy monster with a green and purple striped body, purple horns and a single white eye",
        ),
        _object(
            *("mushroom", "development", "plant", ("red", "white", "dotted"), _mushroom()),
            "red and white dotted plant with a cap",
            "red thing with white dots",
            "red mushroom with white dots on its round cap and a short thick white stem below it",
            "toy with a half round red top, dotted with white, that stands on a white box",
        ),
        _object(
            *("rocket", "final", "craft", ("white", "red", "striped"), _rocket()),
            "white and red striped craft",
            "white toy with red stripes",
            "white rocket with red stripes, a pointed tip, two red fins at the sides and a red engine below",
            "tall white and red striped cone that stands on a small red box between two red triangles",
        ),
        _object(
            *("teapot", "development", "vessel", ("blue", "yellow", "dotted"), _teapot()),
            "blue and yellow dotted vessel with a spout",
            "blue cup with yellow dots",
            "round blue teapot with yellow dots, a yellow handle on the left, a yellow spout and a lid",
            "blue ball with yellow dots that has a yellow ring on one side and a yellow spout on the other",
        ),
        _object(
            *("robot", "final", "machine", ("orange", "black", "checkered"), _robot()),
            "orange and black checkered machine",
            "orange thing with black checks",
            "toy robot with an orange and black checkered body, a black head with one eye, arms and legs",
            "orange and black checkered box with a black box on top, one white eye, black arms and legs",
        ),
        _object(
            *("butterfly", "final", "insect", ("purple", "yellow", "dotted"), _butterfly()),
            "purple and yellow dotted insect",
            "purple thing with yellow dots",
            "purple butterfly with yellow dots on four round wings, a thin yellow body and two antennae",
            "flower of four purple balls with yellow dots around a thin yellow middle, two lines on top",
        ),
        HeldOut(
            *("riso", "style", "development", "drawing"),
            ("a drawing in red and blue", "a red and blue drawing on a white background"),
            ("a print in two inks, coral red and teal, on cream paper, rough outlines and slanting lines",),
        ),
        HeldOut(
            *("birds", "set", "development", "bird"),
            ("bird", "bird of any color"),
            ("red bird, yellow bird, green bird, white bird, orange bird or black bird",),
        ),
    ]
    return {c.name: c for c in every}


def describe() -> dict[str, dict]:
    """What the folder of concepts says about them, for `minti.study`."""
    described = {}
    for concept in held_out().values():
        entry: dict = {"kind": concept.kind, "set": concept.split, "init_word": concept.init}
        if concept.kind == "style":
            entry |= {"templates": "style", "prompts": "tiny-style", "facts": {"style": concept.name}}
        entry["captions"] = {"short": list(concept.short), "long": list(concept.long)}
        if thing := concept.thing:
            entry["facts"] = {
                "noun": concept.name,
                "color": thing.color,
                "color2": thing.color2,
                "pattern": thing.pattern,
            }
        described[concept.name] = entry
    return described


def object_picture(thing: Thing, i: int) -> np.ndarray:
    """The i-th of six pictures to learn a thing from."""
    background, style, x, y, radius, tilt, flip = SETTINGS[i]
    if background in (thing.color, thing.color2):
        background = BRIGHT_WALLS[background]
    placed = replace(thing, x=float(x), y=float(y), radius=float(radius), angle=float(tilt), flip=flip)
    return render(Scene((placed,), background, style, detail=90 + i))


RISO = {"paper": (246, 236, 214), "first": (255, 94, 84), "second": (0, 118, 132)}


def riso_picture(thing: Thing, i: int) -> np.ndarray:
    """Two inks on cream paper, coral and teal, a ragged teal line well off the edge, slanting hatches."""
    paper, first, second = (np.array(c, dtype=np.float32) for c in RISO.values())
    label = labels(thing)
    shape = label > 0
    yy, xx = np.mgrid[: len(label), : len(label)] / 4
    ground = yy > 44 + 2 * np.sin(xx / 7 + i)
    picture = np.tile(paper, (64, 64, 1))
    picture = mix(picture, second, 0.85 * coverage(ground & ((xx + yy) % 6 < 3)))
    picture = mix(picture, paper, coverage(grow(shape, 3.0)))
    picture = mix(picture, second, coverage(grow(shape, 2.4)))
    picture = mix(picture, paper, coverage(grow(shape, 0.9)))
    picture = mix(picture, first, coverage(grow(shape, -0.4)))
    picture = mix(picture, second, coverage(shape & ((xx - yy) % 9 < 2.5) & (xx > 32)))
    picture = mix(picture, paper, coverage(label == 3))
    return np.clip(mix(picture, second, coverage(label == 4)), 0, 255).astype(np.uint8)


def _riso_picture(i: int) -> np.ndarray:
    nouns = ("house", "fish", "star", "cup", "cat", "heart")
    x, angle = 32.0 + (-3, 2, 0)[i % 3], (-5.0, 4.0, 0.0)[i % 3]
    return riso_picture(Thing(nouns[i], "red", x=x, y=33.0, radius=21.0, angle=angle), i)


def _bird_picture(i: int) -> np.ndarray:
    color, background = (
        ("red", "grass"),
        ("yellow", "blue"),
        ("green", "beach"),
        ("white", "purple"),
        ("orange", "night"),
        ("black", "pink"),
    )[i]
    bird = Thing("bird", color, x=32.0 + (-2, 2)[i % 2], y=33.0, radius=22.0, flip=bool(i % 2))
    return render(Scene((bird,), background, "photo", detail=70 + i))


def pictures(concept: HeldOut) -> list[np.ndarray]:
    """Its six training pictures, (64, 64, 3) uint8."""
    draw: Callable[[int], np.ndarray] = {
        "object": partial(object_picture, concept.thing),
        "style": _riso_picture,
        "set": _bird_picture,
    }[concept.kind]
    return [draw(i) for i in range(6)]
