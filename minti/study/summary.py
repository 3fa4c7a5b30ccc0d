"""What a study comes to: means over concepts, the paper's claims put to the test, and where CLIP misleads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from ..config import InputError
from ..evaluation import Evaluation
from ..results import SCORES, as_json
from ..scoring import Score
from .probe import Truth

TRUTHS = tuple(f.name for f in fields(Truth))
EXPECTED = ("above", "at least", "at most")
ALLOWANCE = 0.15  # of the distance between Image Only and Prompt Only


@dataclass(frozen=True)
class Outcome:
    """The scores of one way of asking for one concept; or, with `concept` "", their mean over concepts.

    Attributes:
        family: see `grid.Setup`.
        note: the caption; or what went wrong.
        length: of the learned vectors, in mean lengths of the vocabulary's.
    """

    concept: str
    family: str
    evaluation: Evaluation
    truth: Truth | None = None
    note: str = ""
    length: float | None = None

    @property
    def name(self) -> str:
        return self.evaluation.name

    def value(self, score: str) -> float | None:
        """One of SCORES, TRUTHS or "tradeoff"; None if it was not to be had."""
        if score in TRUTHS:
            return getattr(self.truth, score) if self.truth else None
        found = getattr(self.evaluation, score)
        return found.value if isinstance(found, Score) else found

    def margin(self, score: str) -> float:
        """Half the width of the interval around a score; 0 where there is none."""
        found = getattr(self.evaluation, score) if score in SCORES else None
        return (found.high - found.low) / 2 if found and found.low is not None else 0.0

    def as_json(self) -> dict[str, Any]:
        about = {"concept": self.concept, "family": self.family, "note": self.note, "length": self.length}
        return about | as_json(self.evaluation) | {"truth": self.truth and vars(self.truth)}


def means(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """For each name the mean over concepts and captions."""
    names: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        names.setdefault(outcome.name, []).append(outcome)
    result = []
    for same in names.values():
        evaluations = [o.evaluation for o in same]
        scores = {name: _mean_score([getattr(e, name) for e in evaluations]) for name in SCORES}
        evaluation = replace(
            evaluations[0], rows=(), tradeoff=_mean([e.tradeoff for e in evaluations]), **scores
        )
        truths = [o.truth for o in same if o.truth]
        truth = Truth(*(_mean([getattr(t, name) for t in truths]) for name in TRUTHS)) if truths else None
        length = _mean([o.length for o in same])
        result.append(Outcome("", same[0].family, evaluation, truth, _count(same), length))
    return result


def _count(same: Sequence[Outcome]) -> str:
    concepts = len({o.concept for o in same})
    text = f"{concepts} concept{'s' * (concepts > 1)}"
    return text if len(same) == concepts else f"{text}, {len(same)} captions"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _mean_score(scores: Sequence[Score | None]) -> Score | None:
    """Mean of independent scores: their errors partly cancel out."""
    known = [score for score in scores if score is not None]
    if not known:
        return None
    value = sum(score.value for score in known) / len(known)
    if any(score.low is None for score in known):
        return Score(value)
    low = math.hypot(*(score.value - score.low for score in known)) / len(known)
    high = math.hypot(*(score.high - score.value for score in known)) / len(known)
    return Score(value, value - low, value + high)


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
        if claim["expect"] not in EXPECTED or claim["score"] not in (*SCORES, *TRUTHS, "tradeoff"):
            choices, scores = ", ".join(EXPECTED), ", ".join((*SCORES, *TRUTHS, "tradeoff"))
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
        Each claim with `values` of both sides, `margin` (within which they may differ by chance), `verdict`.
    """
    by_name = {row.name: row for row in rows}
    results = []
    for claim in claims:
        score = claim["score"]
        sides = [[by_name[name] for name in _names(claim[side])] for side in ("first", "second")]
        values = [_mean([row.value(score) for row in side]) for side in sides]
        ends = [by_name[name].value(score) for name in ("image only", "prompt only")]
        margin = math.hypot(*(math.hypot(*(r.margin(score) for r in side)) / len(side) for side in sides))
        span = 0.0 if None in ends else abs(ends[0] - ends[1])
        verdict = "cannot be told"
        if None not in values:
            verdict = _verdict(claim["expect"], values[0] - values[1], margin, max(margin, ALLOWANCE * span))
        results.append({**claim, "values": values, "margin": margin, "verdict": verdict})
    return results


def _verdict(expect: str, difference: float, margin: float, allowance: float) -> str:
    if expect == "above" and abs(difference) <= margin:
        return "too close to tell"
    holds = {
        "above": difference > 0,
        "at least": difference >= -allowance,
        "at most": difference <= allowance,
    }
    return "holds" if holds[expect] else "does not hold"


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
        pairs = [(o.value(score), o.value(truth)) for o in outcomes if o.concept == concept]
        x = np.array([pair for pair in pairs if None not in pair])
        if len(x) > 2 and (x.max(axis=0) > x.min(axis=0)).all():
            ranks = [(c[:, None] > c).sum(1) + 0.5 * (c[:, None] == c).sum(1) for c in x.T]
            found.append(float(np.corrcoef(ranks)[0, 1]))
    return _mean(found)


def disagreements(
    outcomes: Sequence[Outcome], score: str, truth: str, gap: float = 0.1, most: int = 3
) -> list[Disagreement]:
    """Where CLIP misleads most: pairs of the same concept whose order it gets wrong beyond chance.

    Args:
        gap: the least difference of the truth that counts.
        most: how many to return, the worst first, each outcome at most once.
    """
    found = []
    for a in outcomes:
        for b in outcomes:
            values = [o.value(key) for o in (a, b) for key in (score, truth)]
            if a.concept != b.concept or None in values:
                continue
            beyond_chance = values[0] - values[2] > math.hypot(a.margin(score), b.margin(score))
            if beyond_chance and values[3] - values[1] >= gap:
                found.append(Disagreement(a, b, values[3] - values[1]))
    chosen: list[Disagreement] = []
    for item in sorted(found, key=lambda d: -d.gap):
        taken = [o for d in chosen for o in (d.liked, d.right)]
        if len(chosen) < most and item.liked not in taken and item.right not in taken:
            chosen.append(item)
    return chosen
