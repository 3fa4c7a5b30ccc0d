"""Pictures put together, and written as PNG files."""

import io
from collections.abc import Iterable, Sequence

from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo


def image_grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size side by side, row by row."""
    width, height = images[0].size
    grid = Image.new("RGB", (width * min(columns, len(images)), height * -(-len(images) // columns)), "white")
    for i, image in enumerate(images):
        grid.paste(image, (width * (i % columns), height * (i // columns)))
    return grid


COLUMNS, THUMBNAIL = 8, 128  # of the grids: pictures in a row, and the longer side of each in pixels


def thumbnails(images: Iterable[Image.Image], side: int = THUMBNAIL) -> list[Image.Image]:
    """The pictures, all of one size: at most `side` pixels, with white margins if their sizes differ."""
    small = []
    for image in images:
        scale = side / max(image.size)
        size = [max(1, round(pixels * scale)) for pixels in image.size]
        small.append(image.resize(size, Image.Resampling.LANCZOS) if scale < 1 else image)
    largest = tuple(max(image.size[i] for image in small) for i in (0, 1))
    return [i if i.size == largest else ImageOps.pad(i, largest, color="white") for i in small]


def encode_png(image: Image.Image, text: dict[str, str]) -> bytes:
    """A picture as the bytes of a PNG file that carries `text` along."""
    info, buffer = PngInfo(), io.BytesIO()
    for key, value in text.items():
        info.add_itxt(key, value)
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()
