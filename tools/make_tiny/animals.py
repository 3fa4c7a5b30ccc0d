"""Animals put together from parts: creatures, birds, fish and insects, each drawn from its factors.

A drawing function takes the factors of a thing (see `kinds.py`) and returns its parts, painted in this order.
Sizes are in units in which a thing is about two wide; `kinds.build` fits the result into the unit circle.
"""

from .shapes import Creature, Part, Points, ellipse, eye, polygon, rectangle, superellipse, turned

Factors = dict[str, str | int | float]


def _mirrored(points: Points) -> list[Points]:
    return [points, points * (-1, 1)]


def creature(f: Factors) -> list[Part]:
    """A toy animal seen from the front."""
    rx, ry = f["width"], f["height"]
    body = superellipse(0.0, rx, ry, f["power"])
    body[:, 0] *= 1 + f["taper"] * body[:, 1] / ry
    top_rx, low_rx = rx * (1 - 0.7 * f["taper"]), rx * (1 + 0.6 * f["taper"])
    limbs: list[Points] = []
    if f["wings"] == "round":
        limbs += _mirrored(turned(ellipse(0.34, 0, 0.4, 0.26), -35, rx * 0.8, -0.1))
    elif f["wings"] == "bat":
        wing = polygon(0, -0.1, 0.5, -0.6, 0.56, -0.05, 0.36, -0.1, 0.26, 0.2, 0.12, 0.1, 0, 0.3)
        limbs += _mirrored(turned(wing, 0, rx * 0.8))
    if f["tail"] == "curl":
        limbs.append(turned(ellipse(0.3, 0, 0.34, 0.12), -40, low_rx * 0.8, 0.6 * ry))
    elif f["tail"] == "spike":
        limbs.append(polygon(0.3 * rx, 0.35 * ry, low_rx + 0.55, 0.75 * ry, 0.3 * rx, 0.9 * ry))
    for points in Creature(ears=f["ears"])._ears(top_rx, -ry):
        limbs.append((points - (0, -ry)) * f["ear size"] + (0, -ry))
    for k in range(f["legs"]):
        x = low_rx * 0.6 * (2 * k / (f["legs"] - 1) - 1)
        limbs.append(rectangle(x - 0.12, 0.4 * ry, x + 0.12, ry + f["leg length"]))
    if f["arms"] == "short":
        limbs += _mirrored(ellipse(rx + 0.06, 0.05, 0.24, 0.13))
    elif f["arms"] == "long":
        limbs += _mirrored(turned(rectangle(-0.1, 0, 0.1, 0.75), 28, 0.85 * rx, -0.05))
    elif f["arms"] == "raised":
        limbs += _mirrored(turned(rectangle(-0.1, -0.7, 0.1, 0), 35, 0.8 * rx, 0.1))
    parts = [Part(p, "limb") for p in limbs] + [Part(body)]
    parts += eyes(f["eyes"], 0.36 * top_rx, -0.25 * ry)
    if f["mouth"] == "open":
        parts.append(Part(ellipse(0, 0.32 * ry, 0.3 * rx, 0.13), "dark"))
    return parts


def eyes(count: int, x: float, y: float) -> list[Part]:
    """None, a large one, two, or three in a row."""
    if count == 1:
        return eye(0.0, y, 0.24)
    if count == 2:
        return eye(-x, y) + eye(x, y)
    return [part for k in range(count) for part in eye(1.5 * x * (k - 1), y - 0.12 * (k == 1), 0.15)]


def bird(f: Factors) -> list[Part]:
    """A bird seen from the side, looking to the right."""
    rx, ry, r = f["width"], f["height"], f["head"]
    x, y = 0.75 * rx, -0.45 * ry - f["neck"]
    limbs = {
        "fan": [polygon(-0.5 * rx, 0, -rx - 0.5, -0.45, -rx - 0.55, 0.25)],
        "forked": [polygon(-0.5 * rx, 0, -rx - 0.6, -0.4, -rx - 0.2, -0.05, -rx - 0.6, 0.3)],
        "long": [polygon(-0.5 * rx, -0.1, -rx - 0.9, 0.35, -rx - 0.8, 0.5, -0.5 * rx, 0.3)],
    }[f["tail"]]
    limbs += {
        "short": [polygon(x, y - 0.16, x + r + 0.3, y + 0.06, x, y + 0.2)],
        "long": [polygon(x, y - 0.1, x + r + 0.7, y + 0.12, x, y + 0.16)],
        "flat": [rectangle(x, y, x + r + 0.4, y + 0.2)],
    }[f["beak"]]
    if f["crest"] == "tuft":
        limbs.append(polygon(x - 0.2, y - 0.5 * r, x - 0.25, y - r - 0.45, x + 0.12, y - 0.5 * r))
    elif f["crest"] == "crown":
        limbs += [polygon(x + d - 0.1, y - 0.6 * r, x + d, y - r - 0.3, x + d + 0.1, y - 0.6 * r)
                  for d in (-0.18, 0.0, 0.18)]  # fmt: skip
    limbs += [rectangle(d - 0.06, 0.5 * ry, d + 0.06, ry + f["leg length"]) for d in (-0.15, 0.15)]
    parts = [Part(p, "limb") for p in limbs] + [Part(ellipse(0, 0, rx, ry))]
    parts.append(Part(polygon(0.2 * rx, 0, 0.9 * rx, 0.2 * ry, x + 0.8 * r, y, x - 0.8 * r, y)))
    parts.append(Part(ellipse(x, y, r, r)))
    if f["wings"] == "up":
        parts.append(Part(polygon(-0.4 * rx, 0, -0.5 * rx, -ry - 0.6, 0.35 * rx, 0.05), "limb"))
    elif f["wings"] == "folded":
        parts.append(Part(ellipse(-0.15 * rx, 0.05, 0.5 * rx, 0.4 * ry), "limb"))
    return parts + eye(x + 0.25 * r, y - 0.1 * r, 0.13)


def fish(f: Factors) -> list[Part]:
    """A fish seen from the side, looking to the left."""
    rx, ry = f["width"], f["height"]
    limbs = {
        "forked": [polygon(0.5 * rx, 0, rx + 0.5, -0.55, rx + 0.3, 0, rx + 0.5, 0.55)],
        "round": [ellipse(rx + 0.15, 0, 0.34, 0.4)],
        "pointed": [polygon(0.4 * rx, -0.3 * ry, rx + 0.7, 0, 0.4 * rx, 0.3 * ry)],
    }[f["tail"]]
    if f["fin"] == "sharp":
        limbs.append(polygon(-0.4 * rx, -0.6 * ry, 0.25 * rx, -ry - 0.5, 0.4 * rx, -0.6 * ry))
    elif f["fin"] == "sail":
        limbs.append(polygon(-0.7 * rx, 0, -0.6 * rx, -ry - 0.4, 0.6 * rx, -ry - 0.2, 0.7 * rx, 0))
    if f["belly"] == "fins":
        limbs += [polygon(d * rx, 0.5 * ry, d * rx + 0.3, ry + 0.35, d * rx + 0.35, 0.5 * ry)
                  for d in (-0.55, 0.05)]  # fmt: skip
    elif f["belly"] == "legs":
        limbs += [rectangle(d * rx - 0.07, 0.3 * ry, d * rx + 0.07, ry + 0.35) for d in (-0.4, 0.3)]
    if f["snout"] == "sword":
        limbs.append(polygon(-0.8 * rx, -0.12, -rx - 0.75, 0, -0.8 * rx, 0.14))
    elif f["snout"] == "lamp":
        limbs.append(turned(rectangle(-0.05, -0.6, 0.05, 0), -25, -0.6 * rx, -0.6 * ry))
        limbs.append(ellipse(-0.6 * rx - 0.28, -0.6 * ry - 0.6, 0.16, 0.16))
    body = superellipse(0.0, rx, ry, f["power"])
    return [*(Part(p, "limb") for p in limbs), Part(body), *eye(-0.55 * rx, -0.2 * ry, 0.16)]


def insect(f: Factors) -> list[Part]:
    """An insect seen from above, its head at the top."""
    length, thick = f["length"], f["thickness"]
    limbs: list[Points] = []
    if f["feelers"] == "straight":
        limbs += _mirrored(polygon(0, -length, 0.36, -length - 0.6, 0.24, -length - 0.6, -0.05, -length))
    elif f["feelers"] == "knobs":
        limbs += _mirrored(polygon(0, -length, 0.3, -length - 0.4, 0.2, -length - 0.4, -0.05, -length))
        limbs += _mirrored(ellipse(0.27, -length - 0.4, 0.12, 0.12))
    for k in range(f["legs"] // 2):
        y = length * (0.5 * k - 0.45)
        limbs += _mirrored(turned(rectangle(0, -0.05, thick + 0.5, 0.05), 18 * k - 14, 0, y))
    wings: list[Points] = []
    for k in range(f["wing pairs"]):
        rx, ry = f["wing length"] * (1 - 0.15 * k), f["wing width"] * (1 - 0.15 * k)
        wing = turned(superellipse(0.0, rx, ry, 2.0 if f["wings"] == "round" else 1.1), 0, rx)
        angle = f["spread"] - 5 if k else 25 - f["spread"]
        wings += _mirrored(turned(wing, angle, 0.5 * thick, (-0.3, 0.15)[k]))
    parts = [Part(p, "limb") for p in limbs] + [Part(w) for w in wings]
    role = "limb" if wings else "body"
    parts += [
        Part(ellipse(0, 0.1, thick, length), role),
        Part(ellipse(0, -length, f["head"], f["head"]), role),
    ]
    if f["tail"] == "sting":
        parts.append(Part(polygon(-0.12, length, 0.12, length, 0, length + 0.5), "dark"))
    return parts
