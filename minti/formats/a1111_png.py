"""Embeddings that AUTOMATIC1111's interface hides in PNG pictures."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import InputError

# Pictures of AUTOMATIC1111 ---

MAX_JSON = 2**26  # bytes, against files that unpack to gigabytes


def _is_png(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(8) == b"\x89PNG\r\n\x1a\n"
    except OSError:
        return False  # whoever reads it next complains


def _read_png(path: Path) -> Any:
    """The dictionary in a picture: as text, base64 of JSON, or, where that was stripped, in the pixels."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            text = image.text.get("sd-ti-embedding")
            pixels = np.asarray(image.convert("RGB"))
    except Exception as error:  # a damaged picture can fail in any way whatever
        raise InputError(f"{path}: truncated or damaged picture ({error}); download it again") from None
    try:
        raw = base64.b64decode(text) if text else _read_strips(pixels)
        return json.loads(raw, object_hook=_as_tensor)
    except (ValueError, TypeError, RuntimeError, zlib.error):  # RuntimeError: absurd nesting, numbers
        raise InputError(
            f"{path}: no learned word in this picture, or it was lost when the picture was edited; "
            "get the original file"
        ) from None


def _as_tensor(value: dict[str, Any]) -> Any:
    return torch.tensor(value["TORCHTENSOR"], dtype=torch.float32) if "TORCHTENSOR" in value else value


def _read_strips(pixels: np.ndarray) -> bytes:
    """What is hidden beside a picture, (H, W, 3) uint8.

    From left to right: a strip with the low halves of all bytes of a zlib stream, a black column, the
    picture, a black column, a strip with the high halves. They are in the low halves of the strips' channels,
    row by row, masked by pseudo-random numbers; the high halves are ornament. Around all may be a black
    border.
    """
    lit = (pixels > 0).all(2)
    rows, columns = np.flatnonzero(lit.any(1)), np.flatnonzero(lit.any(0))
    if not len(rows):
        raise ValueError("all black")
    halves = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] & 0x0F
    black = np.flatnonzero(~halves.any((0, 2)))
    if len(black) < 2:
        raise ValueError("no black columns")
    low, high = halves[:, : black[0]], halves[:, black[-1] + 1 :]
    mask = _mask(low.size).reshape(low.shape)
    stream = zlib.decompressobj()
    content = stream.decompress((((high ^ mask) << 4) | (low ^ mask)).tobytes(), MAX_JSON)
    if not stream.eof:
        raise ValueError("incomplete")
    return content


def _mask(size: int) -> np.ndarray:
    """(size,) uint8 below 16, from x_0 = 0 and x_k = a x_{k-1} + c mod 2^32, a linear congruential generator.

    Written out, x_k = c (1 + a + ... + a^{k-1}); unsigned integers of 32 bits do the modulo by themselves.
    """
    powers = np.full(size, 1664525, np.uint32)
    powers[:1] = 1
    x = np.cumsum(np.cumprod(powers, dtype=np.uint32), dtype=np.uint32) * np.uint32(1013904223)
    return (x % 255 & 0x0F).astype(np.uint8)
