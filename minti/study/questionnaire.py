"""Asking people: one page with the two questionnaires of the paper (arXiv 2208.01618, section 5.4).

In the first, people see photos of a concept and rank pictures, one of each setup, by their likeness to the
photos. In the second they rank pictures by their likeness to a text. Which setup made which picture is not in
the page: it is in the key, a file that stays in the folder of the study. `answers.py` puts both together.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from itertools import zip_longest
from pathlib import Path

from PIL import Image

from ..cli.html import page, source
from ..cli.images import thumbnails
from ..errors import InputError
from ..formats.atomic import write_atomically
from ..formats.photos import load_photos
from ..judge.benchmark import job_name
from ..judge.picture_jobs import PictureStore
from ..judge.prompts import fill
from .recipe import StudyPlan

FOLDER = "questionnaire"  # in the folder of a study
MOST_SETUPS, PHOTOS = 5, 4  # pictures to rank, and photos to compare them with
ASKED = {
    "photos": "Which pictures are most like these photos? Choose the best first, the worst last.",
    "text": "Which pictures fit this text best, whatever “…” is? Choose the best first, the worst last.",
}
TITLE = "Pictures to put in order"
HELP = (
    "Tap the pictures in your order, or type their letters; a second time takes a picture out of the order. "
    "The arrow keys turn the pages. Your answers stay in this browser until you save them at the end."
)
END = """<section><h2 tabindex=-1>Thank you</h2>
<p>Save your answers as a file, and send it to whoever asked you.</p>
<p><button type=button id=save>Save the answers</button> <a hidden></a></p>
<p>If no file appears, send this text: <textarea readonly aria-label="The answers"></textarea></p>
<p><button type=button id=anew>Begin anew, for another person</button></p></section>"""


@dataclass(frozen=True)
class Question:
    """Pictures to be ranked.

    Attributes:
        kind: one of ASKED.
        prompt: what the pictures were made from, with {} for the concept.
        picture: which of the pictures of this prompt, from 0; all setups began it with the same noise.
        setups: their names, in the order in which their pictures are shown.
        jobs: the names of their pictures in the store.
    """

    kind: str
    concept: str
    prompt: str
    picture: int
    setups: Sequence[str]
    jobs: Sequence[str]


def choose_setups(plan: StudyPlan, wanted: Sequence[str]) -> list[str]:
    """The setups to compare: those that are wanted, or the first ones. Raises InputError."""
    known = list(dict.fromkeys(request.name for request in plan.requests))
    for name in wanted:
        if name not in known:
            raise InputError(f"--setup {name}: no setup is called so; there are {', '.join(known)}")
    chosen = list(dict.fromkeys(wanted)) or known[:MOST_SETUPS]
    if not 2 <= len(chosen) <= MOST_SETUPS:
        raise InputError(f"--setup: {len(chosen)} setups, where people can rank 2 to {MOST_SETUPS}")
    return chosen


def draw_questions(plan: StudyPlan, setups: Sequence[str], count: int, seed: int) -> list[Question]:
    """`count` questions of each kind, or as many as there are pictures for; all order is that of the seed."""
    rng, questions = random.Random(seed), []
    for kind in ASKED:
        cases = []
        for concept in plan.concepts:
            prompts = plan.prompts[concept.name]
            asked = [prompts.reconstruction] if kind == "photos" else [p.text for p in prompts.prompts]
            own = [(concept.name, p, i) for p in asked for i in range(plan.protocol.num_images)]
            cases.append(rng.sample(own, len(own)))
        turns = [case for turn in zip_longest(*cases) for case in turn if case]  # concepts in turn
        for concept, prompt, picture in turns[:count]:
            order = rng.sample(setups, len(setups))
            jobs = []
            for name in order:  # of repeated words and several captions any one
                same = [r for r in plan.requests if (r.concept.name, r.name) == (concept, name)]
                jobs.append(job_name(rng.choice(same).key, prompt))
            questions.append(Question(kind, concept, prompt, picture, order, jobs))
    return questions


def write_questionnaire(
    folder: Path, plan: StudyPlan, wanted: Sequence[str] = (), count: int = 10, seed: int = 0
) -> Path:
    """Write a questionnaire and its key into the folder of a finished study, and return the path of the page.

    Both are called by what they show, so that no questionnaire replaces another one.

    Raises:
        InputError: a setup is unknown, or pictures are damaged.
    """
    setups = choose_setups(plan, wanted)
    questions, store = draw_questions(plan, setups, count, seed), PictureStore(folder / "pictures")
    photos = {c.name: thumbnails([p.open() for p in load_photos(c.images)[:PHOTOS]]) for c in plan.concepts}
    parts = []
    for i, question in enumerate(questions, 1):
        pictures = [store.thumbnails(job)[question.picture] for job in question.jobs]
        parts.append(_section(i, question, photos[question.concept], pictures))
    digest = hashlib.sha256("".join(parts).encode()).hexdigest()[:12]
    style, script = (
        Path(__file__).with_name(f"questionnaire.{kind}").read_text("utf-8") for kind in ("css", "js")
    )
    buttons = "<button type=button>Back</button><output></output><button type=button>Next</button>"
    body = f"<h1>{TITLE}</h1><p class=soft>{HELP}</p>"
    body += f"<main data-id={digest}>{''.join(parts)}{END}</main><nav>{buttons}</nav>"
    key = {"seed": seed, "setups": setups, "questions": [asdict(question) for question in questions]}
    path = folder / FOLDER / f"{digest}.html"
    write_atomically(path.with_suffix(".json"), json.dumps(key, indent=1, ensure_ascii=False).encode())
    write_atomically(path, page(TITLE, [body], style=style, script=script).encode())
    return path


def _section(
    number: int, question: Question, photos: Sequence[Image.Image], pictures: Sequence[Image.Image]
) -> str:
    shown = f"<blockquote>{escape(fill(question.prompt, '…'))}</blockquote>"
    if question.kind == "photos":
        shown = f"<div class=photos>{''.join(_image(photo, 'A photo') for photo in photos)}</div>"
    choices = ""
    for letter, picture in zip("ABCDE", pictures, strict=False):
        image = _image(picture, f"Picture {letter}")
        choices += f"<button type=button class=choice>{image}<span>{letter}</span><b></b></button>"
    heading = f"<h2 tabindex=-1>Question {number}</h2><p>{ASKED[question.kind]}</p>"
    return f"<section hidden>{heading}{shown}<div class=choices>{choices}</div></section>\n"


def _image(image: Image.Image, alt: str) -> str:
    return f'<img src="{source(image)}" width={image.width} height={image.height} alt="{alt}">'
