"""report.html of a study: one file that needs no network and runs no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ..cli.html import HEAD, STYLE, picture
from ..cli.svg import Point, scatter
from ..formats.atomic import write_atomically
from ..judge.results import SCORES
from .summary import Outcome, disagreements, rank_correlation

WIDE = """
body { max-width: 76rem; } .scroll { overflow-x: auto; } .scores td, .scores th { padding-right: .9rem; }
.scores thead th { vertical-align: bottom; white-space: normal; overflow-wrap: normal; }
.scores td { white-space: nowrap; }
.scores small { color: var(--soft); } .plot { max-width: 56rem; } .plot svg text { fill: var(--ink); }
.plot svg .bar { stroke-width: 1; } .holds { color: #009e73; } .fails { color: var(--mark); }
.strips { width: 100%; table-layout: fixed; } .strips th { width: 11rem; white-space: normal; }
.strips td { padding-right: 0; }
.strips figure { margin: 0; }
"""
COLUMNS = (
    ("clip_i", "CLIP-I, reconstruction"),
    ("clip_t", "CLIP-T, editability"),
    ("clip_t_pairwise", "CLIP-T, pairwise"),
    ("tradeoff", "trade-off"),
    ("kept", "right attributes"),
    ("kept_edited", "the same, when edited"),
    ("followed", "edits done"),
)
FACT_NAMES = {"noun": "shape", "color": "main color", "color2": "second color"}
TRUE_PAIRS = (
    ("clip_i", "kept", "CLIP-I", "of the concept's attributes are right"),
    ("clip_t_asked", "followed", "CLIP-T", "of what the prompts ask for is there"),
)


@dataclass(frozen=True)
class Report:
    """What there is to show.

    Attributes:
        about: paragraphs below the title.
        rows: the means over concepts; `outcomes`: what they are means of.
        claims: as `summary.judge_claims` returns them.
        photos: concept -> the file with its photos side by side; `strips`: (concept, name, note) -> pictures.
        strip_prompts: what the pictures of a strip show, for each concept.
        accuracy: of the classifier that knows the truth, see `probe.Judge`.
    """

    title: str
    about: Sequence[str]
    rows: Sequence[Outcome]
    outcomes: Sequence[Outcome]
    claims: Sequence[Mapping[str, Any]]
    sets: Mapping[str, str]
    photos: Mapping[str, Path]
    strips: Mapping[tuple[str, str, str], Path]
    strip_prompts: Mapping[str, Sequence[str]]
    accuracy: Mapping[str, float]
    settings: Mapping[str, Any]

    def write(self, path: Path) -> None:
        """Raises OSError if it cannot be written."""
        judged = any(o.truth for o in self.outcomes)
        sections = [
            ("Reconstruction against editability", _PLOT, plot(self.rows)),
            ("What the sources say, and what came out", _CLAIMS, _claims(self.claims)),
            ("Scores", _SCORES + (_TRUTH + self._accuracy()) * judged, table(self.rows)),
            ("Where CLIP misleads", _MISLEADS, self._misleads() if judged else ""),
            ("Pictures", _PICTURES, self._pictures()),
            ("Each concept by itself", "", self._concepts()),
            ("Settings", "", _settings(self.settings)),
        ]
        body = [f"<h1>{escape(self.title)}</h1>", *(f"<p>{escape(text)}</p>" for text in self.about)]
        for title, intro, content in sections:
            if content:
                text = f"<p class=soft>{escape(intro)}</p>" if intro else ""
                body.append(f"<section><h2>{title}</h2>{text}{content}</section>")
        head = f"{HEAD}<title>{escape(self.title)} · minti</title><style>{STYLE}{WIDE}</style></head>\n"
        html = f"{head}<body>{''.join(body)}</body></html>\n"
        write_atomically(path, html.encode(errors="replace"))

    def _accuracy(self) -> str:
        shares = ", ".join(f"{fact} {100 * share:.0f} %" for fact, share in self.accuracy.items())
        return f" Of fresh renderings of the concepts it reads right: {shares}." if shares else ""

    def _misleads(self) -> str:
        own = [o for o in self.outcomes if o.evaluation.kind != "image only"]
        parts = []
        for score, truth, label, meaning in TRUE_PAIRS:
            rho = rank_correlation(own, score, truth)
            if rho is None:
                continue
            text = f"{label} ranks the ways of asking for a concept like the truth, how many {meaning}, "
            parts.append(f"<p>{text}with a rank correlation of {rho:.2f} (1: the same order).</p>")
            if truth == "kept":
                parts.append(f"<p class=soft>{_EACH}</p>{self._each()}")
            pairs = disagreements(own, score, truth)
            for item in pairs:
                a, b = item.liked, item.right
                liked, right = (f"“{_called(o)}” ({o.score(score).value:.3f})" for o in (a, b))
                shares = [f"{100 * o.score(truth).value:.0f} %" for o in (a, b)]
                text = f"{a.concept}: {label} puts {liked} above {right}, but "
                text += f"{shares[0]} {meaning}, and {shares[1]} with the other."
                strips = [self._strip(o.concept, o.name, o.note) for o in (a, b)]
                parts.append(f"<p class=warn>{escape(text)}</p>{''.join(strips)}")
            if not pairs:
                parts.append("<p>No pair is out of order beyond chance, and by a tenth of the truth.</p>")
        return "".join(parts)

    def _each(self) -> str:
        facts = dict.fromkeys(fact for row in self.rows if row.truth for fact in row.truth.facts)
        return table(self.rows, [(fact, FACT_NAMES.get(fact, fact)) for fact in facts])

    def _strip(self, concept: str, name: str, note: str) -> str:
        path = self.strips.get((concept, name, note))
        return picture(path, f"{concept}, {name}") if path else ""

    def _pictures(self) -> str:
        parts = []
        for concept, path in self.photos.items():
            prompts = ", ".join(f"“{prompt}”" for prompt in self.strip_prompts[concept])
            rows = "".join(
                f"<tr><th scope=row>{escape(name)}{_small(note)}</th>"
                f"<td>{picture(strip, f'{concept}, {name}')}</td></tr>"
                for (owner, name, note), strip in self.strips.items()
                if owner == concept
            )
            parts.append(f"<h3>{escape(concept)} <small>({escape(self.sets[concept])})</small></h3>")
            parts.append(picture(path, f"The photos of {concept}", "The photos"))
            parts.append(f"<p class=soft>From left to right: {escape(prompts)}</p>")
            parts.append(f"<table class=strips>{rows}</table>")
        return "".join(parts)

    def _concepts(self) -> str:
        parts = []
        for concept in self.photos:
            own = [o for o in self.outcomes if o.concept == concept]
            parts.append(
                f"<h3>{escape(concept)} <small>({escape(self.sets[concept])})</small></h3>{table(own)}"
            )
            parts.append(plot(own))
        return "".join(parts)


_PLOT = (
    "Every point is a mean over concepts. Up: closer to the photos; right: closer to the prompts. The "
    "bars span 95 % intervals for other pictures, and with --repeats for words learned anew; otherwise the "
    "same word, learned again, may well lie outside. They say nothing about other concepts."
)
_CLAIMS = (
    "A difference within the margin may be chance. “At least” and “at most” allow for 15 % of the distance "
    "between Image Only and Prompt Only."
)
_SCORES = (
    "CLIP-I: mean cosine of pictures and photos. CLIP-T: cosine of the mean picture and the prompt "
    "without the word (the paper's definition); pairwise: mean cosine of each picture and it (the "
    "paper's code). Trade-off: harmonic mean of both on the scale of the references, 0 to 1. Length: of "
    "the learned vectors, in mean lengths of the vocabulary's. "
)
_TRUTH = (
    "Right attributes and edits done are the truth about them: how often a classifier that has been "
    "trained on this world finds the shape, colours and pattern of the concept, and the background, style "
    "or colour that a prompt asks for. It does not judge sizes, nor pictures of two things. "
    "Its own errors show in the row “image only”: that is what it makes of the photos themselves."
)
_MISLEADS = "The classifier knows what is in the pictures; CLIP has an opinion. Image Only is left out here."
_EACH = (
    "Attributes are not alike: a caption may get all colours right and never the shape. Each by itself, in "
    "pictures of all prompts that leave it alone; colours count only the right way round, main and second."
)
_PICTURES = "Not chosen: always the first seeds."


def plot(outcomes: Sequence[Outcome]) -> str:
    """Reconstruction against editability; the values spread out of one setup are joined."""
    families = [o.family for o in outcomes]
    points = []
    for o in outcomes:
        e = o.evaluation
        if not e.clip_t:
            continue
        joined = e.kind == "word" and families.count(o.family) > 1
        series = o.family if joined else "reference" if e.kind.endswith("only") else e.kind
        intervals = e.clip_t.interval, e.clip_i.interval
        points.append(Point(e.clip_t.value, e.clip_i.value, o.name, series, joined, *intervals))
    title = "Reconstruction against editability"
    svg = scatter(title, "editability, CLIP-T", "reconstruction, CLIP-I", points)
    return f"<div class=plot>{svg}</div>" * bool(svg)


def table(outcomes: Sequence[Outcome], columns: Sequence[tuple[str, str]] = COLUMNS) -> str:
    """The scores of each outcome, (key, heading) of each column; columns without any are left out."""
    columns = [(key, head) for key, head in columns if any(o.score(key) for o in outcomes)]
    lengths = any(o.length is not None for o in outcomes)
    heads = (
        "".join(f"<th scope=col>{head}</th>" for _, head in columns) + "<th scope=col>length</th>" * lengths
    )
    rows = []
    for o in outcomes:
        cells = "".join(f"<td>{_cell(o, key)}</td>" for key, _ in columns)
        cells += f"<td>{'' if o.length is None else f'{o.length:.2f}'}</td>" * lengths
        rows.append(f"<tr><th scope=row>{escape(o.name)}{_small(o.note)}</th>{cells}</tr>")
    body = f"<thead><tr><th></th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f"<div class=scroll><table class=scores>{body}</table></div>"


def _cell(outcome: Outcome, key: str) -> str:
    score = outcome.score(key)
    if score is None:
        return ""
    percent = key not in SCORES
    value = f"{100 * score.value:.0f} %" if percent else f"{score.value:.3f}"
    margin = f"{100 * score.margin:.0f}" if percent else f"{score.margin:.3f}"
    return value + f" <small>± {margin}</small>" * bool(score.interval)


def _called(outcome: Outcome) -> str:
    word = outcome.evaluation.kind == "word" and outcome.note
    return f"{outcome.name}, {outcome.note}" if word else outcome.name


def _small(note: str) -> str:
    return f"<br><small>{escape(note)}</small>" if note else ""


def _claims(claims: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for claim in claims:
        kind = {"holds": "holds", "does not hold": "fails"}.get(claim["verdict"], "")
        names = [c if isinstance(c, str) else ", ".join(c) for c in (claim["first"], claim["second"])]
        numbers = ""
        if None not in claim["values"]:
            head = dict(COLUMNS)[claim["score"]]
            a, b = claim["values"]
            margin = "" if claim["margin"] is None else f", ± {claim['margin']:.3f}"
            numbers = f"{head}: {names[0]} {a:.3f}, {claim['expect']} {names[1]} {b:.3f}{margin}"
        rows.append(
            f"<tr><td>{escape(str(claim['says']))}{_small(numbers)}</td><td class={kind or 'soft'}>"
            f"<b>{escape(claim['verdict'])}</b></td></tr>"
        )
    return f"<table>{''.join(rows)}</table>" * bool(rows)


def _settings(settings: Mapping[str, Any]) -> str:
    rows = [
        f"<tr><th scope=row>{escape(key)}</th><td>{escape(str(v))}</td></tr>" for key, v in settings.items()
    ]
    return f"<table>{''.join(rows)}</table>"
