"""The concepts that a study learns words for."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..cli.options import path as option_path
from ..cli.yaml_files import read_yaml
from ..errors import InputError


@dataclass(frozen=True)
class ConceptSpec:
    """A concept to learn a word for.

    Attributes:
        name: also the name of its folders in a study.
        images: the folder of its photos.
        kind: "object", "style", ...
        set: "development", looked at while defaults are chosen, or "final", kept for the numbers to report.
        templates, prompts: what it is learned and tried in; None: those of the recipe.
        captions: kind -> what people would write, such as short -> ["red and white dotted toy"].
        facts: what is true of it, in the terms of a `classifier.Probe`.
    """

    name: str
    images: Path = field(repr=False)
    init_word: str = field(repr=False)
    kind: str = field(default="object", repr=False)
    set: str = field(default="", repr=False)
    templates: str | None = field(default=None, repr=False)
    prompts: str | None = field(default=None, repr=False)
    captions: Mapping[str, Sequence[str]] = field(default_factory=dict, hash=False, repr=False)
    facts: Mapping[str, str] = field(default_factory=dict, hash=False, repr=False)


def text_of(value: Any, where: str) -> str:
    """A text of a YAML file, which may hold anything else. Raises InputError, beginning with `where`."""
    if not isinstance(value, str):
        raise InputError(f"{where}: {value!r} should be text; put it between quotes")
    return value


def texts_of(value: Any, where: str) -> list[str]:
    """A list of texts of a YAML file. Raises InputError, beginning with `where`."""
    if not isinstance(value, list):
        raise InputError(f"{where}: {value!r} should be a list of texts, such as [red cup]")
    return [text_of(item, where) for item in value]


def table_of(value: Any, where: str, example: str) -> Mapping[str, Any]:
    """A table of a YAML file, {} where it is left out. Raises InputError, beginning with `where`."""
    if not isinstance(value, Mapping | None):
        raise InputError(f"{where}: should have entries like {example}")
    return {text_of(key, where): entry for key, entry in (value or {}).items()}


def read_concepts(source: Any) -> dict[str, ConceptSpec]:
    """The concepts that a recipe speaks of, by name.

    Args:
        source: name -> {init_word, images, kind, set, ...}; or a YAML file of that form, beside which the
            photos are, in folders with the names of the concepts, unless `images` is given.

    Raises:
        InputError: an entry cannot be used.
    """
    if not source:
        raise InputError(
            "concepts: must be given, a YAML file or entries like toy: {images: DIR, init_word: toy}"
        )
    folder, where = (Path(source).parent, source) if isinstance(source, str) else (Path(), "concepts")
    entries = read_yaml(source) if isinstance(source, str) else source
    allowed, found = {f.name for f in fields(ConceptSpec)} - {"name"}, {}
    for name, entry in table_of(entries, where, "toy: {init_word: toy}").items():
        if not re.fullmatch(r"\w[\w.-]{0,99}", name):
            raise InputError(f"{where}: name {name!r} should consist of letters, digits, - and _")
        if not isinstance(entry, Mapping) or entry.get("init_word") is None or set(entry) - allowed:
            raise InputError(f"{where}: {name} needs init_word, and can have {', '.join(sorted(allowed))}")
        values: dict[str, Any] = {
            key: text_of(entry[key], f"{where}: {key} of {name}")
            for key in ("init_word", "kind", "set", "templates", "prompts")
            if entry.get(key) is not None
        }
        captions = table_of(entry.get("captions"), f"{where}: the captions of {name}", "short: [red cup]")
        values["captions"] = {k: texts_of(c, f"{where}: {k} captions of {name}") for k, c in captions.items()}
        facts = table_of(entry.get("facts"), f"{where}: the facts of {name}", "color: red")
        values["facts"] = {k: text_of(f, f"{where}: {k} of {name}") for k, f in facts.items()}
        images = text_of(entry.get("images", name), f"{where}: images of {name}")
        images = Path(option_path(images)) if folder == Path() else folder / images
        found[name] = ConceptSpec(name=name, images=images, **values)
    return found


def choose_concepts(
    concepts: Mapping[str, ConceptSpec], choice: str, kinds: Sequence[str]
) -> list[ConceptSpec]:
    """The concepts of one set, "final" or "development", of certain kinds; or those with given names.

    Args:
        choice: the set, or names with commas between.

    Raises:
        InputError: there are none; or they are of several sets, which do not belong in one average.
    """
    names = [name.strip() for name in choice.split(",")]
    chosen = [concepts[name] for name in names if name in concepts]
    if len(chosen) < len(names):
        chosen = [c for c in concepts.values() if c.kind in kinds and c.set == choice]
    sets = sorted({c.set for c in chosen or concepts.values()})
    if not chosen:
        named = ", ".join(filter(None, sets))
        remedy = f"choose a set ({named}) or" if named else "say `set: final` of them, or choose"
        raise InputError(f"--choose {choice}: no such concepts; {remedy} among {', '.join(concepts)}")
    if len(sets) > 1:
        raise InputError(f"--choose {choice}: of the sets {' and '.join(sets)}; study one at a time")
    return chosen
