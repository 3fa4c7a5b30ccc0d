"""Silhouettes: every noun of the tiny world as a handful of polygons.

The origin is the middle of the thing, x points right, y points down, and the whole fits in a circle of
radius 1. A `Part` says what a polygon is for; `world.py` gives it its colours.
"""

from dataclasses import dataclass

import numpy as np

Points = np.ndarray  # (N, 2) float64


@dataclass(frozen=True)
class Part:
    """One polygon. `role` is one of

    - `body`: carries the pattern;
    - `limb`: in the second colour, never patterned (ears, legs, stems);
    - `hole`: cut out of what was drawn before it;
    - `white`, `dark`: eyes.
    """

    points: Points
    role: str = "body"


def polygon(*xy: float) -> Points:
    return np.asarray(xy, dtype=np.float64).reshape(-1, 2)


def ellipse(x: float, y: float, rx: float, ry: float, n: int = 40) -> Points:
    a = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return np.stack([x + rx * np.cos(a), y + ry * np.sin(a)], 1)


def superellipse(y: float, rx: float, ry: float, power: float, n: int = 56) -> Points:
    """|x/rx|^power + |(y-y0)/ry|^power = 1: a rhombus at 1, an ellipse at 2, nearly a rectangle at 6."""
    a = np.linspace(0, 2 * np.pi, n, endpoint=False)
    c, s = np.cos(a), np.sin(a)
    xs = rx * np.sign(c) * np.abs(c) ** (2 / power)
    return np.stack([xs, y + ry * np.sign(s) * np.abs(s) ** (2 / power)], 1)


def rectangle(x0: float, y0: float, x1: float, y1: float) -> Points:
    return polygon(x0, y0, x1, y0, x1, y1, x0, y1)


def turned(points: Points, degrees: float, x: float = 0.0, y: float = 0.0) -> Points:
    """Turn about the origin, clockwise as seen in a picture; then move by (x, y)."""
    a = np.deg2rad(degrees)
    return points @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]) + np.array([x, y])


def star(points: int, inner: float) -> Points:
    a = np.arange(2 * points) * np.pi / points - np.pi / 2
    r = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner)
    return np.stack([r * np.cos(a), r * np.sin(a)], 1)


def heart() -> Points:
    a = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    x = 16 * np.sin(a) ** 3
    y = -(13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a))
    return np.stack([x / 16, (y + 2.5) / 15], 1)


def crescent() -> Points:
    """The unit disc less a disc of radius 0.8 whose middle lies at x = 0.5, as one outline."""
    x = (1 - 0.8**2 + 0.5**2) / (2 * 0.5)  # where the two circles meet
    a, b = np.arctan2(np.sqrt(1 - x * x), x), np.arctan2(np.sqrt(1 - x * x), x - 0.5)
    outer, inner = np.linspace(a, 2 * np.pi - a, 40), np.linspace(2 * np.pi - b, b, 40)
    outside = np.stack([np.cos(outer), np.sin(outer)], 1)
    inside = np.stack([0.5 + 0.8 * np.cos(inner), 0.8 * np.sin(inner)], 1)
    return np.concatenate([outside, inside]) + np.array([0.15, 0.0])


def flower() -> Points:
    a = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    r = 0.72 + 0.26 * np.cos(5 * a + np.pi / 2)
    return np.stack([r * np.cos(a), r * np.sin(a)], 1)


def eye(x: float, y: float, r: float = 0.18) -> list[Part]:
    return [Part(ellipse(x, y, r, r, 20), "white"), Part(ellipse(x, y, 0.55 * r, 0.55 * r, 14), "dark")]


@dataclass(frozen=True)
class Creature:
    """A toy animal seen from the front, put together from a few choices."""

    body: str = "round"  # round, tall, wide, boxy, pear, rhombus
    ears: str = "none"  # none, pointy, round, long, horns, antenna, crest
    legs: int = 2  # 0, 2, 3 or 4
    arms: bool = False
    eyes: int = 2  # 1 or 2

    def parts(self) -> list[Part]:
        rx, ry, power = {
            "round": (0.66, 0.60, 2.2),
            "tall": (0.46, 0.76, 2.6),
            "wide": (0.86, 0.46, 2.4),
            "boxy": (0.60, 0.56, 7.0),
            "pear": (0.62, 0.64, 2.2),
            "rhombus": (0.84, 0.74, 1.2),
        }[self.body]
        body = superellipse(0.0, rx, ry, power)
        if self.body == "pear":
            body[:, 0] *= 0.80 + 0.36 * body[:, 1] / ry
        limbs = self._ears(rx if self.body not in ("pear", "rhombus") else 0.7 * rx, -ry)
        for k in range(self.legs):
            x = rx * 0.55 * (2 * k / (self.legs - 1) - 1)
            limbs.append(rectangle(x - 0.13, 0.4 * ry, x + 0.13, ry + 0.26))
        if self.arms:
            limbs += [ellipse(side * (rx + 0.06), 0.05, 0.24, 0.13) for side in (-1, 1)]
        parts = [Part(p, "limb") for p in limbs] + [Part(body)]
        if self.eyes == 1:
            parts += eye(0.0, -0.25 * ry, 0.24)
        elif self.eyes == 2:
            parts += eye(-0.36 * rx, -0.25 * ry) + eye(0.36 * rx, -0.25 * ry)
        return parts

    def _ears(self, rx: float, top: float) -> list[Points]:
        sides = (-1, 1)
        if self.ears == "pointy":
            return [
                polygon(s * 0.98 * rx, top - 0.42, s * 0.12 * rx, top + 0.1, s * 0.98 * rx, top + 0.5)
                for s in sides
            ]
        if self.ears == "round":
            return [ellipse(s * 0.78 * rx, top + 0.06, 0.27, 0.27) for s in sides]
        if self.ears == "long":
            return [ellipse(s * 0.46 * rx, top - 0.24, 0.16, 0.46) for s in sides]
        if self.ears == "horns":
            return [
                polygon(
                    s * 0.3 * rx,
                    top + 0.12,
                    s * 0.75 * rx,
                    top - 0.02,
                    s * 1.2 * rx,
                    top - 0.5,
                    s * 1.05 * rx,
                    top + 0.3,
                    s * 0.7 * rx,
                    top + 0.4,
                )
                for s in sides
            ]
        if self.ears == "antenna":
            return [rectangle(-0.07, top - 0.4, 0.07, top + 0.2), ellipse(0, top - 0.42, 0.2, 0.2)]
        if self.ears == "crest":
            xs = (-0.36, 0.0, 0.36)
            return [polygon(x - 0.24, top + 0.3, x, top - 0.4 + abs(x), x + 0.24, top + 0.3) for x in xs]
        return []


def bird() -> list[Part]:
    return [
        Part(polygon(-0.4, 0.0, -1.0, -0.42, -1.0, 0.3), "limb"),  # tail
        Part(polygon(0.6, -0.5, 1.05, -0.28, 0.6, -0.1), "limb"),  # beak
        Part(rectangle(-0.16, 0.4, -0.04, 0.95), "limb"),
        Part(rectangle(0.12, 0.4, 0.24, 0.95), "limb"),
        Part(np.concatenate([ellipse(-0.05, 0.15, 0.62, 0.5)[:20], ellipse(0.0, 0.0, 0.58, 0.4)[20:]])),
        Part(ellipse(0.42, -0.3, 0.38, 0.38)),
        *eye(0.5, -0.36, 0.15),
    ]


def fish() -> list[Part]:
    return [
        Part(polygon(0.35, 0.0, 1.0, -0.55, 0.86, 0.0, 1.0, 0.55), "limb"),
        Part(ellipse(-0.22, 0.0, 0.78, 0.52)),
        *eye(-0.62, -0.1, 0.15),
    ]


def nouns() -> dict[str, list[Part]]:
    """Every noun that a caption can use, with its silhouette."""
    cone = polygon(0.0, -0.95, 0.85, 0.75, -0.85, 0.75)
    cross = np.array(
        [
            (0.33, -1),
            (0.33, -0.33),
            (1, -0.33),
            (1, 0.33),
            (0.33, 0.33),
            (0.33, 1),
            (-0.33, 1),
            (-0.33, 0.33),
            (-1, 0.33),
            (-1, -0.33),
            (-0.33, -0.33),
            (-0.33, -1),
        ]
    )
    house = polygon(0, -0.95, 0.9, -0.2, 0.68, -0.2, 0.68, 0.8, -0.68, 0.8, -0.68, -0.2, -0.9, -0.2)
    cup = polygon(-0.78, -0.75, 0.5, -0.75, 0.38, 0.8, -0.66, 0.8)
    return {
        "ball": [Part(ellipse(0, 0, 0.9, 0.9, 64))],
        "box": [Part(rectangle(-0.78, -0.78, 0.78, 0.78))],
        "star": [Part(star(5, 0.45))],
        "heart": [Part(heart())],
        "ring": [Part(ellipse(0, 0, 1.0, 1.0, 64)), Part(ellipse(0, 0, 0.44, 0.44), "hole")],
        "cone": [Part(cone)],
        "cross": [Part(cross * 0.92)],
        "moon": [Part(crescent())],
        "flower": [Part(flower()), Part(ellipse(0, 0, 0.28, 0.28), "limb")],
        "cup": [Part(ellipse(0.5, 0.0, 0.46, 0.44)), Part(ellipse(0.5, 0.0, 0.2, 0.2), "hole"), Part(cup)],
        "house": [Part(house), Part(rectangle(-0.2, 0.25, 0.2, 0.8), "limb")],
        "fish": fish(),
        "bird": bird(),
        "cat": Creature("round", "pointy", legs=2).parts(),
        "bunny": Creature("round", "long", legs=2).parts(),
    }


NOUNS = nouns()
ANIMALS = ("fish", "bird", "cat", "bunny")
