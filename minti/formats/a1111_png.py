"""Embeddings that AUTOMATIC1111's interface hides in PNG pictures."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..errors import InputError
from .photos import reading_picture


def _is_png(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(8) == b"\x89PNG\r\n\x1a\n"
    except OSError:
        return False  # whoever reads it next complains


def _read_png(path: Path) -> Any:
    """The dictionary in the text of a picture, base64 of JSON."""
    with reading_picture(path), Image.open(path, formats=["PNG"]) as image:
        image.load()
        text = image.text.get("sd-ti-embedding", "")
    try:
        return json.loads(base64.b64decode(text), object_hook=_as_tensor)
    except (ValueError, TypeError, RuntimeError):  # RuntimeError: absurd nesting, numbers
        raise InputError(
            f"{path}: no learned word in the text of this picture; get the .pt or .safetensors file"
        ) from None


def _as_tensor(value: dict[str, Any]) -> Any:
    return torch.tensor(value["TORCHTENSOR"], dtype=torch.float32) if "TORCHTENSOR" in value else value
