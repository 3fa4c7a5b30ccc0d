"""A recipe, spread out into everything that a study has to do."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import InputError
from ..judge.picture_jobs import Protocol
from ..judge.prompts import Prompt, PromptList, check_prompt, load_prompts
from .summary import check_claims
from .variants import Setup, Target, Variant, check, choose_targets, expand, make_variant, read_targets

RECIPE = ("title", "about", "concepts", "kinds", "prompts", "base", "setups", "captions", "claims")
"""What only a recipe can say; it may also give any flag of the command."""

SEED_STEP = 1000  # between the seeds of repeated words: more than any recipe spreads seeds out

# What --quick leaves: of the steps; and how many of the others, at most.
QUICK_STEPS, QUICK_IMAGES, QUICK_SAMPLE_STEPS = 0.4, 8, 15
QUICK_CONCEPTS, QUICK_PROMPTS_OF_A_GROUP, QUICK_CAPTIONS = 1, 2, 1


@dataclass(frozen=True)
class Ask:
    """One way of asking for one concept: with a word that is learned, or else with a text."""

    target: Target
    name: str
    family: str
    kind: str  # as of `Evaluation`
    variant: Variant | None = None
    text: str = ""
    note: str = ""
    repeat: int = 0  # which one of words learned repeatedly


@dataclass
class Plan:
    """Everything that is to be done; nothing has been made or written yet."""

    targets: Sequence[Target]
    prompts: dict[str, PromptList]  # of each concept
    asks: Sequence[Ask]
    protocol: Protocol
    claims: Sequence[dict[str, Any]]
    prompt_names: dict[str, str]


def make_plan(args: argparse.Namespace) -> Plan:
    """Spread out a recipe. Raises InputError for whatever is wrong with it."""
    targets = choose_targets(read_targets(args.concepts), args.choose, args.kinds or ["object"])
    targets = targets[:QUICK_CONCEPTS] if args.quick else targets
    names = {target.name: target.prompts or choose_prompts(args.prompts, target) for target in targets}
    prompts = {name: some_prompts(load_some(source), args.quick) for name, source in names.items()}
    base, captions = args.base or {}, args.captions or {}
    if not isinstance(base, dict) or not isinstance(captions, dict):
        raise InputError(
            "base and captions: should have entries like `steps: 1000` and `short caption: short`"
        )
    check(base, "base")
    setups = expand(args.setups or {}, base)
    names_of_rows = [*(setup.name for setup in setups), *captions, "image only", "prompt only"]
    if doubles := {name for name in names_of_rows if names_of_rows.count(name) > 1}:
        raise InputError(f"setups and captions: two of them are called {min(doubles)!r}")
    asks = [ask for target in targets for ask in ask_for(target, setups, captions, args.quick, args.repeats)]
    if len(asks) == len(targets):
        raise InputError("setups: should have entries like `high lr: {lr: 0.02}`; there is nothing to study")
    claims = args.claims or []
    check_claims(claims, names_of_rows)
    protocol = Protocol(
        num_images=min(args.num_images, QUICK_IMAGES) if args.quick else args.num_images,
        steps=min(args.sample_steps, QUICK_SAMPLE_STEPS) if args.quick else args.sample_steps,
        guidance_scale=args.guidance_scale,
        seed=args.sample_seed,
        batch_size=args.sample_batch_size,
    )
    shown = {
        name: source if isinstance(source, str) else "the recipe's own" for name, source in names.items()
    }
    return Plan(targets, prompts, asks, protocol, claims, shown)


def choose_prompts(prompts: Any, target: Target) -> str | list[str]:
    """The list that the recipe has for a concept: the one for all, or the one for its set."""
    found = prompts.get(target.set) if isinstance(prompts, dict) else prompts
    if not isinstance(found, str | list):
        raise InputError(f"prompts: none for {target.name}, which is in the set {target.set!r}; name a list")
    return found


def load_some(source: str | list[str]) -> PromptList:
    """The list of that name, or these prompts."""
    if isinstance(source, str):
        return load_prompts(source)
    for template in source:
        check_prompt(str(template), "prompts")
    return PromptList([Prompt(str(template)) for template in source])


def some_prompts(prompts: PromptList, quick: bool) -> PromptList:
    """All prompts; or, for a quick look, some of each group."""
    if not quick:
        return prompts
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts.prompts:
        groups.setdefault(prompt.group, []).append(prompt)
    n = QUICK_PROMPTS_OF_A_GROUP  # from all over a group, since neighbours are alike
    few = [group[i * len(group) // n] for group in groups.values() for i in range(min(n, len(group)))]
    return PromptList(few, prompts.reconstruction)


def ask_for(
    target: Target, setups: Sequence[Setup], captions: Mapping[str, str], quick: bool, repeats: int = 1
) -> list[Ask]:
    """Every way of asking for a concept: learned words, captions, and nothing at all."""
    asks = []
    for setup in setups:
        variant = make_variant(setup, target, QUICK_STEPS if quick else 1.0)
        for i in range(repeats):
            word = replace(variant, seed=variant.seed + SEED_STEP * i)
            note = f"seed {word.seed}" * (repeats > 1)
            asks.append(Ask(target, setup.name, setup.family, "word", word, note=note, repeat=i))
    for name, kind in captions.items():
        texts = [target.init_word] if kind == "init_word" else target.captions.get(str(kind))
        if not texts:
            raise InputError(f"captions: {target.name} has none of the kind {kind!r}")
        texts = texts[:QUICK_CAPTIONS] if quick else texts
        asks += [Ask(target, name, name, "caption", text=str(text), note=str(text)) for text in texts]
    return [*asks, Ask(target, "prompt only", "prompt only", "prompt only")]
