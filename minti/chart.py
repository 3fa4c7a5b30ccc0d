"""Curves as SVG, small enough to be read as text."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

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
