"""A study at work: it learns the words of a plan, makes and measures pictures, and scores them."""

import hashlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..cli.processes import Processes
from ..cli.progress import Progress
from ..errors import InputError
from ..formats.concept import Concept
from ..formats.photos import load_photos
from ..inversion.optimizers import vocabulary_norm
from ..judge.benchmark import Benchmark, with_tradeoffs, word_jobs
from ..judge.picture_jobs import PictureJob, PictureStore, make_all, models_of
from ..judge.prompts import fill
from ..judge.scorer import Scorer
from ..model import kernels
from ..model.model_hash import model_hash
from ..model.stable_diffusion import StableDiffusion
from .answers import People
from .applications import Applications, Trial
from .classifier import Judge
from .concepts import ConceptSpec
from .learner import Learner
from .recipe import Request, StudyPlan
from .rivals import Rivals
from .study_report import Report
from .summary import Outcome, judge_claims, means
from .variants import Group, Variant, group_words
from .ways import PLAIN

log = logging.getLogger(__name__)


class Study:
    """A plan, the models that carry it out, and the folder for what they make.

    Args:
        judge: the classifier that knows the truth; None if the checkpoint has none.
        compiled: whether models are compiled first.
    """

    def __init__(
        self,
        plan: StudyPlan,
        sd: StableDiffusion,
        scorer: Scorer,
        judge: Judge | None,
        folder: Path,
        compiled: bool = False,
    ) -> None:
        self.plan, self.sd, self.scorer, self.judge = plan, sd, scorer, judge
        self.folder, self.compiled = folder, compiled
        self.learner = Learner(sd, folder, compiled, scorer)
        self.rivals, self.store = Rivals(sd, scorer, folder), PictureStore(folder / "pictures")
        self.words: dict[Variant, Concept] = {}  # those that are learned
        self.jobs: list[dict[str, PictureJob]] = []  # of each request
        self.trials: list[Trial] = []
        self._models = models_of(sd, scorer) | ({"probe": model_hash(judge.probe)} if judge else {})

    def made_of(self) -> dict[str, str]:
        """Hashes of the models and photos, which must not change when a study is continued."""
        return self._models | {f"photos of {c.name}": photos_hash(c.images) for c in self.plan.concepts}

    def check(self) -> None:
        """Raises InputError if any request cannot be carried out, before anything is written."""
        self.sd.schedule.timesteps(self.plan.protocol.steps)
        if self.plan.applications and not self.judge:
            raise InputError("applications: only a checkpoint with a probe/, as weights/tiny, can judge them")
        for concept in self.plan.concepts if self.judge else ():
            self.judge.check(concept.facts, concept.name)
        for request in self.plan.requests:
            if request.way.show_photos and not self.sd.image_prompter:
                text = "show_photos: the model is no unCLIP, so it sees no pictures; leave it out"
                raise InputError(f"setups: {request.family!r}: {text}")
            if request.variant:
                self.learner.check(request.variant)
            else:
                self._jobs_for(request, request.text)

    def learn(self, together: int, processes: Processes) -> None:
        """Learn every word that is not finished yet; every process takes its share of the batches.

        Args:
            together: how many words are learned in one batch, at most.
        """
        groups = self._groups(together, processes.world)
        prompts = sum(len(self.plan.prompts[r.concept.name].templates) for r in self.plan.requests)
        words, steps = sum(len(g.words) for g in groups), sum(g.settings.steps for g in groups)
        pictures = prompts * self.plan.protocol.num_images
        text = "%d words in %d batches of %d training steps in all; then up to %d pictures of %d steps each"
        log.info(text, words, len(groups), steps, pictures, self.plan.protocol.steps)
        mine = processes.share([group for group in groups if not self.learner.is_done(group)])
        steps = sum(self.learner.steps_left(group) for group in mine)
        with closing(Progress(steps, "step", estimate_after=10)) as progress:
            for i, group in enumerate(mine, 1):
                note = f"batch {i} of {len(mine)}: {len(group.words)} words"
                self.learner.learn(group, partial(progress.step, note))
        processes.wait()

    def _groups(self, together: int, world: int) -> list[Group]:
        """All words in batches. More repeats leave the batches of the earlier ones as they were."""
        groups = []
        for repeat in sorted({request.repeat for request in self.plan.requests}):
            variants = [r.variant for r in self.plan.requests if r.variant and r.repeat == repeat]
            share = -(-len({variant.trajectory for variant in variants}) // world)  # for every process
            groups += group_words(variants, min(together, share))
        return groups

    def make_pictures(self, processes: Processes) -> None:
        """Make and measure the pictures of every request, with the learned words."""
        names: dict[Variant, str] = {}
        for variant in dict.fromkeys(r.variant for r in self.plan.requests if r.variant):
            path = self.learner.path(variant)
            self.words[variant] = Concept.load(path)
            if not self.words[variant].metadata.get("step", "").isdecimal():
                raise InputError(
                    f"{path}: does not say when it was saved; remove it, to learn the word again"
                )
            names[variant] = f"<{variant.concept.name}#{len(names)}>"
            self.sd.add_concept(replace(self.words[variant], placeholder=names[variant]))
        asked = [(r, names[r.variant] if r.variant else r.text) for r in self.plan.requests]
        self.rivals.tune(asked, processes)
        if self.compiled:
            kernels.compile_denoiser(self.sd.unet)
        self.jobs = [self._jobs_for(request, word) for request, word in asked]
        every = [job for of_request in self.jobs for job in of_request.values()]
        make_all(every, self.measure, self.store, processes, self.plan.protocol.steps)
        if self.plan.applications:
            named = {r.concept: word for r, word in reversed(asked) if r.variant and r.way == PLAIN}
            how = self.plan.prompts, self.plan.protocol, self._models
            words = {concept: named[concept] for concept in self.plan.concepts if concept in named}
            applications = Applications(self.sd, self.judge, words, *how)
            self.trials = applications.trials(self.plan.applications)
            for trial in processes.share(self.trials):
                trial.job.measure(trial.measure, self.store)
                log.info("%s: %s", trial.application, trial.about)
            processes.wait()

    def _jobs_for(self, request: Request, word: str) -> dict[str, PictureJob]:
        """The pictures that a request needs. Those of "prompt only" are the same for all concepts."""
        prompts, protocol = self.plan.prompts[request.concept.name], self.plan.protocol
        if request.way.guidance is not None:
            protocol = replace(protocol, guidance_scale=request.way.guidance)
        jobs = word_jobs(self.sd, prompts, word, protocol, self._models, name=request.key)
        return {t: self.rivals.job(job, request, fill(t, word), protocol) for t, job in jobs.items()}

    def measure(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """What CLIP and the classifier say of pictures; see `picture_jobs.Measure`."""
        return self.scorer.measure(images) | (self.judge.measure(images) if self.judge else {})

    def outcomes(self, concept: ConceptSpec) -> list[Outcome]:
        """The outcomes of the requests for a concept, and that of Image Only, from what was measured."""
        plan, judge, seed = self.plan, self.judge, self.plan.protocol.seed
        photos = [photo.open() for photo in load_photos(concept.images)]
        benchmark = Benchmark.make(self.scorer, photos, plan.prompts[concept.name])
        mean_length = vocabulary_norm(self.sd)

        def outcome(family: str, evaluation: Any, readings: Mapping[str, Any], **more: Any) -> Outcome:
            truth = None
            if judge and concept.facts:
                truth = judge.truth(readings, concept.facts, benchmark.prompts.reconstruction, seed)
            return Outcome(concept.name, family, evaluation, truth, **more)

        requests = [
            (request, {template: self.store.load(job) for template, job in jobs.items()})
            for request, jobs in zip(plan.requests, self.jobs, strict=True)
            if request.concept is concept
        ]
        evaluations = [benchmark.score(found, r.name, r.kind, seed) for r, found in requests]
        *evaluations, image_only = with_tradeoffs([*evaluations, benchmark.image_only()])
        outcomes = []
        for (request, found), evaluation in zip(requests, evaluations, strict=True):
            notes, length, diverged = [request.note], None, False
            if request.variant:
                word = self.words[request.variant]
                length = word.vectors.norm(dim=1).mean().item() / mean_length
                last = int(word.metadata["step"])
                diverged = last < request.variant.settings.steps
                if diverged:
                    notes.append(f"diverged after step {last}")
            readings = {t: judge.readings(m) for t, m in found.items()} if judge else {}
            more = {"note": ", ".join(filter(None, notes)), "length": length, "diverged": diverged}
            outcomes.append(outcome(request.family, evaluation, readings, **more))
        shown = judge.read(photos) if judge else None
        readings = dict.fromkeys(benchmark.prompts.templates, shown)
        return [*outcomes, outcome("image only", image_only, readings)]

    def report(self, settings: Mapping[str, Any], people: People | None = None) -> Report:
        """Write report.html, study.json and strips of pictures.

        Args:
            settings: how the study was made, for the record.
            people: their answers to questionnaires.
        """
        shutil.rmtree(self.folder / "learning", ignore_errors=True)
        outcomes = [outcome for concept in self.plan.concepts for outcome in self.outcomes(concept)]
        rows = means(outcomes)
        claims = judge_claims(self.plan.claims, rows)
        accuracy = self.judge.accuracy if self.judge else {}
        settings = dict(settings)
        settings |= {f"pictures: {key}": value for key, value in asdict(self.plan.protocol).items()}
        settings |= {f"prompts of {name}": source for name, source in self.plan.prompt_names.items()}
        findings = [finding for trial in self.trials for finding in trial.findings(self.store)]
        report = Report(self.plan, rows, outcomes, claims, self.jobs, accuracy, settings, people, findings)
        report.write(self.folder, self.store)
        log.info("report.html and study.json are in %s", self.folder)
        return report


def photos_hash(images: Path) -> str:
    """A hash of the photos of a folder, with their masks and captions."""
    found = hashlib.sha256()
    for photo in load_photos(images):
        image = photo.open()
        mask = photo.open_mask(image.size).tobytes() if photo.mask_path else b""
        found.update(repr((image.size, photo.caption)).encode() + image.tobytes() + mask)
    return found.hexdigest()[:12]
