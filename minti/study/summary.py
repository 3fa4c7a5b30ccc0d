"""What a study comes to: means over concepts, the paper's claims put to the test, and where CLIP misleads."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import InputError
from ..judge.benchmark import Evaluation
from ..judge.results import SCORES, as_json
from ..judge.scores import Score, combine, mean_of_words, mean_score
from .classifier import Truth

TRUTHS = ("kept", "kept_edited", "followed")
EXPECTED = ("above", "at least", "at most")
ALLOWANCE = 0.15  # of the distance between Image Only and Prompt Only


@dataclass(frozen=True)
class Outcome:
    """The scores of one way of asking for one concept; or, with `concept` "", their mean over concepts.

    Attributes:
        family: see `grid.Setup`.
        note: the caption; or what went wrong.
        length: of the learned vectors, in mean lengths of the vocabulary's.
        diverged: whether learning broke off.
    """

    concept: str
    family: str
    evaluation: Evaluation
    truth: Truth | None = None
    note: str = ""
    length: float | None = None
    diverged: bool = False

    @property
    def name(self) -> str:
        return self.evaluation.name

    def score(self, name: str) -> Score | None:
        """One of SCORES or TRUTHS; a fact; or "clip_t_asked", CLIP-T of prompts that `followed` is about."""
        if name == "clip_t_asked":
            asked = self.truth.asked if self.truth else ()
            return mean_score([row.clip_t for row in self.evaluation.rows if row.prompt in asked])
        if self.truth and name in self.truth.facts:
            return self.truth.facts[name]
        return getattr(self.truth if name in TRUTHS else self.evaluation, name, None)

    def as_json(self) -> dict[str, Any]:
        about = {"concept": self.concept, "family": self.family, "note": self.note, "length": self.length}
        truths = {name: self.score(name) for name in (*TRUTHS, *self.truth.facts)} if self.truth else None
        rounded = truths and {name: score and round(score.value, 6) for name, score in truths.items()}
        return about | as_json(self.evaluation) | {"truth": rounded}


def means(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """For each name the mean over concepts, and over the captions or repeated words of each."""
    names: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        names.setdefault(outcome.name, []).append(outcome)
    result = []
    for same in names.values():
        scores = {name: _mean(same, name) for name in SCORES}
        evaluation = replace(same[0].evaluation, rows=(), **scores)
        truths = [_mean(same, name) for name in TRUTHS]
        known = dict.fromkeys(fact for o in same if o.truth for fact in o.truth.facts)
        facts = {fact: _mean(same, fact) for fact in known}
        truth = Truth(*truths, facts=facts) if any(truths) else None
        lengths = [o.length for o in same if o.length is not None]
        length = sum(lengths) / len(lengths) if lengths else None
        result.append(Outcome("", same[0].family, evaluation, truth, _count(same), length))
    return result


def _mean(same: Sequence[Outcome], name: str) -> Score | None:
    concepts: dict[str, list[Score]] = {}
    for outcome in same:
        if score := outcome.score(name):
            concepts.setdefault(outcome.concept, []).append(score)
    if same[0].evaluation.kind != "word":
        return mean_score([score for scores in concepts.values() for score in scores])
    return mean_score([mean_of_words(scores, i) for i, scores in enumerate(concepts.values())])


def _count(same: Sequence[Outcome]) -> str:
    concepts, diverged = len({o.concept for o in same}), sum(o.diverged for o in same)
    text = f"{concepts} concept{'s' * (concepts > 1)}"
    text += f", {len(same)} {same[0].evaluation.kind}s" * (len(same) != concepts)
    return text + f", {diverged} diverged" * bool(diverged)


# Claims
# ----------------------------------------------------------------------------------------------------------


def check_claims(claims: Any, names: Sequence[str]) -> None:
    """Raises InputError unless the `claims` of a recipe are of the form that `judge_claims` takes."""
    if not isinstance(claims, list):
        raise InputError("claims: should be a list")
    known = set(names)
    for claim in claims:
        if not isinstance(claim, Mapping) or set(claim) != {"says", "first", "second", "score", "expect"}:
            raise InputError("claims: each needs says, first, second, score and expect, and nothing else")
        if claim["expect"] not in EXPECTED or claim["score"] not in (*SCORES, *TRUTHS):
            choices, scores = ", ".join(EXPECTED), ", ".join((*SCORES, *TRUTHS))
            raise InputError(f"claims: {claim['says']!r} should expect {choices}, of one of {scores}")
        if not all(isinstance(claim[side], str | list) for side in ("first", "second")):
            raise InputError(f"claims: first and second of {claim['says']!r} should be names of setups")
        for name in (*_names(claim["first"]), *_names(claim["second"])):
            if name not in known:
                raise InputError(f"claims: no setup is called {name!r}; there are {', '.join(sorted(known))}")


def judge_claims(claims: Sequence[Mapping[str, Any]], rows: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Whether the numbers bear out what sources claim.

    Args:
        claims: {says, first, second, score, expect}: the score of `first` is "above" that of `second`; or "at
            least" or "at most" as high, give or take 15 % of the distance between the references. Several
            names stand for their mean.
        rows: means.

    Returns:
        Each claim with `values` of both sides, `margin` (within which they may differ by chance: 95 % of
        differences between the same pictures drawn anew; None if there was nothing to draw), `verdict`.
    """
    by_name = {row.name: row for row in rows}
    results = []
    for claim in claims:
        score, expect = claim["score"], claim["expect"]
        sides = [
            mean_score([by_name[name].score(score) for name in _names(claim[side])])
            for side in ("first", "second")
        ]
        values, margin, verdict = [side and side.value for side in sides], None, "cannot be told"
        if None not in sides:
            difference = combine(operator.sub, sides)
            ends = [by_name[name].score(score) for name in ("image only", "prompt only")]
            span = 0.0 if None in ends else abs(ends[0].value - ends[1].value)
            margin = difference.margin if difference.interval else None
            verdict = _verdict(expect, difference.value, margin, ALLOWANCE * span)
        results.append({**claim, "values": values, "margin": margin, "verdict": verdict})
    return results


def _verdict(expect: str, difference: float, margin: float | None, allowance: float) -> str:
    ahead = {"above": difference, "at least": difference + allowance, "at most": allowance - difference}
    if margin is None:
        return "cannot be told"
    if abs(ahead[expect]) <= margin:
        return "too close to tell"
    return "holds" if ahead[expect] > 0 else "does not hold"


def _names(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


# CLIP against the truth
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disagreement:
    """CLIP prefers `liked` to `right`, by more than chance, and is wrong."""

    liked: Outcome
    right: Outcome
    gap: float  # in the truth


def rank_correlation(outcomes: Sequence[Outcome], score: str, truth: str) -> float | None:
    """Spearman's, between a score and the truth, mean over concepts; 1: CLIP ranks as it should."""
    found = []
    for concept in dict.fromkeys(o.concept for o in outcomes):
        pairs = [(o.score(score), o.score(truth)) for o in outcomes if o.concept == concept]
        x = np.array([[s.value for s in pair] for pair in pairs if None not in pair])
        if len(x) > 2 and (x.max(axis=0) > x.min(axis=0)).all():
            ranks = [(c[:, None] > c).sum(1) + 0.5 * (c[:, None] == c).sum(1) for c in x.T]
            found.append(float(np.corrcoef(ranks)[0, 1]))
    return sum(found) / len(found) if found else None


def disagreements(
    outcomes: Sequence[Outcome], score: str, truth: str, gap: float = 0.1, most: int = 3
) -> list[Disagreement]:
    """Where CLIP misleads most: pairs of the same concept whose order it gets wrong, both beyond chance.

    Args:
        gap: the least difference of the truth that counts.
        most: how many to return, the worst first, each outcome at most once.
    """
    found = []
    for a in outcomes:
        for b in outcomes:
            liking, truths = ([o.score(key) for o in (a, b)] for key in (score, truth))
            if a.concept != b.concept or None in (*liking, *truths):
                continue
            liked, wrong = combine(operator.sub, liking), combine(operator.sub, truths[::-1])
            if liked.value > liked.margin and wrong.value > max(gap, wrong.margin):
                found.append(Disagreement(a, b, wrong.value))
    chosen: list[Disagreement] = []
    for item in sorted(found, key=lambda d: -d.gap):
        taken = [o for d in chosen for o in (d.liked, d.right)]
        if len(chosen) < most and item.liked not in taken and item.right not in taken:
            chosen.append(item)
    return chosen
