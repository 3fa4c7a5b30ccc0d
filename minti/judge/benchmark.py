"""How well a learned word works: the two scores of the paper (Gal et al. 2022, arXiv 2208.01618, section 5).

A `Benchmark` holds what the words for one concept are compared with: its photos and the prompts.
`evaluate_word` makes pictures with a word and scores them; `python -m minti.evaluate` does so for files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from ..model.stable_diffusion import StableDiffusion
from .picture_jobs import PAPER, OnStep, PictureJob, PictureStore, Protocol, file_name, models_of, prompt_job
from .prompts import PromptList, fill
from .scorer import Scorer
from .scores import Score, bootstrap, clip_i, clip_t, clip_t_pairwise, combine, image_only

Statistic = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PromptScores:
    """The scores of one prompt. The prompt for reconstruction has no CLIP-T."""

    prompt: str
    group: str
    num_images: int
    clip_i: Score
    clip_t: Score | None
    clip_t_pairwise: Score | None


@dataclass(frozen=True)
class Evaluation:
    """The scores of one way of asking for the concept.

    Attributes:
        name: the word, "step 500", a caption, ...
        kind: "word", "caption", "image only" or "prompt only".
        clip_i: CLIP-I of the pictures of the prompt for reconstruction.
        clip_t, clip_t_pairwise: means over the other prompts; None if there are no others.
        prompts: the scores of each prompt, the one for reconstruction first.
        tradeoff: what the function `tradeoff` returns.
    """

    name: str
    kind: str
    clip_i: Score
    clip_t: Score | None
    clip_t_pairwise: Score | None
    prompts: Sequence[PromptScores] = ()
    tradeoff: Score | None = None


@dataclass
class Benchmark:
    """What the words for one concept are compared with.

    Attributes:
        photos: (M, P) embeddings of unit length.
        prompts: the prompts that words are tried in.
        texts: prompt -> (P,) embedding of its text without the word, for all prompts but the one for
            reconstruction.
    """

    photos: Tensor
    prompts: PromptList
    texts: Mapping[str, Tensor] = field(repr=False)

    @classmethod
    def make(cls, scorer: Scorer, photos: Iterable[Image.Image], prompts: PromptList) -> Benchmark:
        """Embed the photos, RGB and of any size, and the prompts."""
        templates = [prompt.text for prompt in prompts.prompts]
        texts = scorer.embed_texts([fill(t, "") for t in templates]) if templates else ()
        return cls(scorer.embed_images(photos), prompts, dict(zip(templates, texts, strict=True)))

    def score(
        self, measured: Mapping[str, Mapping[str, Tensor]], name: str, kind: str = "word", seed: int = 0
    ) -> Evaluation:
        """The scores of pictures.

        Args:
            measured: what `Scorer.measure` says of the pictures of every template of `prompts`.
            name, kind: those of the evaluation.
            seed: of the draws for the intervals; see `scores.bootstrap`.
        """

        embeddings = {template: found["embeddings"] for template, found in measured.items()}

        def score(statistic: Statistic, templates: Sequence[str]) -> Score | None:
            other = {t: self.photos if statistic is clip_i else self.texts[t] for t in templates}
            terms = [(partial(statistic, embeddings[t], other[t]), len(embeddings[t])) for t in templates]
            return bootstrap(terms, seed) if terms else None

        groups = {prompt.text: prompt.group for prompt in self.prompts.prompts}
        prompts = []
        for template in self.prompts.templates:
            edited = [template] if template in self.texts else []
            scores = score(clip_i, [template]), score(clip_t, edited), score(clip_t_pairwise, edited)
            group, count = groups.get(template, "reconstruction"), len(embeddings[template])
            prompts.append(PromptScores(template, group, count, *scores))
        edits = list(self.texts)
        mean = score(clip_t, edits), score(clip_t_pairwise, edits)
        return Evaluation(name, kind, score(clip_i, [self.prompts.reconstruction]), *mean, prompts)

    def image_only(self) -> Evaluation:
        """The scores of the photos themselves, as if they had been generated for every prompt.

        CLIP-I is of pairs of different photos.
        """
        uniform = torch.full((1, len(self.photos)), 1 / len(self.photos))

        def mean(statistic: Statistic) -> Score | None:
            values = [statistic(self.photos, text, uniform) for text in self.texts.values()]
            return Score(torch.cat(values).mean().item()) if values else None

        reconstruction = Score(image_only(self.photos))
        return Evaluation("image only", "image only", reconstruction, mean(clip_t), mean(clip_t_pairwise))


def word_jobs(
    sd: StableDiffusion,
    prompts: PromptList,
    word: str,
    protocol: Protocol,
    inputs: Mapping[str, str],
    *,
    name: str | None = None,
) -> dict[str, PictureJob]:
    """The pictures that an evaluation of a word needs, by prompt.

    Args:
        word: a word that `sd` knows, or any text in its place: a caption, or "" for no word at all.
        inputs: what pictures and measurements depend on beside prompt and protocol; see `models_of`.
        name: the name of the folder in a store; by default made of the word.

    Raises:
        InputError: a prompt has no room for the word.
    """
    own = word if name is None else name
    return {t: prompt_job(sd, fill(t, word), protocol, inputs, job_name(own, t)) for t in prompts.templates}


def job_name(word: str, template: str) -> str:
    """The name under which a store keeps the pictures of a word, or of a text in its place, in a prompt."""
    return f"{file_name(word)}/{file_name(template)}"


def evaluate_word(
    sd: StableDiffusion,
    scorer: Scorer,
    benchmark: Benchmark,
    word: str,
    protocol: Protocol = PAPER,
    *,
    name: str | None = None,
    kind: str = "word",
    store: PictureStore | None = None,
    on_step: OnStep = lambda: None,
) -> Evaluation:
    """Make pictures with a word in every prompt of a benchmark, and score them.

    Args:
        word: see `word_jobs`.
        name, kind: those of the evaluation; by default the word is the name.
        store: keeps the pictures; what is finished in it is not made again.
        on_step: called after each step of each batch.
    """
    jobs = word_jobs(sd, benchmark.prompts, word, protocol, models_of(sd, scorer), name=name)
    measured = {template: job.measure(scorer.measure, store, on_step) for template, job in jobs.items()}
    return benchmark.score(measured, word if name is None else name, kind, protocol.seed)


def tradeoff(evaluation: Evaluation, image_only: Evaluation, prompt_only: Evaluation) -> Score | None:
    """One number for reconstruction and editability: their harmonic mean, on the scale of the references.

    CLIP-I and CLIP-T have different ranges. So each is measured from the reference that ignores it (0) to the
    reference that ignores the other (1): CLIP-I from Prompt Only to Image Only, CLIP-T from Image Only to
    Prompt Only. The harmonic mean is small where either is, so each reference has 0; half way on both is 0.5.

    Returns:
        The score; None if a CLIP-T is missing, or if the references are not in this order.
    """
    if not (evaluation.clip_t and image_only.clip_t and prompt_only.clip_t):
        return None
    worst, best = prompt_only.clip_i.value, image_only.clip_i.value
    deaf, faithful = image_only.clip_t.value, prompt_only.clip_t.value
    if best <= worst or faithful <= deaf:
        return None

    def harmonic(i: Tensor, t: Tensor) -> Tensor:
        r = ((i - worst) / (best - worst)).clamp(min=0)
        e = ((t - deaf) / (faithful - deaf)).clamp(min=0)
        return 2 * r * e / (r + e).clamp(min=1e-12)

    return combine(harmonic, [evaluation.clip_i, evaluation.clip_t])


def with_tradeoffs(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """The evaluations with their trade-offs, if both references are among them."""
    references = {e.kind: e for e in evaluations if e.kind in ("image only", "prompt only")}
    if len(references) < 2:
        return list(evaluations)
    both = references["image only"], references["prompt only"]
    return [replace(e, tradeoff=tradeoff(e, *both)) for e in evaluations]


def best(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """The word with the highest trade-off, or the only word; None if there is no trade-off to compare."""
    words = [e for e in evaluations if e.kind == "word"]
    scored = [e for e in words if e.tradeoff is not None]
    return words[0] if len(words) == 1 else max(scored, key=lambda e: e.tradeoff.value, default=None)
