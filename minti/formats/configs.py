"""Reading the JSON files that lie beside the weights."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import InputError


def read_json(path: Path) -> dict:
    """A JSON object from a file; InputError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); is the folder complete?") from None
    except ValueError as error:
        raise InputError(f"{path}: is not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: should hold a JSON object; download it again")
    return value
