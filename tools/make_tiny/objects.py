"""Things put together from parts: vehicles, plants, vessels, machines, buildings, tools, badges.

As in `animals.py`, a drawing function takes the factors of a thing and returns its parts.
"""

import numpy as np

from .animals import Factors, eyes
from .shapes import Part, Points, ellipse, eye, polygon, rectangle, star, superellipse, turned


def dome(x: float, y: float, rx: float, ry: float) -> Points:
    """The upper half of an ellipse."""
    a = np.linspace(np.pi, 2 * np.pi, 30)
    return np.stack([x + rx * np.cos(a), y + ry * np.sin(a)], 1)


def _limbs(*points: Points) -> list[Part]:
    return [Part(p, "limb") for p in points]


def craft(f: Factors) -> list[Part]:
    """A ship for the air or for space, upright."""
    w, h = f["width"], f["height"]
    side = np.linspace(0, 1, 16)
    width = w * {"round": np.sqrt(1 - (1 - side) ** 2), "sharp": side, "flat": 0.8 + 0.2 * side}[f["nose"]]
    y = -h + f["nose length"] * side
    hull = np.concatenate([np.stack([width, y], 1), [(w, h), (-w, h)], np.stack([-width, y], 1)[::-1]])
    s = f["sweep"]
    fins = {
        "none": [],
        "two": [polygon(d * w, h - 0.7, d * (w + 0.4), h + s, d * w, h - 0.1) for d in (-1, 1)],
        "wings": [polygon(d * w, -0.3, d * (w + 0.6), 0.1 + s, d * (w + 0.6), 0.3 + s, d * w, 0.3)
                  for d in (-1, 1)],
        "rings": [ellipse(d * (w + 0.1), h - 0.3, 0.2, 0.3) for d in (-1, 1)],
    }[f["fins"]]  # fmt: skip
    engine = {
        "none": [],
        "box": [rectangle(-0.55 * w, h - 0.1, 0.55 * w, h + 0.3)],
        "bell": [polygon(-0.3 * w, h - 0.1, 0.3 * w, h - 0.1, 0.9 * w, h + 0.4, -0.9 * w, h + 0.4)],
        "flame": [polygon(-0.7 * w, h - 0.1, 0.7 * w, h - 0.1, 0, h + 0.7)],
    }[f["engine"]]
    windows = [Part(ellipse(0, -0.3 * h + 0.5 * k, 0.42 * w, 0.42 * w), "dark") for k in range(f["windows"])]
    return [*_limbs(*fins, *engine), Part(hull), *windows]


def car(f: Factors) -> list[Part]:
    """A car, bus or truck seen from the side."""
    h, r = f["height"], f["wheel size"]
    parts = []
    if f["roof"] == "flag":
        parts += _limbs(
            rectangle(-0.7, -h - 0.9, -0.63, -h), polygon(-0.63, -h - 0.9, -0.2, -h - 0.7, -0.63, -h - 0.5)
        )
    elif f["roof"] == "ladder":
        parts += _limbs(turned(rectangle(-0.7, -0.07, 0.7, 0.07), -14, 0, -h - 0.65))
    cabin = {
        "front": polygon(0.15, -h + 0.05, 0.25, -h - 0.5, 0.65, -h - 0.5, 0.9, -h + 0.05),
        "middle": polygon(-0.55, -h + 0.05, -0.35, -h - 0.5, 0.3, -h - 0.5, 0.55, -h + 0.05),
        "long": rectangle(-0.95, -h - 0.5, 0.7, -h + 0.05),
        "dome": dome(0, -h + 0.05, 0.5, 0.55),
    }[f["cabin"]]
    parts += [Part(cabin), Part(rectangle(-1.0, -h, 1.0, h))]
    if f["window"] == "square":
        x = {"front": 0.48, "middle": 0.0, "long": 0.35, "dome": 0.0}[f["cabin"]]
        parts.append(Part(rectangle(x - 0.2, -h - 0.38, x + 0.2, -h - 0.06), "white"))
    if f["front"] == "plough":
        parts += _limbs(polygon(0.9, -0.5 * h, 1.35, h + 0.1, 0.9, h + 0.1))
    elif f["front"] == "nose":
        parts += _limbs(polygon(0.95, -h, 1.5, 0.2 * h, 0.95, h))
    count = f["wheels"]
    for k in range(count):
        x = 0.68 * (2 * k / (count - 1) - 1)
        parts += [Part(ellipse(x, h, r, r), "limb"), Part(ellipse(x, h, 0.4 * r, 0.4 * r), "dark")]
    return parts


def boat(f: Factors) -> list[Part]:
    """A boat seen from the side."""
    d, w = f["depth"], f["width"]
    parts = []
    top = -f["mast"]
    parts += _limbs(*{
        "none": [],
        "one": [rectangle(-0.06, top, 0.06, 0), polygon(0.1, top, 0.75, -0.12, 0.1, -0.12)],
        "two": [rectangle(-0.06, top, 0.06, 0), polygon(0.1, top, 0.7, -0.12, 0.1, -0.12),
                polygon(-0.1, top, -0.7, -0.12, -0.1, -0.12)],
        "square": [rectangle(-0.06, top, 0.06, 0), rectangle(-0.5, top + 0.1, 0.5, -0.25)],
    }[f["sail"]])  # fmt: skip
    if f["deck"] == "house":
        parts.append(Part(rectangle(-0.75, -0.4, -0.2, 0.1)))
    elif f["deck"] == "funnel":
        parts += _limbs(rectangle(-0.6, -0.65, -0.3, 0.1))
    keel = {"round": 0.55, "boxy": 0.95, "sharp": 0.3}[f["hull"]]
    parts.append(Part(polygon(-w, -0.05, w, -0.05, keel * w, d, -keel * w, d)))
    if f["portholes"]:
        count = f["portholes"]
        parts += [
            Part(ellipse(0.4 * (k - (count - 1) / 2), 0.4 * d, 0.1, 0.1), "white") for k in range(count)
        ]
    if f["flag"] == "stern":
        parts += _limbs(polygon(-w, 0, -w, -0.55, -w + 0.4, -0.4, -w + 0.08, -0.25, -w + 0.08, 0))
    return parts


def plant(f: Factors) -> list[Part]:
    """A stem with something on top."""
    t, s, y = f["stem"], f["size"], -f["height"] / 2
    low = f["height"] / 2
    parts = _limbs(rectangle(-t, y, t, low))
    for k in range(f["leaves"]):
        leaf = turned(ellipse(0.36, 0, 0.36, 0.14), -30, 0.5 * t)
        parts += _limbs(turned(leaf * (1 if k % 2 == 0 else -1, 1), 0, 0, low - 0.12 - 0.22 * (k // 2)))
    if f["pot"] == "pot":
        parts.append(
            Part(polygon(-0.45, low - 0.15, 0.45, low - 0.15, 0.3, low + 0.45, -0.3, low + 0.45), "limb")
        )
    elif f["pot"] == "bulb":
        parts.append(Part(ellipse(0, low, 0.36, 0.28), "limb"))
    n = f["petals"]
    angles = [360 * k / n for k in range(n)]
    parts += {
        "dome": [Part(dome(0, y + 0.3, s, s))],
        "ball": [Part(ellipse(0, y, 0.75 * s, 0.75 * s))],
        "cone": [Part(polygon(0, y - 1.1 * s, 0.8 * s, y + 0.4, -0.8 * s, y + 0.4))],
        "petals": [Part(turned(ellipse(0, -0.55 * s, 0.26 * s, 0.45 * s), a, 0, y)) for a in angles]
        + [Part(ellipse(0, y, 0.28 * s, 0.28 * s), "limb")],
        "tulip": [Part(polygon(-0.6 * s, y - 0.7 * s, -0.25 * s, y - 0.25 * s, 0, y - 0.8 * s, 0.25 * s,
                               y - 0.25 * s, 0.6 * s, y - 0.7 * s, 0.45 * s, y + 0.3, -0.45 * s, y + 0.3))],
        "fan": [Part(turned(ellipse(0, -0.6 * s, 0.16 * s, 0.6 * s), a, 0, y))
                for a in (-70, -35, 0, 35, 70)],
        "star": [Part(turned(star(n, 0.5) * 0.85 * s, 0, 0, y))],
    }[f["top"]]  # fmt: skip
    return parts


def vessel(f: Factors) -> list[Part]:
    """A pot, jug, cup or bottle."""
    w, h = f["width"], f["height"]
    body = superellipse(0.0, w, h, f["power"])
    body[:, 0] *= 1 + f["taper"] * body[:, 1] / h
    top_w = w * (1 - 0.8 * f["taper"])
    parts: list[Part] = []
    if f["handle"] in ("left", "both"):
        for d in (-1, 1) if f["handle"] == "both" else (-1,):
            parts += [
                Part(ellipse(d * 0.95 * w, 0, 0.36, 0.38), "limb"),
                Part(ellipse(d * 0.95 * w, 0, 0.18, 0.2), "hole"),
            ]
    elif f["handle"] == "basket":
        parts += [
            Part(dome(0, -0.5 * h, 0.95 * top_w, 0.5 * h + 0.62), "limb"),
            Part(dome(0, -0.5 * h, 0.72 * top_w, 0.5 * h + 0.4), "hole"),
        ]
    if f["spout"] == "long":
        parts += _limbs(polygon(0.6 * w, 0, w + 0.3, -0.6, w + 0.5, -0.5, 0.8 * w, 0.45))
    elif f["spout"] == "short":
        parts += _limbs(polygon(0.5 * top_w, -0.2, top_w + 0.35, -h, 0.4 * top_w, -h))
    parts += _limbs(*{
        "none": [],
        "legs": [rectangle(d * 0.5 * w - 0.08, 0.5 * h, d * 0.5 * w + 0.08, h + 0.25) for d in (-1, 1)],
        "ring": [rectangle(-0.5 * w, 0.8 * h, 0.5 * w, h + 0.14)],
        "stem": [rectangle(-0.08, 0.8 * h, 0.08, h + 0.45), rectangle(-0.36, h + 0.35, 0.36, h + 0.5)],
    }[f["foot"]])  # fmt: skip
    parts += _limbs(*{
        "none": [],
        "knob": [ellipse(0, -h - 0.06, 0.15, 0.15)],
        "cone": [polygon(0, -h - 0.45, 0.7 * top_w, -h + 0.15, -0.7 * top_w, -h + 0.15)],
        "neck": [rectangle(-0.16, -h - 0.45, 0.16, -h + 0.2), rectangle(-0.26, -h - 0.5, 0.26, -h - 0.35)],
    }[f["lid"]])  # fmt: skip
    return [*parts, Part(body)]


def machine(f: Factors) -> list[Part]:
    """A walking machine seen from the front."""
    w, h, s = f["width"], f["height"], f["head size"]
    y = -h - s + 0.05
    limbs = [rectangle(x - 0.04, y - s - 0.4, x + 0.04, y) for x in ((), (0,), (-0.3, 0.3))[f["antennas"]]]
    limbs += [ellipse(x, y - s - 0.4, 0.12, 0.12) for x in ((), (0,), (-0.3, 0.3))[f["antennas"]]]
    for d in (-1, 1):
        limbs += {
            "none": [],
            "straight": [polygon(d * w, -0.2, d * (w + 0.42), -0.2, d * (w + 0.42), 0.04, d * w, 0.04)],
            "raised": [turned(rectangle(-0.1, -0.65, 0.1, 0), 25 * d, d * w, 0)],
            "hanging": [turned(rectangle(-0.1, 0, 0.1, 0.7), -20 * d, d * w, -0.3)],
        }[f["arms"]]
    limbs += {
        "two": [rectangle(d * 0.5 * w - 0.13, h - 0.1, d * 0.5 * w + 0.13, h + 0.4) for d in (-1, 1)],
        "wheels": [ellipse(d * 0.6 * w, h + 0.08, 0.24, 0.24) for d in (-1, 1)],
        "track": [superellipse(h + 0.15, 1.1 * w, 0.2, 3.0)],
        "spring": [polygon(-0.1, h - 0.1, 0.1, h - 0.1, 0.4, h + 0.5, -0.4, h + 0.5)],
    }[f["legs"]]
    outline = {
        "box": rectangle(-s * 1.3, -s, s * 1.3, s),
        "round": ellipse(0, 0, 1.1 * s, 1.1 * s),
        "dome": dome(0, s, 1.3 * s, 2 * s),
    }[f["head"]]
    head = turned(outline, 0, 0, y)
    body = superellipse(0.0, w, h, f["power"])
    face = (
        eyes(f["eyes"], 0.5 * s, y) if f["eyes"] < 3 else [Part(rectangle(-s, y - 0.1, s, y + 0.1), "dark")]
    )
    return [*_limbs(*limbs), Part(body), Part(head, "limb"), *face]


def building(f: Factors) -> list[Part]:
    """A house, tower or castle seen from the front."""
    w, h = f["width"], f["height"]
    parts = []
    if f["side"] == "towers":
        parts += [Part(rectangle(d * w - 0.2, -0.4 * h, d * w + 0.2, h)) for d in (-1, 1)]
        parts += _limbs(
            *(
                polygon(d * w - 0.28, -0.4 * h, d * w, -0.4 * h - 0.45, d * w + 0.28, -0.4 * h)
                for d in (-1, 1)
            )
        )
    elif f["side"] == "chimney":
        parts += _limbs(rectangle(0.4 * w, -h - 0.7, 0.4 * w + 0.24, -0.5 * h))
    elif f["side"] == "annex":
        parts.append(Part(rectangle(w - 0.1, 0.2 * h, w + 0.5, h)))
    parts += _limbs(*{
        "flat": [rectangle(-w - 0.12, -h - 0.12, w + 0.12, -h + 0.08)],
        "gable": [polygon(-w - 0.15, -h + 0.02, 0, -h - f["roof height"], w + 0.15, -h + 0.02)],
        "dome": [dome(0, -h + 0.02, w, f["roof height"])],
        "battlement": [rectangle((k - 0.14) * w, -h - 0.25, (k + 0.14) * w, -h + 0.1)
                       for k in (-0.86, -0.29, 0.29, 0.86)],
    }[f["roof"]])  # fmt: skip
    parts.append(Part(rectangle(-w, -h, w, h)))
    if f["door"] == "square":
        parts += _limbs(rectangle(-0.17, h - 0.5, 0.17, h))
    elif f["door"] == "arch":
        parts.append(Part(np.concatenate([dome(0, h - 0.35, 0.22, 0.25), [(0.22, h), (-0.22, h)]]), "dark"))
    count = f["windows"]
    for k in range(count):
        x = (k - (count - 1) / 2) * 0.8 * w
        parts.append(Part(rectangle(x - 0.13, -0.6 * h, x + 0.13, -0.6 * h + 0.28), "white"))
    return parts


def tool(f: Factors) -> list[Part]:
    """A handle with a head on top."""
    t, n, s = f["handle"], f["length"], f["size"]
    head = {
        "hammer": [rectangle(-s, -0.22, s, 0.22)],
        "axe": [polygon(0, -0.3, s, -0.5, s, 0.5, 0, 0.3)],
        "spade": [superellipse(-0.2, 0.6 * s, 0.6, 2.6)],
        "fork": [rectangle(-0.6 * s, -0.1, 0.6 * s, 0.1),
                 *(rectangle(x * s - 0.08, -0.6, x * s + 0.08, 0) for x in (-0.5, 0, 0.5))],
        "pick": [polygon(-1.2 * s, 0.25, 0, -0.3, 1.2 * s, 0.25, 0, 0)],
        "comb": [rectangle(-0.1, -0.25, s, 0.02),
                 *(rectangle(x * s, 0, x * s + 0.1, 0.4) for x in (0.2, 0.5, 0.85))],
    }[f["head"]]  # fmt: skip
    parts = _limbs(rectangle(-t, -0.5 * n, t, 0.5 * n))
    parts += _limbs(*{
        "none": [],
        "ball": [ellipse(0, 0.5 * n, 2 * t + 0.06, 2 * t + 0.06)],
        "grip": [rectangle(-0.3, 0.5 * n - 0.1, 0.3, 0.5 * n + 0.08)],
        "spike": [polygon(-t - 0.05, 0.5 * n - 0.1, t + 0.05, 0.5 * n - 0.1, 0, 0.5 * n + 0.4)],
    }[f["end"]])  # fmt: skip
    parts += [Part(turned(p, 0, 0, -0.5 * n)) for p in head]
    if f["band"] == "guard":
        parts += _limbs(rectangle(-0.35, -0.08, 0.35, 0.08))
    return parts


def badge(f: Factors) -> list[Part]:
    """A star, gear or blossom, with something in its middle."""
    n = f["points"]
    a = np.linspace(0, 2 * np.pi, 96, endpoint=False) - np.pi / 2
    wave = {
        "sharp": np.abs(((a + np.pi / 2) * n / (2 * np.pi) % 1) * 2 - 1),
        "round": 0.5 + 0.5 * np.cos(n * (a + np.pi / 2)),
        "gear": (np.cos(n * (a + np.pi / 2)) > 0).astype(float),
    }[f["edge"]]
    r = 1 - f["depth"] * (1 - wave)
    parts = [Part(np.stack([r * np.cos(a), r * np.sin(a) * f["flatness"]], 1))]
    if f["hang"] == "ribbon":
        parts = (
            _limbs(polygon(-0.5, 0.3, -0.1, 0.3, -0.35, 1.5), polygon(0.5, 0.3, 0.1, 0.3, 0.35, 1.5)) + parts
        )
    elif f["hang"] == "stick":
        parts = _limbs(rectangle(-0.09, 0.3, 0.09, 1.7)) + parts
    size = 0.3
    parts += {
        "none": [],
        "hole": [Part(ellipse(0, 0, size, size), "hole")],
        "dot": [Part(ellipse(0, 0, size, size), "limb")],
        "eye": eye(0, 0, 0.28),
    }[f["middle"]]  # fmt: skip
    return parts
