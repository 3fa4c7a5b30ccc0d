"""The prompts in which a learned word is tried: lists of them, and how they are filled in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError

PROMPTS = Path(__file__).parent / "prompt_lists"


@dataclass(frozen=True)
class Prompt:
    """A prompt with {} for the word, and what it asks for: background, style, composition, attribute, ..."""

    text: str
    group: str = ""


@dataclass(frozen=True)
class PromptList:
    """What a word is tried in.

    Attributes:
        prompts: those that want it edited.
        reconstruction: the one that only names it; its pictures are compared with the photos.
    """

    prompts: Sequence[Prompt]
    reconstruction: str = "a photo of {}"

    @property
    def templates(self) -> list[str]:
        """All prompts, the one for reconstruction first."""
        return [self.reconstruction, *(prompt.text for prompt in self.prompts)]


def fill(template: str, word: str) -> str:
    """The prompt with a word; with "", what is left of it without one."""
    return " ".join(template.replace("{}", word).split())


def check_prompt(template: str, source: str) -> None:
    """Raises InputError unless it has one {} and says something else, too."""
    if template.count("{}") != 1 or not any(c.isalnum() for c in fill(template, "")):
        raise InputError(
            f"{source}: {template!r} needs words, and exactly one {{}} where the learned one goes"
        )


def load_prompts(name: str) -> PromptList:
    """The shipped list called `name` (object, style, tiny, ...), or a text file of the same form.

    One prompt a line, each with one {}. A line `# background` names the group of those below it; the group
    `reconstruction` has one prompt, by default "a photo of {}".

    Raises:
        InputError: no such list or file; a line without {}, or with nothing else; a prompt given twice.
    """
    shipped = PROMPTS / f"{name}.txt"
    path = shipped if shipped.is_file() and not Path(name).is_file() else Path(name)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        known = ", ".join(sorted(p.stem for p in PROMPTS.glob("*.txt")))
        raise InputError(f"prompts {name!r}: neither one of {known}, nor a text file, one a line") from None
    group, found, reconstruction = "", [], []
    for line in map(str.strip, lines):
        if line.startswith("#"):
            group = line.lstrip("#").strip()
        elif line:
            check_prompt(line, str(path))
            (reconstruction if group == "reconstruction" else found).append(Prompt(line, group))
    texts = [prompt.text for prompt in (*reconstruction, *found)]
    if not found or len(reconstruction) > 1 or len(set(texts)) < len(texts):
        raise InputError(f"{path}: needs prompts, all different, and at most one under `# reconstruction`")
    return PromptList(found, *(prompt.text for prompt in reconstruction))
