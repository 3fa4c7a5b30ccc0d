"""What a study comes to: means over concepts, claims put to the test, and where CLIP misleads."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations
from typing import Any

import numpy as np

from ..errors import InputError
from ..judge.benchmark import Evaluation
from ..judge.results import SCORES, as_json
from ..judge.scores import Score, combine, mean_of_words, mean_score
from .classifier import Truth
from .concepts import text_of

TRUTHS = ("kept", "kept_edited", "followed")
EXPECTED = {"above": 1, "at least": 1, "at most": -1}  # the sign of a difference that agrees with the claim


@dataclass(frozen=True)
class Outcome:
    """The scores of one request; or, if `concept` is "", their mean over concepts.

    Attributes:
        family: that of the request.
        note: the caption or the seed, and what went wrong; for a mean, what it is a mean of.
        length: mean length of the learned vectors, divided by that of the vocabulary's.
        diverged: whether learning broke off.
        repeats: for the mean of words, how many were learned for each concept, at least.
    """

    concept: str
    family: str
    evaluation: Evaluation
    truth: Truth | None = None
    note: str = ""
    length: float | None = None
    diverged: bool = False
    repeats: int = 0

    @property
    def name(self) -> str:
        return self.evaluation.name

    def score(self, name: str) -> Score | None:
        """One of SCORES or TRUTHS; a fact; or "clip_t_asked", CLIP-T of the prompts behind `followed`."""
        if name == "clip_t_asked":
            asked = self.truth.asked if self.truth else ()
            return mean_score([p.clip_t for p in self.evaluation.prompts if p.prompt in asked])
        if self.truth and name in self.truth.facts:
            return self.truth.facts[name]
        return getattr(self.truth if name in TRUTHS else self.evaluation, name, None)

    def as_json(self) -> dict[str, Any]:
        """All scores as plain numbers, rounded to six digits."""
        about = {"concept": self.concept, "family": self.family, "note": self.note, "length": self.length}
        truths = None
        if self.truth:
            scores = {name: self.score(name) for name in (*TRUTHS, *self.truth.facts)}
            truths = {name: score and round(score.value, 6) for name, score in scores.items()}
        return about | as_json(self.evaluation) | {"truth": truths}


def means(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """For each name the mean over concepts, and over the captions or the repeated words of each."""
    names: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        names.setdefault(outcome.name, []).append(outcome)
    result = []
    for same in names.values():
        concepts: dict[str, list[Outcome]] = {}
        for outcome in same:
            concepts.setdefault(outcome.concept, []).append(outcome)
        is_word = same[0].evaluation.kind == "word"

        mean = partial(_mean, list(concepts.values()), is_word)
        facts = {fact: mean(fact) for o in same if o.truth for fact in o.truth.facts}
        truths = [mean(name) for name in TRUTHS]
        lengths = [o.length for o in same if o.length is not None]
        result.append(
            Outcome(
                concept="",
                family=same[0].family,
                evaluation=replace(same[0].evaluation, prompts=(), **{name: mean(name) for name in SCORES}),
                truth=Truth(*truths, facts=facts) if any(truths) else None,
                note=_count(same, len(concepts)),
                length=sum(lengths) / len(lengths) if lengths else None,
                repeats=min(map(len, concepts.values())) if is_word else 0,
            )
        )
    return result


def _mean(concepts: Sequence[Sequence[Outcome]], is_word: bool, name: str) -> Score | None:
    """The mean of one score over the outcomes of each concept, as far as they have it."""
    groups = [[s for o in outcomes if (s := o.score(name)) is not None] for outcomes in concepts]
    groups = [group for group in groups if group]
    return mean_of_words(groups) if is_word else mean_score([s for group in groups for s in group])


def _count(same: Sequence[Outcome], concepts: int) -> str:
    """What a mean is taken of, for people."""
    parts = [f"{concepts} concept" if concepts == 1 else f"{concepts} concepts"]
    if len(same) != concepts:
        parts.append(f"{len(same)} {same[0].evaluation.kind}s")
    if diverged := sum(o.diverged for o in same):
        parts.append(f"{diverged} diverged")
    return ", ".join(parts)


# Claims
# ----------------------------------------------------------------------------------------------------------


def check_claims(claims: Any, names: Sequence[str]) -> None:
    """Raises InputError unless the `claims` of a recipe have the form that `judge_claims` takes."""
    if not isinstance(claims, list):
        raise InputError("claims: should be a list")
    for claim in claims:
        if not isinstance(claim, Mapping) or set(claim) != {"says", "first", "second", "score", "expect"}:
            raise InputError("claims: each needs says, first, second, score and expect, and nothing else")
        says = text_of(claim["says"], "claims: says")
        if str(claim["expect"]) not in EXPECTED or str(claim["score"]) not in (*SCORES, *TRUTHS):
            choices, scores = ", ".join(EXPECTED), ", ".join((*SCORES, *TRUTHS))
            raise InputError(f"claims: {says!r} should expect {choices}, of one of {scores}")
        for side in ("first", "second"):
            if not claim[side] or not isinstance(claim[side], str | list):
                raise InputError(f"claims: first and second of {says!r} should be names of setups")
            for name in _names(claim[side]):
                if name not in names:
                    known = ", ".join(sorted(names))
                    raise InputError(f"claims: no setup is called {name!r}; there are {known}")


def judge_claims(claims: Sequence[Mapping[str, Any]], rows: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Whether the numbers bear out what sources claim.

    A claim holds if the difference has the expected sign and is larger than its margin. It does not hold if
    the difference has the other sign and is larger than its margin. Otherwise it is too close to tell.

    Args:
        claims: {says, first, second, score, expect}: the score of `first` is "above" that of `second`, or "at
            least" or "at most" as high. Several names stand for their mean.
        rows: means.

    Returns:
        Each claim with the `values` of both sides; the `margin` of their difference, half of its 95 %
        confidence interval, or None if there is none; `for`, what the interval is for; and the `verdict`.
    """
    by_name = {row.name: row for row in rows}
    results = []
    for claim in claims:
        sides = [[by_name[name] for name in _names(claim[side])] for side in ("first", "second")]
        scores = [mean_score([row.score(claim["score"]) for row in side]) for side in sides]
        margin, verdict = None, "cannot be told"
        if None not in scores:
            difference = combine(operator.sub, scores)
            margin = difference.margin
            agreement = EXPECTED[claim["expect"]] * difference.value
            if margin is not None and abs(agreement) <= margin:
                verdict = "too close to tell"
            elif margin is not None:
                verdict = "holds" if agreement > 0 else "does not hold"
        repeated = all(row.repeats > 1 for side in sides for row in side if row.evaluation.kind == "word")
        scope = "words learned anew" if repeated else "other pictures of the same words"
        values = [score and score.value for score in scores]
        results.append({**claim, "values": values, "margin": margin, "for": scope, "verdict": verdict})
    return results


def claim_numbers(claim: Mapping[str, Any], label: str) -> str:
    """The numbers that a verdict rests on, in one line; "" if there are none."""
    if None in claim["values"]:
        return ""
    names = [", ".join(_names(claim[side])) for side in ("first", "second")]
    (a, b), margin = claim["values"], claim["margin"]
    interval = "" if margin is None else f"; difference {a - b:+.3f} ± {margin:.3f}, for {claim['for']}"
    return f"{label}: {names[0]} {a:.3f}, {claim['expect']} {names[1]} {b:.3f}{interval}"


def _names(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


# CLIP against the truth
# ----------------------------------------------------------------------------------------------------------


def rank_correlation(outcomes: Sequence[Outcome], score: str, truth: str) -> float | None:
    """Spearman's rank correlation of a score and the truth, mean over concepts; 1 for the same order."""
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
) -> list[tuple[Outcome, Outcome]]:
    """Where CLIP misleads most: pairs of one concept of which it prefers the first, and the second is right.

    Both differences are larger than their margins, that of the truth also than `gap`. The worst `most` pairs
    are returned; each outcome appears once at most.
    """
    found = []
    for a, b in permutations(outcomes, 2):
        liking, truths = ([o.score(key) for o in (a, b)] for key in (score, truth))
        if a.concept != b.concept or None in (*liking, *truths):
            continue
        liked, wrong = combine(operator.sub, liking), combine(operator.sub, truths[::-1])
        margins = liked.margin, wrong.margin
        if None not in margins and liked.value > margins[0] and wrong.value > max(gap, margins[1]):
            found.append((wrong.value, a, b))
    chosen: list[tuple[Outcome, Outcome]] = []
    for _, a, b in sorted(found, key=lambda pair: -pair[0]):
        taken = [outcome for pair in chosen for outcome in pair]
        if len(chosen) < most and a not in taken and b not in taken:
            chosen.append((a, b))
    return chosen
