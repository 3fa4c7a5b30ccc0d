"""The ten colours of the tiny world, its patterns, and which colours look unlike."""

import numpy as np

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
