"""What a study learns and asks for: a recipe's setups, spread out over their values and over concepts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from ..cli.yaml_files import read_yaml
from ..errors import InputError
from ..inversion.batches import Settings
from ..runs.options import options

PER_WORD = ("init", "init_word", "num_vectors", "templates", "lr", "seed", "crop", "flip")
SHARED = [f.name for f in fields(Settings) if f.name not in ("betas", "eval_size", "eval_seed")]
KEYS = (*PER_WORD, "photos", *SHARED)  # what a setup can set
_options = cache(options)


# Concepts
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A concept to be learned.

    Attributes:
        images: folder of its photos.
        kind: "object", "style", ...
        set: "development", looked at while defaults are chosen, or "final", kept for the numbers to report.
        templates, prompts: to learn in, and to be tried in; None: those of the recipe.
        captions: kind -> what people would write, such as short -> ["red and white dotted toy"].
        facts: what is true of it, as a `probe.Probe` reads it.
    """

    name: str
    images: Path
    init_word: str
    kind: str = "object"
    set: str = ""
    templates: str | None = None
    prompts: str | None = None
    captions: Mapping[str, Sequence[str]] = field(default_factory=dict, hash=False)
    facts: Mapping[str, str] = field(default_factory=dict, hash=False)


def read_targets(source: str | Mapping[str, Any] | None) -> dict[str, Target]:
    """The concepts that a recipe speaks of, by name.

    Args:
        source: name -> {init_word, images, kind, set, ...}; or a YAML file of that form, in whose folder lie
            the photos, in folders with the names of the concepts, unless `images` says otherwise.

    Raises:
        InputError: entries that cannot be used.
    """
    if not isinstance(source, str | Mapping):
        raise InputError(
            "concepts: must be given, a YAML file or entries like toy: {images: DIR, init_word: toy}"
        )
    folder = Path(source).parent if isinstance(source, str) else Path()
    where = source if isinstance(source, str) else "concepts"
    entries = read_yaml(source) if isinstance(source, str) else source
    allowed, targets = {f.name for f in fields(Target)} - {"name"}, {}
    for name, entry in entries.items():
        if not isinstance(entry, Mapping) or "init_word" not in entry or set(entry) - allowed:
            raise InputError(f"{where}: {name} needs init_word, and can have {', '.join(sorted(allowed))}")
        captions = entry.get("captions", {})
        if not isinstance(captions, Mapping) or not all(isinstance(c, list) for c in captions.values()):
            raise InputError(
                f"{where}: the captions of {name} should be lists by kind, like short: [red cup]"
            )
        if not isinstance(entry.get("facts", {}), Mapping):
            raise InputError(f"{where}: the facts of {name} should be entries like color: red")
        images = folder / str(entry.get("images", name))
        targets[str(name)] = Target(**{**entry, "name": str(name), "images": images})
    return targets


def choose_targets(targets: Mapping[str, Target], choice: str, kinds: Sequence[str]) -> list[Target]:
    """Those of one set, "final" or "development", that are of certain kinds; or names, with commas between.

    Raises:
        InputError: there are none; or they are of several sets, which do not belong in one average.
    """
    names = [name.strip() for name in choice.split(",")]
    chosen = [targets[name] for name in names if name in targets]
    if len(chosen) < len(names):
        chosen = [t for t in targets.values() if t.kind in kinds and t.set == choice]
    sets = sorted({t.set for t in chosen or targets.values()})
    if not chosen:
        raise InputError(
            f"--choose {choice}: no such concepts; choose a set ({', '.join(filter(None, sets))}) or among "
            f"{', '.join(targets)}"
        )
    if len(sets) > 1:
        raise InputError(f"--choose {choice}: of the sets {' and '.join(sets)}; study one at a time")
    return chosen


# Words
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One way to learn a word for one concept. Equal ones are learned once, whichever setups want them.

    Attributes:
        photos: how many of the concept's, the first ones; None: all.
    """

    target: Target
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
    def run(self) -> Variant:
        """What leads to it: with a constant learning rate, fewer steps are a snapshot of more."""
        return self.after(self.settings.steps if self.settings.lr_schedule != "constant" else 0)

    def after(self, steps: int) -> Variant:
        """The same with another number of steps."""
        return replace(self, settings=replace(self.settings, steps=steps))

    @property
    def vectors_in_play(self) -> int:
        """How many vectors the word has after its steps."""
        joined = sum(self.settings.steps >= step for step in self.settings.progressive)
        return 1 + joined if self.settings.progressive else self.num_vectors

    @property
    def key(self) -> str:
        """A short name, its own."""
        return f"{self.target.name}-{_hash(self)}"


@dataclass(frozen=True)
class Setup:
    """One row of the study: a way of asking for every concept.

    Attributes:
        name: with the values that it stands for, such as "steps 500".
        family: the name in the recipe, shared by the values spread out of one setup.
        values: what the recipe sets for it.
    """

    name: str
    family: str
    values: Mapping[str, Any] = field(hash=False)


def expand(setups: Any, base: Mapping[str, Any]) -> list[Setup]:
    """Every combination of values that are lists: `seed: [0, 1, 2]` makes three setups of one.

    (`progressive`, which is a list of steps by itself, takes a list of such lists.)

    Raises:
        InputError: an unknown key, a value of the wrong type, two setups of one name.
    """
    if not isinstance(setups, Mapping):
        raise InputError("setups: should have entries like `high lr: {lr: 0.02}`")
    found = []
    for family, own in setups.items():
        if not isinstance(own, Mapping | None):
            raise InputError(f"setups: {family!r} should be settings like {{lr: 0.02}}, or {{}}")
        values = {**base, **(own or {})}
        check(values, f"setups: {family!r}")
        axes = {key: value for key, value in values.items() if _is_axis(key, value)}
        for combination in product(*axes.values()):
            chosen = dict(zip(axes, combination, strict=True))
            labels = [f"{key.replace('_', ' ')} {_label(value)}" for key, value in chosen.items()]
            name = ", ".join([*([str(family)] * (list(axes) != [family])), *labels])
            found.append(Setup(name, str(family), {**values, **chosen}))
    names = [setup.name for setup in found]
    if doubles := {name for name in names if names.count(name) > 1}:
        raise InputError(f"setups: two of them are called {min(doubles)!r}")
    return found


def _is_axis(key: str, value: Any) -> bool:
    return isinstance(value, list) and (key != "progressive" or any(isinstance(v, list) for v in value))


def _label(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, list) else str(value)


def check(values: Mapping[str, Any], source: str) -> None:
    """Raises InputError, beginning with `source`, unless these are settings of words."""
    for key, value in values.items():
        if key not in KEYS:
            raise InputError(f"{source}: unknown setting {key!r}; there are {', '.join(sorted(KEYS))}")
        if _is_axis(key, value) and not value:
            raise InputError(f"{source}: {key} is an empty list")
        for single in value if _is_axis(key, value) else [value]:
            if key == "photos":
                if single is not None and (
                    isinstance(single, bool) or not isinstance(single, int) or single < 1
                ):
                    raise InputError(f"{source}: photos {single!r} should be a count, 1 or more")
                continue
            try:
                _options().check({key: single})
            except InputError as error:
                raise InputError(f"{source}: {error}") from None


def make_variant(setup: Setup, target: Target, scale: float = 1.0) -> Variant:
    """The word that a setup learns for a concept.

    Args:
        scale: of all numbers of steps, for a quick look.
    """
    opts = _options()
    values = vars(opts.parse([], required=[])) | {"init_word": target.init_word}
    values |= {"templates": target.templates} if target.templates else {}
    given = {key: value for key, value in setup.values.items() if key != "photos" and value is not None}
    values |= opts.check(given)
    progressive = tuple(scaled(step, scale) for step in values["progressive"])
    if progressive and "num_vectors" not in setup.values:
        values["num_vectors"] = 1 + len(progressive)
    if progressive and values["num_vectors"] != 1 + len(progressive):
        raise InputError(
            f"setups: {setup.name!r} has {values['num_vectors']} vectors, progressive adds others"
        )
    shared = {key: values[key] for key in SHARED}
    shared |= {"betas": (values["beta1"], values["beta2"]), "progressive": progressive}
    shared |= {key: scaled(values[key], scale) for key in ("steps", "warmup") if values[key]}
    own = {key: values[key] for key in PER_WORD}
    return Variant(target, photos=setup.values.get("photos"), settings=Settings(**shared), **own)


def scaled(steps: int, scale: float) -> int:
    """A number of steps, in a quick look."""
    return max(1, round(steps * scale))


# Groups
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Words learned in one batch, by the same `settings`, and after how many steps each is to be kept."""

    settings: Settings
    runs: Mapping[Variant, tuple[int, ...]] = field(hash=False)

    @property
    def key(self) -> str:
        """A short name, its own."""
        return _hash([self.settings, *self.runs.items()])


def group_words(variants: Sequence[Variant], together: int) -> list[Group]:
    """Share out words into batches of at most `together`.

    One batch shares its `Settings`. Words that differ only in their number of steps are one word, kept
    several times on the way.
    """
    runs: dict[Variant, set[int]] = {}
    for variant in variants:
        runs.setdefault(variant.run, set()).add(variant.settings.steps)
    batches: dict[Settings, dict[Variant, tuple[int, ...]]] = {}
    for run, steps in runs.items():
        settings = replace(run.settings, steps=max(steps))
        batches.setdefault(settings, {})[run] = tuple(sorted(steps))
    groups = []
    for settings, words in batches.items():
        items = list(words.items())
        for i in range(0, len(items), together):
            groups.append(Group(settings, dict(items[i : i + together])))
    return groups


def _hash(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:10]
