"""The answers of people to a questionnaire, and their mean ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ..errors import InputError
from ..formats.json_checks import read_json
from ..judge.scores import NOTHING, Score, student_t
from .questionnaire import ASKED, FOLDER
from .summary import Outcome

BESIDE = {"photos": ("clip_i", "CLIP-I"), "text": ("clip_t", "CLIP-T")}  # the score that stands for an answer
PEOPLE = (
    "Mean rank of the picture of each setup among those that were shown together, by likeness to four photos "
    "and by likeness to a text; 1 is the best. The 95 % intervals (Student's t) count other respondents, and "
    "neither other pictures nor other questions."
)


@dataclass(frozen=True)
class MeanRank:
    """A mean over respondents; the margin is half of its 95 % interval, None where nothing is known of it."""

    value: float
    margin: float | None


@dataclass(frozen=True)
class People:
    """What people say.

    Attributes:
        respondents: how many they are.
        setups: how many pictures they ranked at a time.
        ranks: kind of question -> setup -> its mean rank; 1 is the best.
    """

    respondents: int
    setups: int
    ranks: Mapping[str, Mapping[str, MeanRank]]


def read_answers(study: Path, folder: Path) -> People:
    """The answers in a folder, as the questionnaires of a study save them: one file for each respondent.

    The rank of a setup is the mean over respondents of the mean over the questions of each, so that the
    interval counts other respondents (Student's t), and neither other questions nor other pictures.

    Raises:
        InputError: a file is damaged, incomplete, or there twice, or answers something else.
    """
    keys = {path.stem: path for path in (study / FOLDER).glob("*.json")}
    paths = [path for path in sorted(folder.glob("*.json")) if not path.name.startswith(".")]
    if not paths:
        raise InputError(
            f"{folder}: holds no answers, which are files like answers-1a2b.json; give --answers DIR"
        )
    respondents: dict[str, Path] = {}
    ranks: dict[str, dict[str, list[float]]] = {kind: {} for kind in ASKED}
    setups: list[str] = []
    for path in paths:
        raw = read_json(path)
        if (name := str(raw.get("questionnaire"))) not in keys:
            raise InputError(f"{path}: answers no questionnaire of {study}; move it to another folder")
        key = _read_key(keys[name])
        respondent, answers = raw.get("respondent"), raw.get("answers")
        if not isinstance(respondent, str) or not isinstance(answers, list):
            raise InputError(f"{path}: is damaged (no respondent, or no answers); have it sent again")
        if respondent in respondents:
            twin = respondents[respondent]
            raise InputError(f"{path}: is by the respondent of {twin}; remove one of the two")
        respondents[respondent] = path
        setups = setups or key["setups"]
        if sorted(setups) != sorted(key["setups"]):
            raise InputError(f"{path}: is about other setups than {paths[0]}; report them apart")
        for kind, own in _ranks(key["questions"], answers, path).items():
            for setup, values in own.items():
                ranks[kind].setdefault(setup, []).append(fmean(values))
    found = {kind: {name: _mean(own[name]) for name in setups if own} for kind, own in ranks.items()}
    return People(len(respondents), len(setups), found)


def _read_key(path: Path) -> dict[str, Any]:
    """The key of a questionnaire. Raises InputError if it is damaged."""
    key = read_json(path)
    try:
        shown = [question["setups"] for question in key["questions"] if question["kind"] in ASKED]
        if len(shown) == len(key["questions"]) and all(sorted(s) == sorted(key["setups"]) for s in shown):
            return key
    except (KeyError, TypeError):
        pass
    raise InputError(f"{path}: is damaged; make the questionnaire again, with the same options")


def _ranks(questions: Sequence[Mapping], answers: Sequence, path: Path) -> dict[str, dict[str, list[int]]]:
    """Kind of question -> setup -> its ranks in the answers of one respondent. Raises InputError."""
    if len(answers) != len(questions):
        raise InputError(f"{path}: is damaged ({len(answers)} answers to {len(questions)} questions)")
    ranks: dict[str, dict[str, list[int]]] = {kind: {} for kind in ASKED}
    for i, (question, order) in enumerate(zip(questions, answers, strict=True), 1):
        if not isinstance(order, list) or any(type(place) is not int for place in order):
            raise InputError(f"{path}: is damaged (answer {i} is no list of places)")
        if len(order) < len(question["setups"]):
            raise InputError(f"{path}: is incomplete, question {i} has no full answer; have it completed")
        if sorted(order) != list(range(len(question["setups"]))):
            raise InputError(f"{path}: is damaged (answer {i} is no order of the pictures)")
        for rank, place in enumerate(order, 1):
            ranks[question["kind"]].setdefault(question["setups"][place], []).append(rank)
    return ranks


def _mean(values: Sequence[float]) -> MeanRank:
    spread = stdev(values) if len(values) > 1 else 0.0
    margin = student_t(len(values) - 1) * spread / len(values) ** 0.5 if spread > NOTHING else None
    return MeanRank(fmean(values), margin)


def people_table(people: People, rows: Sequence[Outcome]) -> str:
    """The mean ranks of each setup, as HTML, beside the scores that are to stand for them."""
    heads, lines = "<th></th>", []
    for kind, (_, label) in BESIDE.items():
        heads += f"<th scope=col>rank by likeness to the {kind}</th><th scope=col>{label}</th>"
    for row in rows:
        if row.name in people.ranks["photos"]:
            cells = ""
            for kind, (score, _) in BESIDE.items():
                cells += _cell(people.ranks[kind].get(row.name), 2) + _cell(row.score(score), 3)
            lines.append(f"<tr><th scope=row>{escape(row.name)}</th>{cells}</tr>")
    count = f"<p>{people.respondents} respondents ranked {people.setups} pictures at a time.</p>"
    table = f"<table class=scores><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f"{count}<div class=scroll>{table}</div>"


def _cell(found: MeanRank | Score | None, digits: int) -> str:
    if found is None:
        return "<td></td>"
    margin = found.margin
    half = "" if margin is None else f" <small>± {margin:.{digits}f}</small>"
    return f"<td>{found.value:.{digits}f}{half}</td>"
