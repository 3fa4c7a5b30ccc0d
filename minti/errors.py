"""The one error that a user is shown: one line that says what is wrong, where, and the remedy."""

from math import inf
from numbers import Integral, Real

LONGEST = 1500  # characters of a message


class InputError(ValueError):
    """Something the user gave cannot be used. One line says what is wrong, where, and the remedy."""

    def __str__(self) -> str:
        """The message as one line, whatever values it quotes; the middle of a very long one is left out."""
        text = " ".join(super().__str__().split())
        return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def check_number(name: str, value: object, kind: type[int | float], low: float, high: float = inf) -> None:
    """Raise InputError unless a value is a number from `low` to `high`, an integer where `kind` is int."""
    is_number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if not (is_number and low <= value <= high and value != inf):
        what = "an integer" if kind is int else "a number"
        limits = f"of at least {low}" if high == inf else f"from {low} to {high}"
        raise InputError(f"{name} = {value!r}: should be {what} {limits}")
