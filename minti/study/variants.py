"""The words of a study: the setups of a recipe, spread out over values, and shared out into batches."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import product
from math import prod
from typing import Any

from ..errors import InputError
from ..inversion.batches import Settings
from ..runs.options import options
from .concepts import ConceptSpec, table_of
from .ways import WAYS, way_of

MOST_SETUPS = 1000  # of a recipe, all values spread out
PER_WORD = ("init", "init_word", "num_vectors", "templates", "lr", "seed", "crop", "flip")
SHARED = [f.name for f in fields(Settings) if f.name not in ("betas", "eval_size", "eval_seed")]
KEYS = (*PER_WORD, "photos", *SHARED, *WAYS)  # what a setup can set
_options = cache(options)


# Words
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One way to learn a word for one concept. Equal ones are learned once, whichever setups want them.

    Attributes:
        photos: how many of the concept's photos, the first ones by name; None: all.
        settings: what all words of a batch share; the other attributes may differ within a batch.
    """

    concept: ConceptSpec
    init: str
    init_word: str
    num_vectors: int
    templates: str
    lr: float
    seed: int
    crop: str
    flip: bool
    photos: int | None
    settings: Settings

    @property
    def trajectory(self) -> Variant:
        """The same for words that differ only in how long they are learned, if their end is like any step.

        Then the word after fewer steps is a snapshot of the word after more.
        """
        ends = self.settings.lr_schedule != "constant" or self.settings.average > 1
        return self.after(self.settings.steps if ends else 1)

    def after(self, steps: int) -> Variant:
        """The same with another number of steps."""
        return replace(self, settings=replace(self.settings, steps=steps))

    @property
    def active_vectors(self) -> int:
        """How many vectors the word has after its steps."""
        joined = sum(self.settings.steps >= step for step in self.settings.progressive)
        return 1 + joined if self.settings.progressive else self.num_vectors

    @property
    def key(self) -> str:
        """A short name that no other variant has."""
        return f"{self.concept.name}-{_hash(self)}"


@dataclass(frozen=True)
class Setup:
    """A way of learning a word for every concept.

    Attributes:
        name: with the values that it stands for, such as "steps 500".
        family: the name in the recipe, shared by the values spread out of one setup.
        values: its settings, those of the base included.
    """

    name: str
    family: str
    values: Mapping[str, Any] = field(hash=False)


def expand(setups: Any, base: Mapping[str, Any]) -> list[Setup]:
    """Every combination of values that are lists: `seed: [0, 1, 2]` makes three setups of one.

    (`progressive`, which is a list of steps by itself, takes a list of such lists.)

    Raises:
        InputError: an unknown key, a value of the wrong type, too many setups.
    """
    found, count = [], 0
    for family, own in table_of(setups, "setups", "`high lr: {lr: 0.02}`").items():
        if not isinstance(own, Mapping | None):
            raise InputError(f"setups: {family!r} should be settings like {{lr: 0.02}}, or {{}}")
        values = {**base, **(own or {})}
        axes = {key: value for key, value in values.items() if _is_axis(key, value)}
        count += prod(map(len, axes.values()))
        if count > MOST_SETUPS:
            raise InputError(f"setups: {family!r} brings them to {count:,}; {MOST_SETUPS:,} is the limit")
        check_settings(values, f"setups: {family!r}")
        for combination in product(*axes.values()):
            chosen = dict(zip(axes, combination, strict=True))
            labels = [f"{key.replace('_', ' ')} {_label(value)}" for key, value in chosen.items()]
            labels = labels if list(axes) == [family] else [family, *labels]
            found.append(Setup(", ".join(labels), family, {**values, **chosen}))
    return found


def _is_axis(key: str, value: Any) -> bool:
    return isinstance(value, list) and (key != "progressive" or any(isinstance(v, list) for v in value))


def _label(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, list) else str(value)


def check_settings(values: Mapping[str, Any], source: str) -> None:
    """Raises InputError, beginning with `source`, unless these are settings of words."""
    for key, value in values.items():
        if key not in KEYS:
            raise InputError(f"{source}: unknown setting {key!r}; there are {', '.join(sorted(KEYS))}")
        if _is_axis(key, value) and not value:
            raise InputError(f"{source}: {key} is an empty list")
        for single in value if _is_axis(key, value) else [value]:
            if key != "photos":
                try:
                    way_of({key: single}) if key in WAYS else _options().check({key: single})
                except InputError as error:
                    raise InputError(f"{source}: {error}") from None
            elif single is not None and (type(single) is not int or single < 1):
                raise InputError(f"{source}: photos {single!r} should be a count, 1 or more")


def make_variant(setup: Setup, concept: ConceptSpec, scale: float = 1.0) -> Variant:
    """The word that a setup learns for a concept.

    Args:
        scale: factor of all numbers of steps, for a quick look.

    Raises:
        InputError: the number of vectors is not that of `progressive`.
    """
    opts = _options()
    values = vars(opts.parse([], required=[])) | {"init_word": concept.init_word}
    values |= {"templates": concept.templates} if concept.templates else {}
    given = {
        key: value
        for key, value in setup.values.items()
        if key not in ("photos", *WAYS) and value is not None
    }
    values |= opts.check(given)

    def scaled(steps: int) -> int:
        return max(1, round(steps * scale))

    progressive = tuple(map(scaled, values["progressive"]))
    if progressive and "num_vectors" not in setup.values:
        values["num_vectors"] = 1 + len(progressive)
    if progressive and values["num_vectors"] != 1 + len(progressive):
        raise InputError(
            f"setups: {setup.name!r} has {values['num_vectors']} vectors, progressive adds others"
        )
    shared = {key: values[key] for key in SHARED}
    shared |= {"betas": (values["beta1"], values["beta2"]), "progressive": progressive}
    shared |= {key: scaled(values[key]) for key in ("steps", "warmup", "average") if values[key]}
    if (last := max(progressive, default=0)) > shared["steps"]:
        raise InputError(f"setups: {setup.name!r} ends before step {last} of progressive; give more steps")
    own = {key: values[key] for key in PER_WORD}
    return Variant(concept, photos=setup.values.get("photos"), settings=Settings(**shared), **own)


# Batches
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Words that are learned in one batch, since they share their `settings`.

    Attributes:
        words: the trajectory of each word -> after how many steps it is to be kept.
    """

    settings: Settings
    words: Mapping[Variant, tuple[int, ...]] = field(hash=False)

    @property
    def key(self) -> str:
        """A short name that no other group has."""
        return _hash([self.settings, *self.words.items()])


def group_words(variants: Sequence[Variant], together: int) -> list[Group]:
    """Share out words into batches of at most `together`. Words of one trajectory are learned as one."""
    steps_of: dict[Variant, set[int]] = {}
    for variant in variants:
        steps_of.setdefault(variant.trajectory, set()).add(variant.settings.steps)
    batches: dict[Settings, dict[Variant, tuple[int, ...]]] = {}
    for word, steps in steps_of.items():
        settings = replace(word.settings, steps=max(steps))
        batches.setdefault(settings, {})[word] = tuple(sorted(steps))
    groups = []
    for settings, words in batches.items():
        items = list(words.items())
        groups += [Group(settings, dict(items[i : i + together])) for i in range(0, len(items), together)]
    return groups


def _hash(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:10]
