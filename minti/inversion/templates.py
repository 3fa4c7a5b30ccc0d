"""Prompts in which a new word is learned, and those in which it is tried afterwards.

The former (arXiv 2208.01618, appendix D; after CLIP's for ImageNet) say as little as possible about the
picture, so that whatever is special about it goes into the word. The latter, `prompts/*.txt`, want to change
it.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError

OBJECT = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
)

STYLE = (
    "a painting in the style of {}",
    "a rendering in the style of {}",
    "a cropped painting in the style of {}",
    "the painting in the style of {}",
    "a clean painting in the style of {}",
    "a dirty painting in the style of {}",
    "a dark painting in the style of {}",
    "a picture in the style of {}",
    "a cool painting in the style of {}",
    "a close-up painting in the style of {}",
    "a bright painting in the style of {}",
    "a good painting in the style of {}",
    "a rendition in the style of {}",
    "a nice painting in the style of {}",
    "a small painting in the style of {}",
    "a weird painting in the style of {}",
    "a large painting in the style of {}",
)

TEMPLATES = {"object": OBJECT, "style": STYLE}


def load_templates(name: str) -> tuple[str, ...]:
    """The list called `name` ("object", "style"), or the lines of a file of that name, each with one {} in
    it.

    Raises:
        InputError: no such list or file; a line without {}.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    try:
        text = Path(name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise InputError(
            f"templates {name!r}: neither {' nor '.join(TEMPLATES)}, nor a text file with one a line"
        ) from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in lines:
        if line.count("{}") != 1:
            raise InputError(f"{name}: {line!r} needs exactly one {{}} where the word goes")
    if not lines:
        raise InputError(f"{name}: is empty; write one template a line, such as: a photo of a {{}}")
    return tuple(lines)
