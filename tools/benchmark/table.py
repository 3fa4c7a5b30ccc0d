"""What has been measured: one row for each contender, as markdown and as JSON."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .jobs import PEER, Job, median


@dataclass
class Row:
    part: str
    what: str
    contender: str
    unit: str
    values: list[float]
    median: float
    minimum: float
    model: str = ""
    dtype: str = ""
    batch_size: int = 0
    size: int = 0
    steps: int | None = None
    first: float | None = None  # the very first time, with all compiling and warming up
    peer: str = PEER  # whom the others are compared with
    peer_ratio: float | None = None  # the peer's median over this one's
    floor: float | None = None  # the least it can be
    floor_ratio: float | None = None  # this median over the floor
    growth: float | None = None  # this median over that of the first value on the same axis


def rows(
    part: str,
    job: Job,
    found: Mapping[str, Mapping[str, list[float]]],
    *,
    unit: str = "s",
    label: str = "",
    peer: str = PEER,
    first: Mapping[str, Mapping[str, float]] | None = None,
    floors: Mapping[str, float] | None = None,
) -> list[Row]:
    """A row for each (what, contender) of `jobs.take_turns`.

    Args:
        label: added to what.
        first: duration of the very first time, by what and by whom.
        floors: the least possible value, by what.
    """
    made = []
    for what, by_name in found.items():
        theirs, floor = by_name.get(peer), (floors or {}).get(what)
        for name, values in by_name.items():
            middle = median(values)
            made.append(
                Row(
                    part=part,
                    what=what + label,
                    contender=name,
                    unit=unit,
                    values=values,
                    median=middle,
                    minimum=min(values),
                    model=job.model,
                    dtype=job.dtype,
                    batch_size=job.batch_size,
                    size=job.size,
                    steps=job.steps if what == "picture" else None,
                    first=(first or {}).get(what, {}).get(name),
                    peer=peer,
                    peer_ratio=median(theirs) / middle if theirs and name != peer else None,
                    floor=floor,
                    floor_ratio=middle / floor if floor else None,
                )
            )
    return made


def add_growth(scaled: Iterable[Row]) -> None:
    """Compare rows that differ in one value with the first of them, contender by contender."""
    base: dict[tuple[str, str], float] = {}
    for row in scaled:
        key = (row.what.partition(",")[0], row.contender)
        row.growth = row.median / base.setdefault(key, row.median)


COLUMNS = {
    "what": "what",
    "model": "model",
    "size": "px",
    "batch_size": "batch",
    "steps": "steps",
    "dtype": "dtype",
    "contender": "contender",
    "median": "median",
    "minimum": "min",
    "first": "first time",
    "peer_ratio": "{peer} / this",
    "floor_ratio": "this / floor",
    "growth": "this / first row",
}


def to_markdown(table: Sequence[Row]) -> str:
    """A markdown table; columns that no row has anything for are left out."""
    keys = [key for key in COLUMNS if any(getattr(row, key) not in (None, "", 0) for row in table)]
    lines = [[COLUMNS[key].format(peer=table[0].peer) for key in keys], ["---"] * len(keys)]
    lines += [[_cell(row, key) for key in keys] for row in table]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: Row, key: str) -> str:
    value = getattr(row, key)
    if value is None:
        return ""
    if key in ("median", "minimum", "first"):
        return f"{value:#.3g} {row.unit}"
    return f"{value:.2f} x" if isinstance(value, float) else str(value)
