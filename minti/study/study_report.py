"""What a study leaves: study.json, strips of pictures, and report.html, which needs no network or script."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..cli.html import page, picture, table
from ..cli.images import encode_png, image_grid, thumbnails
from ..formats.atomic import write_atomically
from ..formats.photos import load_photos
from ..judge.picture_jobs import PictureJob, PictureStore, file_name
from ..judge.prompts import PromptList
from ..judge.results import SCORES, score_plot, score_point
from .answers import PEOPLE, People, people_table
from .applications import applications_table
from .recipe import StudyPlan
from .summary import Outcome, claim_numbers, disagreements, rank_correlation

STRIP = 4, 8  # pictures in a strip: of the prompt for reconstruction, and of others
WIDE = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
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
SETS = {
    "final": "of the final set: no default was chosen by looking at them.",
    "development": "of the development set: defaults were chosen by them; these are not numbers to report.",
}
QUICK = "A quick look, with 40 % of the steps, few pictures, prompts and concepts: not to be reported."
_PLOT = (
    "Every point is a mean over concepts; higher is closer to the photos, further right closer to the "
    "prompts. The bars are 95 % confidence intervals (bootstrap with Student's t). With --repeats 2 or more "
    "they count other pictures and words learned anew. Otherwise every word was learned once: they count "
    "only other pictures of the same words, and a word that is learned again may lie outside. They never "
    "count other concepts."
)
_CLAIMS = (
    "A claim holds, or does not hold, if the difference is larger than its margin, which is half of its 95 % "
    "confidence interval; otherwise it is too close to tell. “At least” and “at most” allow for nothing more."
)
_SCORES = (
    "CLIP-I: mean cosine of pictures and photos. CLIP-T: cosine of the mean picture and the prompt without "
    "the word (the paper's definition); pairwise: mean cosine of each picture and that prompt (the paper's "
    "code). Trade-off: harmonic mean of both on the scale of the references, 0 to 1. Length: of the learned "
    "vectors, in mean lengths of the vocabulary's. ± is half of the 95 % confidence interval. "
)
_TRUTH = (
    "Right attributes and edits done are what these scores are to estimate: how often a classifier that was "
    "trained on this world finds the shape, colours and pattern of the concept, and the background, style or "
    "colour that a prompt asks for. It does not judge sizes, nor pictures of two things. Its own errors show "
    "in the row “image only”, which is what it makes of the photos themselves."
)
_MISLEADS = "The classifier knows what is in the pictures; CLIP has an opinion. Image Only is left out here."
_EACH = (
    "A caption may get all colours right and never the shape. So here is each attribute by itself, in "
    "pictures of all prompts that do not ask for another; exchanged colours count as wrong."
)
_APPLICATIONS = (
    "What the classifier reads in pictures of each application: the share of pictures, or of facts."
)
_PICTURES = "The pictures are not chosen: they are always those of the first seeds."


@dataclass(frozen=True)
class Report:
    """What a study came to.

    Attributes:
        rows: the means over concepts of the `outcomes`.
        claims: what `summary.judge_claims` returns.
        jobs: the pictures of each request of the plan.
        accuracy: how often the classifier is right; see `classifier.Judge`.
        settings: how the study was made.
        people: how people rank the setups.
        findings: what `applications.Trial.findings` returns, of all trials.
    """

    plan: StudyPlan
    rows: Sequence[Outcome]
    outcomes: Sequence[Outcome]
    claims: Sequence[Mapping[str, Any]]
    jobs: Sequence[Mapping[str, PictureJob]]
    accuracy: Mapping[str, float]
    settings: Mapping[str, Any]
    people: People | None = None
    findings: Sequence[Mapping[str, Any]] = ()

    def write(self, folder: Path, store: PictureStore) -> None:
        """Write study.json, strips/ and report.html. Raises OSError if that is not possible."""
        content = {
            "title": self.plan.title,
            "settings": self.settings,
            "sets": {concept.name: concept.set for concept in self.plan.concepts},
            "probe_accuracy": self.accuracy,
            "means": [row.as_json() for row in self.rows],
            "claims": self.claims,
            "people": self.people and asdict(self.people),
            "applications": list(self.findings),
            "outcomes": [outcome.as_json() for outcome in self.outcomes],
        }
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        write_atomically(folder / "study.json", text.encode())
        strips = self._write_strips(folder / "strips", store)
        shown = applications_table(self.findings, store.folder)
        write_atomically(folder / "report.html", self._html(strips, shown).encode(errors="replace"))

    def _write_strips(self, folder: Path, store: PictureStore) -> dict[tuple[str, ...], Path]:
        """Write photos and pictures side by side: of each concept, and of each (concept, name, note)."""
        images = {(c.name,): [p.open() for p in load_photos(c.images)] for c in self.plan.concepts}
        made = [outcome for outcome in self.outcomes if outcome.evaluation.kind != "image only"]
        for o, jobs in zip(made, self.jobs, strict=True):
            first, *others = strip_prompts(self.plan.prompts[o.concept])
            shown = [store.thumbnails(jobs[template].name)[0] for template in others]
            images[o.concept, o.name, o.note] = [*store.thumbnails(jobs[first].name)[: STRIP[0]], *shown]
        strips = {}
        for key, row in images.items():
            name = file_name(" ".join(key[1:])) if key[1:] else "photos"
            strips[key] = folder / key[0] / f"{name}.png"
            write_atomically(strips[key], encode_png(image_grid(thumbnails(row), len(row)), {}))
        return strips

    def _html(self, strips: Mapping[tuple[str, ...], Path], applications: str) -> str:
        judged = any(o.truth for o in self.outcomes)
        sections = [
            ("Reconstruction against editability", _PLOT, plot(self.rows)),
            ("What the sources say, and what came out", _CLAIMS, _claims(self.claims)),
            ("Scores", _SCORES + (_TRUTH + self._accuracy() if judged else ""), html_table(self.rows)),
            ("Applications", _APPLICATIONS, applications),
            ("What people say", PEOPLE, people_table(self.people, self.rows) if self.people else ""),
            ("Where CLIP misleads", _MISLEADS, self._misleads(strips) if judged else ""),
            ("Pictures", _PICTURES, self._pictures(strips)),
            ("Each concept by itself", "", self._concepts()),
            ("Settings", "", table([(escape(k), escape(str(v))) for k, v in self.settings.items()])),
        ]
        title = escape(self.plan.title)
        top = [f"<h1>{title}</h1>", *(f"<p>{escape(text)}</p>" for text in self._about())]
        return page(title, top, sections, WIDE)

    def _about(self) -> list[str]:
        """What kind of study this is, and how far it can be trusted."""
        texts = [self.plan.about] if self.plan.about else []
        for kind in dict.fromkeys(concept.set for concept in self.plan.concepts):
            names = ", ".join(concept.name for concept in self.plan.concepts if concept.set == kind)
            meaning = SETS.get(kind, "of no set: nothing is known about who has looked at them.")
            texts.append(f"Concepts: {names}, {meaning}")
        return [*texts, QUICK] if self.settings.get("quick") else texts

    def _accuracy(self) -> str:
        shares = ", ".join(f"{fact} {100 * share:.0f} %" for fact, share in self.accuracy.items())
        return f" Of fresh renderings of the concepts it reads right: {shares}." if shares else ""

    def _misleads(self, strips: Mapping[tuple[str, ...], Path]) -> str:
        own = [o for o in self.outcomes if o.evaluation.kind != "image only"]
        parts = []
        for score, truth, label, meaning in TRUE_PAIRS:
            rho = rank_correlation(own, score, truth)
            if rho is None:
                continue
            text = f"{label} ranks the ways of asking for a concept like the truth, how many {meaning}, "
            parts.append(f"<p>{text}with a rank correlation of {rho:.2f} (1: the same order).</p>")
            if truth == "kept":
                facts = dict.fromkeys(fact for row in self.rows if row.truth for fact in row.truth.facts)
                each = html_table(self.rows, [(fact, FACT_NAMES.get(fact, fact)) for fact in facts])
                parts.append(f"<p class=soft>{_EACH}</p>{each}")
            pairs = disagreements(own, score, truth)
            for a, b in pairs:
                liked, right = (f"“{_called(o)}” ({o.score(score).value:.3f})" for o in (a, b))
                shares = [f"{100 * o.score(truth).value:.0f} %" for o in (a, b)]
                text = f"{a.concept}: {label} puts {liked} above {right}, but "
                text += f"{shares[0]} {meaning}, and {shares[1]} with the other."
                rows = [picture(strips[o.concept, o.name, o.note], f"{o.concept}, {o.name}") for o in (a, b)]
                parts.append(f"<p class=warn>{escape(text)}</p>{''.join(rows)}")
            if not pairs:
                parts.append("<p>No pair is out of order beyond chance, and by a tenth of the truth.</p>")
        return "".join(parts)

    def _pictures(self, strips: Mapping[tuple[str, ...], Path]) -> str:
        parts = []
        for concept in self.plan.concepts:
            prompts = ", ".join(f"“{p}”" for p in strip_prompts(self.plan.prompts[concept.name]))
            rows = "".join(
                f"<tr><th scope=row>{escape(key[1])}{_small(key[2])}</th>"
                f"<td>{picture(strip, f'{concept.name}, {key[1]}')}</td></tr>"
                for key, strip in strips.items()
                if key[0] == concept.name and len(key) > 1
            )
            photos = picture(strips[(concept.name,)], f"The photos of {concept.name}", "The photos")
            parts.append(f"<h3>{escape(concept.name)} <small>({escape(concept.set)})</small></h3>{photos}")
            parts.append(f"<p class=soft>From left to right: {escape(prompts)}</p>")
            parts.append(f"<table class=strips>{rows}</table>")
        return "".join(parts)

    def _concepts(self) -> str:
        parts = []
        for concept in self.plan.concepts:
            own = [o for o in self.outcomes if o.concept == concept.name]
            heading = f"<h3>{escape(concept.name)} <small>({escape(concept.set)})</small></h3>"
            parts.append(f"{heading}{html_table(own)}{plot(own)}")
        return "".join(parts)


def strip_prompts(prompts: PromptList) -> list[str]:
    """The prompts whose pictures are shown: that for reconstruction, then some of each group in turns."""
    turns = [prompt.text for turn in zip_longest(*prompts.groups) for prompt in turn if prompt]
    return [prompts.reconstruction, *turns[: STRIP[1]]]


def plot(outcomes: Sequence[Outcome]) -> str:
    """Reconstruction against editability; the values spread out of one setup are joined."""
    families = [o.family for o in outcomes]
    points = [
        score_point(o.evaluation, o.family, o.evaluation.kind == "word" and families.count(o.family) > 1)
        for o in outcomes
        if o.evaluation.clip_t
    ]
    return f"<div class=plot>{score_plot(points)}</div>" if points else ""


def html_table(outcomes: Sequence[Outcome], columns: Sequence[tuple[str, str]] = COLUMNS) -> str:
    """The scores of each outcome.

    Args:
        columns: (score, heading) of each column; columns without any score are left out.
    """
    columns = [(key, head) for key, head in columns if any(o.score(key) for o in outcomes)]
    heads = [head for _, head in columns]
    lengths = any(o.length is not None for o in outcomes)
    if lengths:
        heads.append("length")
    lines = []
    for o in outcomes:
        cells = [_cell(o, key) for key, _ in columns]
        if lengths:
            cells.append("" if o.length is None else f"{o.length:.2f}")
        line = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f"<tr><th scope=row>{escape(o.name)}{_small(o.note)}</th>{line}</tr>")
    head = "".join(f"<th scope=col>{head}</th>" for head in heads)
    body = f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f"<div class=scroll><table class=scores>{body}</table></div>"


def _cell(outcome: Outcome, key: str) -> str:
    score = outcome.score(key)
    if score is None:
        return ""
    margin = score.margin
    if key in SCORES:
        value, half = f"{score.value:.3f}", "" if margin is None else f"{margin:.3f}"
    else:
        value, half = f"{100 * score.value:.0f} %", "" if margin is None else f"{100 * margin:.0f}"
    return f"{value} <small>± {half}</small>" if half else value


def _called(outcome: Outcome) -> str:
    word = outcome.evaluation.kind == "word" and outcome.note
    return f"{outcome.name}, {outcome.note}" if word else outcome.name


def _small(note: str) -> str:
    return f"<br><small>{escape(note)}</small>" if note else ""


def _claims(claims: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for claim in claims:
        style = {"holds": "holds", "does not hold": "fails"}.get(claim["verdict"], "soft")
        numbers = claim_numbers(claim, dict(COLUMNS)[claim["score"]])
        lines.append(
            f"<tr><td>{escape(claim['says'])}{_small(numbers)}</td>"
            f"<td class={style}><b>{escape(claim['verdict'])}</b></td></tr>"
        )
    return f"<table>{''.join(lines)}</table>" if lines else ""
