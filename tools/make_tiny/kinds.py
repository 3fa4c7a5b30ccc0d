"""Kinds of things, the factors that make one thing of a kind unlike another, and what training never shows.

A factor is a choice ("horns" or "antenna") or a number ("width"). All are drawn independently of each other,
so that the silhouettes of a kind fill a space, in which a thing never seen has neighbours on all sides.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from . import animals, objects
from .animals import Factors
from .shapes import Part

EARS = ("none", "pointy", "round", "long", "horns", "antenna", "crest")


@dataclass(frozen=True)
class Kind:
    """A family of things.

    Attributes:
        words: what any thing of this kind is called, the commonest word first.
        share: how many of the things are of this kind, in proportion.
        choices: factor -> the values it can have.
        ranges: factor -> the least and the greatest number it can be.
        traits: (factor, value) -> how a caption says so: "horned" or "with wings".
    """

    draw: Callable[[Factors], list[Part]]
    words: tuple[str, ...]
    share: float
    choices: Mapping[str, tuple]
    ranges: Mapping[str, tuple[float, float]]
    traits: Mapping[tuple, str] = field(default_factory=dict)

    @property
    def example(self) -> Factors:
        """Some value for every factor."""
        return {f: v[0] for f, v in (*self.choices.items(), *self.ranges.items())}


KINDS: dict[str, Kind] = {
    "creature": Kind(
        animals.creature, ("creature", "monster", "animal"), 4,
        {"ears": EARS, "eyes": (1, 2, 3), "arms": ("none", "short", "long", "raised"), "legs": (0, 2, 3, 4),
         "tail": ("none", "curl", "spike"), "wings": ("none", "none", "round", "bat"), "mouth": ("none",
         "open")},
        {"width": (0.42, 0.8), "height": (0.42, 0.78), "power": (1.4, 6.0), "taper": (-0.3, 0.35),
         "ear size": (0.8, 1.25), "leg length": (0.18, 0.42)},
        {("ears", "horns"): "horned", ("ears", "pointy"): "with pointy ears",
         ("ears", "round"): "with round ears",
         ("ears", "long"): "with long ears", ("ears", "antenna"): "with an antenna",
         ("ears", "crest"): "crested",
         ("eyes", 1): "one-eyed", ("eyes", 2): "two-eyed", ("eyes", 3): "three-eyed",
         ("arms", "short"): "with short arms", ("arms", "long"): "with long arms",
         ("arms", "raised"): "with raised arms", ("arms", "none"): "without arms",
         ("legs", 0): "without legs",
         ("legs", 2): "two-legged", ("legs", 3): "three-legged", ("legs", 4): "four-legged",
         ("tail", "curl"): "with a round tail", ("tail", "spike"): "with a pointed tail",
         ("wings", "round"): "with round wings", ("wings", "bat"): "with pointed wings",
         ("mouth", "open"): "with an open mouth"},
    ),
    "bird": Kind(
        animals.bird, ("animal", "creature"), 1,
        {"tail": ("fan", "forked", "long"), "beak": ("short", "long", "flat"),
         "crest": ("none", "tuft", "crown"), "wings": ("none", "folded", "up")},
        {"width": (0.45, 0.7), "height": (0.3, 0.5), "head": (0.25, 0.38), "neck": (0.0, 0.5),
         "leg length": (0.15, 0.55)},
        {("beak", "long"): "with a long beak", ("beak", "flat"): "with a flat beak",
         ("crest", "tuft"): "crested",
         ("crest", "crown"): "with a crown", ("wings", "up"): "with wings",
         ("tail", "forked"): "with a forked tail",
         ("tail", "long"): "with a long tail"},
    ),
    "fish": Kind(
        animals.fish, ("swimmer", "animal"), 1,
        {"tail": ("forked", "round", "pointed"), "fin": ("none", "sharp", "sail"),
         "belly": ("none", "fins", "legs"), "snout": ("none", "sword", "lamp")},
        {"width": (0.5, 0.85), "height": (0.3, 0.65), "power": (1.4, 3.5)},
        {("tail", "forked"): "with a forked tail", ("tail", "round"): "with a round tail",
         ("tail", "pointed"): "with a pointed tail", ("fin", "sharp"): "with a fin",
         ("fin", "sail"): "with a sail",
         ("belly", "fins"): "with fins", ("belly", "legs"): "two-legged", ("snout", "sword"): "with a sword",
         ("snout", "lamp"): "with a lamp"},
    ),
    "insect": Kind(
        animals.insect, ("insect", "bug"), 2,
        {"wing pairs": (0, 1, 2), "wings": ("round", "pointed"), "feelers": ("none", "straight", "knobs"),
         "legs": (0, 4, 6), "tail": ("none", "sting")},
        {"length": (0.45, 0.75), "thickness": (0.13, 0.34), "head": (0.14, 0.26), "wing length": (0.3, 0.5),
         "wing width": (0.16, 0.42), "spread": (0, 60)},
        {("wing pairs", 1): "with two wings", ("wing pairs", 2): "with four wings",
         ("wing pairs", 0): "without wings",
         ("feelers", "straight"): "with feelers", ("feelers", "knobs"): "with an antenna",
         ("legs", 0): "without legs",
         ("legs", 4): "four-legged", ("legs", 6): "six-legged", ("tail", "sting"): "with a sting"},
    ),
    "craft": Kind(
        objects.craft, ("craft", "vehicle"), 1.5,
        {"nose": ("round", "sharp", "flat"), "fins": ("none", "two", "wings", "rings"),
         "engine": ("none", "box", "bell", "flame"), "windows": (0, 1, 2)},
        {"width": (0.24, 0.5), "height": (0.65, 0.95), "nose length": (0.4, 1.3), "sweep": (-0.1, 0.4)},
        {("nose", "sharp"): "with a pointed tip", ("nose", "flat"): "with a flat top",
         ("fins", "two"): "with fins",
         ("fins", "wings"): "with wings", ("fins", "rings"): "with rings",
         ("engine", "bell"): "with an engine",
         ("engine", "flame"): "with a flame", ("windows", 1): "with a window",
         ("windows", 2): "with windows"},
    ),
    "car": Kind(
        objects.car, ("car", "vehicle"), 1,
        {"cabin": ("front", "middle", "long", "dome"), "wheels": (2, 3, 4), "roof": ("none", "flag",
         "ladder"),
         "front": ("none", "nose", "plough"), "window": ("none", "square")},
        {"height": (0.2, 0.42), "wheel size": (0.18, 0.32)},
        {("wheels", 2): "with two wheels", ("wheels", 3): "with three wheels",
         ("wheels", 4): "with four wheels",
         ("roof", "flag"): "with a flag", ("roof", "ladder"): "with a ladder",
         ("front", "plough"): "with a plough",
         ("front", "nose"): "with a pointed tip", ("window", "square"): "with a window"},
    ),
    "boat": Kind(
        objects.boat, ("boat", "vehicle"), 1,
        {"sail": ("none", "one", "two", "square"), "deck": ("none", "house", "funnel"),
         "hull": ("round", "boxy", "sharp"), "portholes": (0, 2, 3), "flag": ("none", "stern")},
        {"depth": (0.35, 0.65), "width": (0.75, 1.1), "mast": (0.8, 1.4)},
        {("sail", "one"): "with a sail", ("sail", "two"): "with two sails",
         ("sail", "square"): "with a square sail",
         ("sail", "none"): "without sails", ("deck", "house"): "with a cabin",
         ("deck", "funnel"): "with a chimney",
         ("portholes", 3): "with windows", ("flag", "stern"): "with a flag"},
    ),
    "plant": Kind(
        objects.plant, ("plant", "sprout"), 2,
        {"top": ("dome", "ball", "cone", "petals", "tulip", "fan", "star"), "leaves": (0, 1, 2, 4),
         "pot": ("none", "pot", "bulb"), "petals": (4, 5, 6, 8)},
        {"stem": (0.06, 0.3), "size": (0.5, 0.95), "height": (0.7, 1.3)},
        {("top", "dome"): "with a cap", ("top", "petals"): "with petals", ("top", "ball"): "with a round top",
         ("top", "cone"): "with a pointed top", ("top", "tulip"): "with a crown",
         ("top", "fan"): "with a fan",
         ("top", "star"): "with a star", ("leaves", 0): "without leaves", ("leaves", 1): "with a leaf",
         ("leaves", 2): "with two leaves", ("leaves", 4): "with four leaves", ("pot", "pot"): "in a pot"},
    ),
    "vessel": Kind(
        objects.vessel, ("vessel", "pot", "jug"), 2.5,
        {"handle": ("none", "left", "both", "basket"), "spout": ("none", "long", "short"),
         "foot": ("none", "legs", "ring", "stem"), "lid": ("none", "knob", "cone", "neck")},
        {"width": (0.4, 0.75), "height": (0.4, 0.75), "power": (1.5, 6.0), "taper": (-0.4, 0.4)},
        {("handle", "left"): "with a handle", ("handle", "both"): "with two handles",
         ("handle", "basket"): "with a hoop",
         ("handle", "none"): "without handles", ("spout", "long"): "with a spout",
         ("spout", "short"): "with a lip",
         ("foot", "legs"): "with legs", ("foot", "stem"): "with a stem", ("lid", "knob"): "with a lid",
         ("lid", "cone"): "with a pointed lid", ("lid", "neck"): "with a neck"},
    ),
    "machine": Kind(
        objects.machine, ("machine", "android"), 2,
        {"head": ("box", "round", "dome"), "eyes": (1, 2, 4), "antennas": (0, 1, 2),
         "arms": ("none", "straight", "raised", "hanging"), "legs": ("two", "wheels", "track", "spring")},
        {"width": (0.35, 0.65), "height": (0.3, 0.5), "head size": (0.22, 0.36), "power": (2.0, 8.0)},
        {("head", "round"): "with a round head", ("head", "box"): "with a square head",
         ("eyes", 1): "one-eyed",
         ("eyes", 2): "two-eyed", ("antennas", 1): "with an antenna", ("antennas", 2): "with two antennas",
         ("arms", "straight"): "with short arms", ("arms", "raised"): "with raised arms",
         ("arms", "hanging"): "with long arms", ("arms", "none"): "without arms",
         ("legs", "two"): "two-legged",
         ("legs", "wheels"): "with two wheels"},
    ),
    "building": Kind(
        objects.building, ("building", "tower"), 1,
        {"side": ("none", "towers", "chimney", "annex"), "roof": ("flat", "gable", "dome", "battlement"),
         "door": ("none", "square", "arch"), "windows": (0, 1, 2)},
        {"width": (0.35, 0.8), "height": (0.4, 0.9), "roof height": (0.35, 0.8)},
        {("side", "towers"): "with two towers", ("side", "chimney"): "with a chimney",
         ("roof", "gable"): "with a roof",
         ("roof", "dome"): "with a round top", ("roof", "flat"): "with a flat top",
         ("door", "square"): "with a door",
         ("door", "arch"): "with a gate", ("windows", 1): "with a window", ("windows", 2): "with windows"},
    ),
    "tool": Kind(
        objects.tool, ("tool",), 1,
        {"head": ("hammer", "axe", "spade", "fork", "pick", "comb"), "end": ("none", "ball", "grip", "spike"),
         "band": ("none", "guard")},
        {"handle": (0.06, 0.16), "length": (1.0, 1.7), "size": (0.45, 0.8)},
        {("head", "axe"): "with a blade", ("head", "fork"): "with teeth", ("end", "ball"): "with a knob",
         ("end", "grip"): "with a grip", ("band", "guard"): "with a guard"},
    ),
    "badge": Kind(
        objects.badge, ("badge",), 1,
        {"points": (3, 4, 5, 6, 8), "edge": ("sharp", "round", "gear"), "middle": ("none", "hole", "dot",
         "eye"),
         "hang": ("none", "ribbon", "stick")},
        {"depth": (0.15, 0.6), "flatness": (0.7, 1.0)},
        {("points", 3): "three-pointed", ("points", 4): "four-pointed", ("points", 5): "five-pointed",
         ("points", 6): "six-pointed", ("points", 8): "eight-pointed", ("middle", "hole"): "with a hole",
         ("middle", "dot"): "with a knob", ("middle", "eye"): "one-eyed", ("hang", "ribbon"): "with a ribbon",
         ("hang", "stick"): "on a stick"},
    ),
}  # fmt: skip

# The concepts of `concepts.py`, in the factors of their kinds: never drawn in training.
CONCEPTS: tuple[tuple[str, dict], ...] = (
    ("creature", {"ears": "horns", "eyes": 1, "arms": "short", "legs": 0}),
    ("plant", {"top": "dome", "leaves": 0, "pot": "none"}),
    ("craft", {"fins": "two", "engine": "box", "windows": 0}),
    ("vessel", {"handle": "left", "spout": "long", "lid": "knob"}),
    ("machine", {"head": "box", "eyes": 1, "antennas": 1, "arms": "straight"}),
    ("insect", {"wing pairs": 2, "wings": "round", "feelers": "straight", "legs": 0}),
)
COMBINATIONS = 50  # pairs of choices that are kept out of training as well


def agrees(factors: Mapping, wanted: Mapping) -> bool:
    return all(factors[name] == value for name, value in wanted.items())


@cache
def combinations() -> tuple[tuple[str, dict], ...]:
    """Pairs of choices that occur in no thing of the training, each with its kind; none is of a concept."""
    rng, found = np.random.default_rng(20260101), []
    names = list(KINDS)
    while len(found) < COMBINATIONS:
        kind = names[len(found) % len(names)]
        choices = KINDS[kind].choices
        a, b = sorted(str(f) for f in rng.choice(list(choices), 2, replace=False))
        pair = {f: choices[f][int(rng.integers(len(choices[f])))] for f in (a, b)}
        plain = any(value in ("none", 0) for value in pair.values())
        of_concept = any(k == kind and all(c.get(f) == v for f, v in pair.items()) for k, c in CONCEPTS)
        if not plain and not of_concept and (kind, pair) not in found:
            found.append((kind, pair))
    return tuple(found)


def is_held_out(kind: str, factors: Mapping) -> bool:
    """Whether it has a combination of choices that training must not show."""
    return any(k == kind and agrees(factors, c) for k, c in (*CONCEPTS, *combinations()))


def random_factors(kind: str, rng: np.random.Generator, fixed: Mapping | None = None) -> Factors:
    """One thing of a kind, free of what is held out; with `fixed` choices, of no concept at least."""
    k = KINDS[kind]
    while True:
        found: Factors = {f: values[int(rng.integers(len(values)))] for f, values in k.choices.items()}
        found |= {f: round(float(rng.uniform(*ends)), 3) for f, ends in k.ranges.items()} | dict(fixed or {})
        if fixed and not any(kind == c and agrees(found, e) for c, e in CONCEPTS):
            return found
        if not fixed and not is_held_out(kind, found):
            return found


def random_kind(rng: np.random.Generator) -> str:
    shares = np.array([kind.share for kind in KINDS.values()], dtype=float)
    return list(KINDS)[int(rng.choice(len(shares), p=shares / shares.sum()))]


def build(kind: str, factors: Factors) -> tuple[Part, ...]:
    """The parts, moved and scaled so that all of them fit in the unit circle."""
    parts = KINDS[kind].draw(factors)
    points = np.concatenate([part.points for part in parts])
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    reach = np.linalg.norm(points - middle, axis=1).max()
    return tuple(Part((part.points - middle) / reach, part.role) for part in parts)


@cache
def code_layout() -> dict[tuple, int]:
    """(kind,), (kind, factor, value) and (kind, factor) -> their places in a thing's code."""
    keys: list[tuple] = [(kind,) for kind in KINDS]
    for name, kind in KINDS.items():
        keys += [(name, f, v) for f, values in kind.choices.items() for v in dict.fromkeys(values)]
        keys += [(name, f) for f in kind.ranges]
    return {key: i for i, key in enumerate(keys)}


def code(kind: str, factors: Mapping) -> np.ndarray:
    """What a thing is, as numbers: 1 for each choice made and its kind, -1 to 1 for what has a range."""
    layout = code_layout()
    vector = np.zeros(len(layout), dtype=np.float32)
    vector[layout[kind,]] = 1
    for f in KINDS[kind].choices:
        vector[layout[kind, f, factors[f]]] = 1
    for f, (low, high) in KINDS[kind].ranges.items():
        vector[layout[kind, f]] = 2 * (factors[f] - low) / (high - low) - 1
    return vector
