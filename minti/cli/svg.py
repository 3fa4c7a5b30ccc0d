"""Curves and scatter plots as SVG, small enough to be read as text."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

LETTER, LINE = 6.6, 14  # rough size of the letters of a label, in pixels

# Colours that remain distinct with colour-blind eyes and on dark paper (Okabe and Ito 2008).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
STYLE = Path(__file__).with_name("scatter.css").read_text(encoding="utf-8")

Interval = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Frame:
    """The area of a plot: its size and margins in pixels, and the numbers that they stand for."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    x_range: Interval
    y_range: Interval

    def px(self, x: float) -> float:
        """From the left edge, in pixels; also of an array."""
        low, high = self.x_range
        return self.left + (x - low) / (high - low) * (self.width - self.left - self.right)

    def py(self, y: float) -> float:
        """From the top edge, in pixels; also of an array."""
        low, high = self.y_range
        return self.height - self.bottom - (y - low) / (high - low) * (self.height - self.top - self.bottom)

    def axes(self, x_label: str, *, log: bool = False, vertical: bool = True) -> list[str]:
        """Lines and numbers at round values, and what x is; `vertical`: with lines upwards as well."""
        end, floor, svg = self.width - self.right, self.height - self.bottom, []
        for v, label in ticks(*self.y_range, log):
            svg.append(f'<path class="rule" d="M{self.left} {self.py(v):.1f}H{end}"/>')
            svg.append(f'<text x="{self.left - 7}" y="{self.py(v) + 4:.1f}" text-anchor="end">{label}</text>')
        for v, label in ticks(*self.x_range, most=7 if vertical else 5):
            if vertical:
                svg.append(f'<path class="rule" d="M{self.px(v):.1f} {self.top}V{floor}"/>')
            if vertical or v == int(v):
                svg.append(f'<text x="{self.px(v):.1f}" y="{floor + 17}" text-anchor="middle">{label}</text>')
        middle, y = (self.left + end) / 2, self.height - (8 if vertical else 2)
        svg.append(f'<text x="{middle}" y="{y}" text-anchor="middle">{_text(x_label)}</text>')
        return svg


def _text(text: str) -> str:
    """Text in XML, which has no place for control characters."""
    return escape(
        re.sub(
            r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]",
            "\N{REPLACEMENT CHARACTER}",
            text,
        )
    )


def short(value: float, digits: int = 3) -> str:
    """A number with few digits: 0.1103, 5e-5, 3,000."""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
    return re.sub(r"e([+-])0*", r"e\1", text).replace("e+", "e")


def ticks(low: float, high: float, log: bool = False, most: int = 7) -> list[tuple[float, str]]:
    """At most about `most` round numbers between low and high, with labels; `log`: low and high are log10."""
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
    """A curve over steps as a figure of HTML; "" if there are no values.

    Args:
        series: steps and values, (N,) each.
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
    scale: Callable = np.log10 if log else np.asarray
    inside = scale([v for v in (*values, *include) if v > 0 or not log])
    low, high = float(inside.min()), float(inside.max())
    margin = max(0.06 * (high - low), 0.002 * abs(high), 1e-9)
    below = 0 if low == 0 else margin if best is None else 3 * margin  # room for the mark
    frame = Frame(400, 220, 52, 18, 12, 34, (0.0, max(float(steps[-1]), 1.0)), (low - below, high + margin))

    def points(x: np.ndarray, y: np.ndarray, count: int) -> list[str]:
        keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), count)).round().astype(int))
        pairs = zip(frame.px(x[keep]), frame.py(scale(y[keep])), strict=True)
        return [f"{a:.1f} {b:.1f}" for a, b in pairs]

    svg = frame.axes("step", log=log, vertical=False)
    if include and include[0]:
        y = frame.py(float(scale(include[0])))
        svg.append(f'<path class="level" d="M{frame.left} {y:.1f}H{frame.width - frame.right}"/>')
    if dots and n > 40:
        half = max(3, n // 30)
        centres = np.unique(np.linspace(0, n - 1, min(n, 300)).round().astype(int))
        medians = np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in centres])
        svg.append(f'<path class="dots" d="M{"h0M".join(points(steps, values, 1500))}h0"/>')
        svg.append(f'<path class="line" d="M{"L".join(points(steps[centres], medians, 300))}"/>')
        note = f"Dots: single steps; line: median of {2 * half + 1} steps. {note}"
    else:
        svg.append(f'<path class="line" d="M{"L".join(points(steps, values, 400))}"/>')
        if n <= 40:
            svg.append(f'<path class="points" d="M{"h0M".join(points(steps, values, 40))}h0"/>')
    if best is not None:
        x, y = frame.px(best), frame.py(float(scale(values[steps == best][0])))
        anchor = "start" if x < 140 else "end" if x > frame.width - 100 else "middle"
        svg.append(f'<circle class="best" cx="{x:.1f}" cy="{y:.1f}" r="6"/>')
        place = f'x="{x:.1f}" y="{y + 21:.1f}" text-anchor="{anchor}"'
        svg.append(f'<text class="bestword" {place}>best: step {best:,}</text>')
    first, last = (f"{short(float(values[i]), 4)} at step {steps[i]:.0f}" for i in (0, -1))
    scale_note = " Logarithmic scale." if log else ""
    return (
        f"<figure><figcaption><b>{title}</b> {note}{scale_note}</figcaption>"
        f'<svg viewBox="0 0 {frame.width} {frame.height}" role=img aria-label="{title}: {first}, {last}">'
        f"{''.join(svg)}</svg></figure>"
    )


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
    ranges = (
        _range([v for p in points for v in (getattr(p, axis), *(getattr(p, f"{axis}_interval") or ()))])
        for axis in "xy"
    )
    frame = Frame(640, 460, 62, 24, 16, 46, *ranges)
    px, py = frame.px, frame.py
    middle = (frame.top + frame.height - frame.bottom) / 2
    turned = f'transform="translate(14 {middle}) rotate(-90)" text-anchor="middle"'
    svg = [f"<style>{STYLE}</style>", *frame.axes(x_label), f"<text {turned}>{_text(y_label)}</text>"]
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
        hint = f"<title>{_text(p.label)}: {p.x:.4f}, {p.y:.4f}</title>"
        place = f'cx="{px(p.x):.1f}" cy="{py(p.y):.1f}"'
        svg.append(f'<circle {place} r="5" fill="{color[p.series]}">{hint}</circle>')
    for p in points:
        x, y, anchor = _place(frame, p, taken)
        svg.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_text(p.label)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="scatter" role="img" aria-label="{_text(title)}" '
        f'viewBox="0 0 {frame.width} {frame.height}">{"".join(svg)}</svg>\n'
    )


def _range(values: Sequence[float]) -> Interval:
    low, high = min(values), max(values)
    margin = max(0.08 * (high - low), 1e-3)
    return low - margin, high + margin


def _place(frame: Frame, point: Point, taken: list[Box]) -> tuple[float, float, str]:
    """Where a label goes, (x, y, text-anchor): beside its point, where it covers least of what is taken."""
    x, y, width, best = frame.px(point.x), frame.py(point.y), LETTER * len(point.label), None
    for dx, dy, anchor in (
        *((8, -7, "start"), (8, 16, "start"), (-8, -7, "end"), (-8, 16, "end")),
        *((10, 4, "start"), (-10, 4, "end"), (0, -10, "middle"), (0, 19, "middle")),
    ):
        left = x + dx - {"start": 0, "end": width, "middle": width / 2}[anchor]
        box = (left, y + dy - LINE + 3, left + width, y + dy + 3)
        outside = max(0, frame.left - box[0]) + max(0, box[2] - frame.width)
        outside += max(0, frame.top - box[1]) + max(0, box[3] - frame.height + frame.bottom)
        cost = 100 * outside + sum(_overlap(box, other) for other in taken)
        if best is None or cost < best[0]:
            best = (cost, box, (x + dx, y + dy, anchor))
    taken.append(best[1])
    return best[2]


def _overlap(a: Box, b: Box) -> float:
    """Area that two boxes share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
