"""The one error that a user is shown: one line that says what is wrong, where, and the remedy."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave cannot be used. One line says what is wrong, where, and the remedy."""
