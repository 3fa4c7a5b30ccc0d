"""Prompts in which a new word is learned, with {} in the place of the word.

The lists in `template_lists/` (arXiv 2208.01618, appendix D; after CLIP's for ImageNet) say as little as
possible about the picture, so that whatever is special about it goes into the word.
"""

from pathlib import Path

from ..errors import InputError
from ..formats.reading import check_regular

LISTS = Path(__file__).parent / "template_lists"
NAMES = ("object", "style")


def load_templates(name: str) -> tuple[str, ...]:
    """Read a list of templates: "object", "style", or a text file with one template a line.

    Raises:
        InputError: no such list or file, or a line that has not exactly one {}.
    """
    path = LISTS / f"{name}.txt" if name in NAMES else Path(name)
    try:
        text = check_regular(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError):
        nor = " nor ".join(NAMES)
        raise InputError(f"templates {name!r}: neither {nor}, nor a text file with one a line") from None
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    for line in lines:
        if line.count("{}") != 1:
            raise InputError(f"{name}: {line!r} needs exactly one {{}} where the word goes")
    if not lines:
        raise InputError(f"{name}: is empty; write one template a line, such as: a photo of a {{}}")
    return lines


OBJECT = load_templates("object")
CONTEXT = load_templates(str(LISTS / "context.txt"))  # of places and styles, for `extensions.ContextTerm`
