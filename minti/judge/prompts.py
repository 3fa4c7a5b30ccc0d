"""The prompts in which a learned word is tried: lists of them, and what users' prompts may get wrong."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..formats.reading import check_regular
from ..model.placeholders import words_pattern
from ..model.tokenizer import Tokenizer, clean

PROMPTS = Path(__file__).parent / "prompt_lists"

OTHER_TOOLS = {  # what other programs read as a command -> what they use it for
    r"\bembedding:": "ComfyUI's mark of a learned word; write only the word",
    r"<(lora|lyco|hypernet):[^>]*>": "for LoRAs and hypernetworks, which minti does not have",
    r"\b(BREAK|AND)\b": "for prompts in several parts; --long-prompts cuts by itself",
    r"[{\[][^{}\[\]]*\|[^{}\[\]]*[}\]]|__\w+__": "for choices among words, which minti does not have",
    r"[(\[][^()\[\]]*:\s*\d*\.?\d+\s*[)\]]|\(\([^()]*\)\)": "for weights of words, which minti does not have",
}


@dataclass(frozen=True)
class Prompt:
    """A prompt with {} for the word, and the group of what it asks for: background, style, attribute, ..."""

    text: str
    group: str = ""


@dataclass(frozen=True)
class PromptList:
    """The prompts in which a word is tried.

    Attributes:
        prompts: those that ask for a change.
        reconstruction: the one that only names the concept; its pictures are compared with the photos.
    """

    prompts: Sequence[Prompt]
    reconstruction: str = "a photo of {}"

    @property
    def templates(self) -> list[str]:
        """All prompts, the one for reconstruction first."""
        return [self.reconstruction, *(prompt.text for prompt in self.prompts)]

    @property
    def groups(self) -> list[list[Prompt]]:
        """The prompts of each group, without the one for reconstruction."""
        names = dict.fromkeys(prompt.group for prompt in self.prompts)
        return [[prompt for prompt in self.prompts if prompt.group == name] for name in names]


def fill(template: str, word: str) -> str:
    """The prompt with a word in the place of {}; if the word is "", the rest of the prompt."""
    return " ".join(template.replace("{}", word).split())


def check_prompt(template: str, source: str) -> None:
    """Raises InputError unless the prompt has exactly one {} and something else that can be read."""
    if template.count("{}") != 1 or not any(c.isalnum() for c in fill(template, "")):
        raise InputError(
            f"{source}: {template!r} needs words, and exactly one {{}} where the learned one goes"
        )


def load_prompts(name: str) -> PromptList:
    """The shipped list called `name` (object, style, tiny, ...), or a text file of the same form.

    Each line is a prompt with one {}. A line `# background` names the group of the prompts below it. The
    group `reconstruction` has one prompt, by default "a photo of {}".

    Raises:
        InputError: there is no such list or file; a line cannot be used; a prompt is given twice.
    """
    shipped = PROMPTS / f"{name}.txt"
    path = shipped if shipped.is_file() and not Path(name).is_file() else Path(name)
    try:
        lines = check_regular(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError):
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


def explain_syntax(prompt: str, learned_words: Iterable[str]) -> list[str]:
    """A line for each piece of a prompt that other programs read as a command and minti reads as text."""
    found = [(re.search(pattern, prompt), use) for pattern, use in OTHER_TOOLS.items()]
    lines = [f"{match[0]!r} is read as text ({use})" for match, use in found if match]
    bracketed = [w for w in learned_words if f"<{w}>".lower() in prompt.lower()]
    return lines + [
        f"the brackets around {w!r} are read as text; the learned word is {w!r}" for w in bracketed
    ]


def notices(
    prompts: Sequence[str], negative_prompt: str | None, guidance_scale: float, tokenizer: Tokenizer
) -> list[str]:
    """What the user may not expect: text without effect, and commands of other programs read as text."""
    found = []
    if negative_prompt and guidance_scale <= 1:
        found.append("--negative-prompt has no effect with --guidance-scale 1 or less")
    texts = [*prompts, negative_prompt or ""]
    used = {i for text in texts for i in tokenizer.encode(text)}
    for word, ids in tokenizer.placeholders.items():
        if not used.intersection(ids):
            found.append(f"no prompt contains the learned word {word!r}, so it has no effect")
    return found + [line for text in texts for line in explain_syntax(text, tokenizer.placeholders)]


def replace_words(text: str, words: Iterable[str], by: str = "") -> str:
    """A cleaned prompt with placeholder words replaced, or left out, wherever a `Tokenizer` would see them.

    replace_words("A photo of <toy>, on grass", ["<toy>"])  ->  "a photo of , on grass"
    """
    known = [clean(word) for word in words]
    return clean(words_pattern(known).sub(lambda _: by, clean(text)) if known else text)
