"""What a study has to show: scores from the pictures it made, study.json, and what report.html needs."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path

from PIL import Image

from ..cli.images import encode_png, image_grid, thumbnails
from ..formats.atomic import write_atomically
from ..formats.concept import Concept
from ..formats.photos import load_photos
from ..judge.benchmark import Benchmark, with_tradeoffs
from ..judge.picture_jobs import Job, Store, file_name
from ..judge.prompts import PromptList
from ..judge.results import table
from ..judge.scorer import Scorer
from ..model.stable_diffusion import StableDiffusion
from ..version import __version__
from .classifier import Judge, Truth
from .plan import Ask, Plan
from .report import Report
from .summary import Outcome, judge_claims, means
from .variants import Variant

log = logging.getLogger(__name__)


STRIP = 4, 8  # pictures of the prompt for reconstruction, and other prompts, in a row of the report


def score(
    sd: StableDiffusion,
    scorer: Scorer,
    judge: Judge | None,
    store: Store,
    plan: Plan,
    asked: Sequence[tuple[Ask, Mapping[str, Job]]],
    words: Mapping[Variant, tuple[str, Concept]],
) -> list[Outcome]:
    """Everything about one concept, from the pictures in the store."""
    target = asked[0][0].target
    photos = (photo.open() for photo in load_photos(target.images))
    benchmark = Benchmark.make(scorer, photos, plan.prompts[target.name])
    evaluations = [
        benchmark.score(
            {t: job.embed(scorer, store) for t, job in jobs.items()}, a.name, a.kind, plan.protocol.seed
        )
        for a, jobs in asked
    ]
    evaluations = with_tradeoffs([*evaluations, benchmark.image_only()])

    def truth(pictures: Mapping[str, Sequence[Image.Image]]) -> Truth | None:
        if judge is None or not target.facts:
            return None
        return judge.judge(pictures, target.facts, benchmark.prompts.reconstruction, plan.protocol.seed)

    typical = sd.vocabulary.float().norm(dim=1).mean().item()
    outcomes = []
    for (ask, jobs), evaluation in zip(asked, evaluations, strict=False):  # the last one is Image Only
        note, length, diverged = ask.note, None, False
        if ask.variant:
            concept = words[ask.variant][1]
            length = concept.vectors.norm(dim=1).mean().item() / typical
            last = int(concept.metadata["step"])
            diverged = last < ask.variant.settings.steps
            note = ", ".join(filter(None, [note, f"diverged after step {last}" * diverged]))
        pictures = {template: store.pictures(job) for template, job in jobs.items()}
        outcomes.append(Outcome(target.name, ask.family, evaluation, truth(pictures), note, length, diverged))
    shown = truth(dict.fromkeys(benchmark.prompts.templates, photos))
    return [*outcomes, Outcome(target.name, "image only", evaluations[-1], shown)]


def write_results(
    args: argparse.Namespace,
    out: Path,
    store: Store,
    plan: Plan,
    jobs: Sequence[Mapping[str, Job]],
    outcomes: Sequence[Outcome],
    clip: str,
    judge: Judge | None,
) -> None:
    """study.json, report.html, and the rows of pictures in it."""
    rows = means(outcomes)
    claims = judge_claims(plan.claims, rows)
    print(table([row.evaluation for row in rows]))
    for claim in claims:
        print(f"{claim['verdict']}: {claim['says']}")
    settings = {
        "recipe": args.recipe,
        "quick": args.quick,
        "repeats": args.repeats,
        "checkpoint": str(args.checkpoint),
        "clip": str(clip),
        "minti": __version__,
        "base": args.base or {},
        **{f"pictures: {key}": value for key, value in asdict(plan.protocol).items()},
        **{f"prompts of {name}": source for name, source in plan.prompt_names.items()},
    }
    sets = {target.name: target.set for target in plan.targets}
    content = {
        "title": args.title,
        "settings": settings,
        "setups": args.setups,
        "sets": sets,
        "probe_accuracy": judge.accuracy if judge else {},
        "means": [row.as_json() for row in rows],
        "claims": claims,
        "outcomes": [outcome.as_json() for outcome in outcomes],
    }
    write_atomically(out / "study.json", (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    photos, strips, prompts = {}, {}, {}
    for target in plan.targets:
        images = thumbnails(photo.open() for photo in load_photos(target.images))
        photos[target.name] = write_strip(out / "strips" / target.name / "photos.png", images)
        prompts[target.name] = strip_prompts(plan.prompts[target.name])
    made = [outcome for outcome in outcomes if outcome.evaluation.kind != "image only"]
    for outcome, some in zip(made, jobs, strict=True):
        pictures = {template: store.pictures(job) for template, job in some.items()}
        first, *others = strip_prompts(plan.prompts[outcome.concept])
        images = [*pictures[first][: STRIP[0]], *(pictures[template][0] for template in others)]
        path = out / "strips" / outcome.concept / f"{file_name(outcome.name + outcome.note)}.png"
        strips[outcome.concept, outcome.name, outcome.note] = write_strip(path, images)
    report = Report(
        title=str(args.title or Path(args.recipe).stem),
        about=about(args, plan),
        rows=rows,
        outcomes=outcomes,
        claims=claims,
        sets=sets,
        photos=photos,
        strips=strips,
        strip_prompts=prompts,
        accuracy=judge.accuracy if judge else {},
        settings=settings,
    )
    report.write(out / "report.html")
    log.info("report.html and study.json are in %s", out)


def about(args: argparse.Namespace, plan: Plan) -> list[str]:
    """What kind of study this is, and how far it can be trusted."""
    texts = [str(args.about)] if args.about else []
    for kind in dict.fromkeys(target.set for target in plan.targets):
        names = ", ".join(target.name for target in plan.targets if target.set == kind)
        texts.append(
            {
                "final": f"Concepts: {names}, of the final set: no default was chosen by looking at them.",
                "development": f"Concepts: {names}, of the development set: defaults were chosen by them, so "
                "that these numbers are not to be reported.",
            }.get(kind, f"Concepts: {names}, of no set: nothing is known about who has looked at them.")
        )
    if args.quick:
        texts.append(
            "A quick look, with 40 % of the steps that names speak of, and few pictures, prompts and "
            "concepts: not to be reported."
        )
    return texts


def strip_prompts(prompts: PromptList) -> list[str]:
    """The prompts whose pictures are shown: that for reconstruction, then some of each group in turns."""
    groups: dict[str, list[str]] = {}
    for prompt in prompts.prompts:
        groups.setdefault(prompt.group, []).append(prompt.text)
    turns = [text for turn in zip_longest(*groups.values()) for text in turn if text]
    return [prompts.reconstruction, *turns[: STRIP[1]]]


def write_strip(path: Path, images: Sequence[Image.Image]) -> Path:
    """Pictures side by side."""
    write_atomically(path, encode_png(image_grid(thumbnails(images), len(images)), {}))
    return path
