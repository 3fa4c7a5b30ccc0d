"""Curves as SVG, small enough to be read as text."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 220, 52, 18, 12, 34  # of a chart and its margins


def short(value: float, digits: int = 3) -> str:
    """A number for people: 0.1103, 5e-5, 3,000."""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
    return re.sub(r"e([+-])0*", r"e\1", text).replace("e+", "e")


def ticks(low: float, high: float, log: bool = False, most: int = 7) -> list[tuple[float, str]]:
    """Some `most` round numbers between low and high, with labels; `log`: between their powers of ten."""
    if log:
        numbers = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
        numbers = [v for v in numbers if low <= math.log10(v) <= high]
        keep = numbers if len(numbers) <= most else [v for v in numbers if f"{v:e}".startswith("1.")]
        return [(math.log10(v), short(v)) for v in keep]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= (high - low) / most)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    numbers = [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return [(v, f"{v:,.{decimals}f}" if decimals < 4 else short(v)) for v in numbers]


def chart(
    title: str,
    series: tuple[np.ndarray, np.ndarray],
    note: str = "",
    *,
    dots: bool = False,
    log: bool = False,
    include: Sequence[float] = (),
    best: int | None = None,
) -> str:
    """A curve over steps as SVG.

    Args:
        dots: values scatter: show each as a dot, and their running median as the curve.
        log: use a logarithmic scale where values span more than a factor of 30.
        include: values that the axis must reach; the first is drawn as a dashed line unless it is 0.
        best: step to mark as the best.
    """
    steps, values = series
    n = len(steps)
    if not n:
        return ""
    log = log and bool(0 < 30 * values.min() < values.max())
    scale = np.log10 if log else np.asarray
    inside = scale([v for v in (*values, *include) if v > 0 or not log])
    low, high = float(inside.min()), float(inside.max())
    margin = max(0.06 * (high - low), 0.002 * abs(high), 1e-9)
    low, high = low - margin * (0 if low == 0 else 3 if best is not None else 1), high + margin
    end = max(float(steps[-1]), 1.0)

    def points(x: np.ndarray, y: np.ndarray, count: int) -> list[str]:
        keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), count)).round().astype(int))
        px = LEFT + x[keep] / end * (WIDTH - LEFT - RIGHT)
        py = HEIGHT - BOTTOM - (scale(y[keep]) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return [f"{a:.1f} {b:.1f}" for a, b in zip(px, py, strict=True)]

    svg = []
    for v, label in ticks(low, high, log):
        y = HEIGHT - BOTTOM - (v - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        svg.append(f'<path class=rule d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        svg.append(f"<text x={LEFT - 7} y={y + 4:.1f} text-anchor=end>{label}</text>")
    for v, label in ticks(0, end, most=5):
        if v == int(v):
            x = LEFT + v / end * (WIDTH - LEFT - RIGHT)
            svg.append(f"<text x={x:.1f} y={HEIGHT - BOTTOM + 17} text-anchor=middle>{label}</text>")
    svg.append(f"<text x={(LEFT + WIDTH - RIGHT) / 2} y={HEIGHT - 2} text-anchor=middle>step</text>")
    if include and include[0]:
        y = points(np.zeros(1), np.array(include[:1]), 1)[0].split()[1]
        svg.append(f'<path class=level d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
    if dots and n > 40:
        half = max(3, n // 30)
        centres = np.unique(np.linspace(0, n - 1, min(n, 300)).round().astype(int))
        medians = np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in centres])
        svg.append(f'<path class=dots d="M{"h0M".join(points(steps, values, 1500))}h0"/>')
        svg.append(f'<path class=line d="M{"L".join(points(steps[centres], medians, 300))}"/>')
        note = f"Dots: single steps; line: median of {2 * half + 1} steps. {note}"
    else:
        svg.append(f'<path class=line d="M{"L".join(points(steps, values, 400))}"/>')
        if n <= 40:
            svg.append(f'<path class=points d="M{"h0M".join(points(steps, values, 40))}h0"/>')
    if best is not None:
        x, y = points(steps[steps == best][:1], values[steps == best][:1], 1)[0].split()
        anchor = "start" if float(x) < 140 else "end" if float(x) > WIDTH - 100 else "middle"
        svg.append(f"<circle class=best cx={x} cy={y} r=6 />")
        place = f"x={x} y={float(y) + 21:.1f} text-anchor={anchor}"
        svg.append(f"<text class=bestword {place}>best: step {best:,}</text>")
    first, last = (f"{short(float(values[i]), 4)} at step {steps[i]:.0f}" for i in (0, -1))
    label = f"{title}: {first}, {last}"
    return (
        f"<figure><figcaption><b>{title}</b> {note}{' Logarithmic scale.' * log}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{label}">{"".join(svg)}</svg></figure>'
    )


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 460, 62, 24, 16, 46
LETTER, LINE = 6.6, 14  # rough size of the letters of a label, in pixels

# Colours that remain distinct with colour-blind eyes and on dark paper (Okabe and Ito 2008).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
STYLE = """
.scatter { font: 12px system-ui, "Segoe UI", Roboto, Arial, sans-serif; --ink: #1d2327; --rule: #dde1e4;
  background: #fff; }
.scatter text { fill: var(--ink); } .scatter .rule { stroke: var(--rule); }
.scatter .join { fill: none; stroke-width: 1.5; stroke-opacity: .5; } .scatter .bar { stroke-opacity: .45; }
@media (prefers-color-scheme: dark) { .scatter { --ink: #e4e7e9; --rule: #343a3f; background: #16191c; } }
"""

Interval = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Point:
    """A point, and the intervals that its error bars span.

    Points of one series have one colour; those of a `joined` series are connected in the order given.
    """

    x: float
    y: float
    label: str = ""
    series: str = ""
    joined: bool = False
    x_interval: Interval | None = None
    y_interval: Interval | None = None


def scatter(title: str, x_label: str, y_label: str, points: Sequence[Point]) -> str:
    """Points on a plane; "" if there are none."""
    if not points:
        return ""
    (x_low, x_high), (y_low, y_high) = (
        _range([v for p in points for v in (getattr(p, axis), *(getattr(p, f"{axis}_interval") or ()))])
        for axis in "xy"
    )

    def px(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    svg = [f"<style>{STYLE}</style>"]
    for v, label in ticks(y_low, y_high):
        svg.append(f'<path class="rule" d="M{LEFT} {py(v):.1f}H{WIDTH - RIGHT}"/>')
        svg.append(f'<text x="{LEFT - 7}" y="{py(v) + 4:.1f}" text-anchor="end">{label}</text>')
    for v, label in ticks(x_low, x_high):
        svg.append(f'<path class="rule" d="M{px(v):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        svg.append(f'<text x="{px(v):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{label}</text>')
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    svg.append(f'<text x="{middle_x}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    turned = f'transform="translate(14 {middle_y}) rotate(-90)" text-anchor="middle"'
    svg.append(f"<text {turned}>{escape(y_label)}</text>")

    series = list(dict.fromkeys(point.series for point in points))
    color = {name: COLORS[i % len(COLORS)] for i, name in enumerate(series)}
    for name in series:
        line = [f"{px(p.x):.1f} {py(p.y):.1f}" for p in points if p.series == name and p.joined]
        if len(line) > 1:
            svg.append(f'<path class="join" stroke="{color[name]}" d="M{"L".join(line)}"/>')
    taken = [(px(p.x) - 6, py(p.y) - 6, px(p.x) + 6, py(p.y) + 6) for p in points]
    for p in points:
        stroke = f'class="bar" stroke="{color[p.series]}"'
        if p.x_interval:
            low, high = map(px, p.x_interval)
            svg.append(f'<path {stroke} d="M{low:.1f} {py(p.y):.1f}H{high:.1f}"/>')
            taken.append((low, py(p.y) - 2, high, py(p.y) + 2))
        if p.y_interval:
            low, high = map(py, p.y_interval)
            svg.append(f'<path {stroke} d="M{px(p.x):.1f} {low:.1f}V{high:.1f}"/>')
            taken.append((px(p.x) - 2, high, px(p.x) + 2, low))
    for p in points:
        hint = f"<title>{escape(p.label)}: {p.x:.4f}, {p.y:.4f}</title>"
        place = f'cx="{px(p.x):.1f}" cy="{py(p.y):.1f}"'
        svg.append(f'<circle {place} r="5" fill="{color[p.series]}">{hint}</circle>')
    for p in points:
        x, y, anchor = _place(px(p.x), py(p.y), p.label, taken)
        svg.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(p.label)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="scatter" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(svg)}</svg>\n'
    )


def _range(values: Sequence[float]) -> Interval:
    low, high = min(values), max(values)
    margin = max(0.08 * (high - low), 1e-3)
    return low - margin, high + margin


def _place(x: float, y: float, label: str, taken: list[Box]) -> tuple[float, float, str]:
    """Where a label goes, (x, y, text-anchor): beside its point, where it covers least of what is taken."""
    width, best = LETTER * len(label), None
    for dx, dy, anchor in (
        *((8, -7, "start"), (8, 16, "start"), (-8, -7, "end"), (-8, 16, "end")),
        *((10, 4, "start"), (-10, 4, "end"), (0, -10, "middle"), (0, 19, "middle")),
    ):
        left = x + dx - {"start": 0, "end": width, "middle": width / 2}[anchor]
        box = (left, y + dy - LINE + 3, left + width, y + dy + 3)
        outside = max(0, LEFT - box[0]) + max(0, box[2] - WIDTH)
        outside += max(0, TOP - box[1]) + max(0, box[3] - HEIGHT + BOTTOM)
        cost = 100 * outside + sum(_overlap(box, other) for other in taken)
        if best is None or cost < best[0]:
            best = (cost, box, (x + dx, y + dy, anchor))
    taken.append(best[1])
    return best[2]


def _overlap(a: Box, b: Box) -> float:
    """Area that two boxes share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
