"""Decoding large latents piece by piece, in the memory of one piece."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor


def decode_in_tiles(decode: Callable[[Tensor], Tensor], latents: Tensor, tile: int | None, f: int) -> Tensor:
    """Decode large latents in squares that overlap by at least a quarter, and fade them into each other.

    It takes the memory of one square, however large the picture, but each square is normalised by itself, so
    that colours may come out slightly different.

    Args:
        decode: (B, C, h, w) latents -> (B, 3, f h, f w) pixels.
        latents: (B, C, h, w).
        tile: height and width of a square, in latents; None, or as large as the latents: in one piece.
        f: pixels per latent, along each side.

    Returns:
        (B, 3, f h, f w)
    """
    height, width = latents.shape[2:]
    if tile is None or max(height, width) <= tile:
        return decode(latents)
    rows, columns = min(tile, height), min(tile, width)
    fade = (_fading(rows * f)[:, None] * _fading(columns * f)).to(latents.device)  # (tile H, tile W)
    total, pixels = torch.zeros(height * f, width * f, device=latents.device), None
    for top, left in product(_starts(height, rows), _starts(width, columns)):
        part = decode(latents[..., top : top + rows, left : left + columns]).float() * fade
        if pixels is None:
            pixels = part.new_zeros(*part.shape[:2], height * f, width * f)
        y, x = slice(top * f, (top + rows) * f), slice(left * f, (left + columns) * f)
        pixels[..., y, x] += part
        total[y, x] += fade
    return (pixels / total).to(latents.dtype)


def _starts(length: int, tile: int) -> list[int]:
    """Where tiles begin that cover a length and overlap by at least a quarter."""
    return [*range(0, length - tile, tile - tile // 4), length - tile]


def _fading(size: int) -> Tensor:
    """Weights across a tile, (size,): one in the middle, falling to about zero in the quarter at each end."""
    distance = torch.arange(size) + 0.5
    return (torch.minimum(distance, size - distance) / (size // 4)).clamp(max=1)
