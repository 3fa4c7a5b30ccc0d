"""How well a learned word works: the two scores of the paper (arXiv 2208.01618, section 5).

A `Benchmark` holds what words for one concept are measured by, its photos and the prompts; `evaluate_word`
makes pictures with a word and scores them. `python -m minti.evaluate` does it for files, see `evaluate.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from ..model.stable_diffusion import StableDiffusion
from .picture_jobs import PAPER, Job, Protocol, Store, Tick, file_name, models, prompt_job
from .prompts import PromptList, fill
from .scorer import Scorer
from .scores import Score, bootstrap, clip_i, clip_t, clip_t_pairwise, combine, image_only

Statistic = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """The scores of one prompt. That for reconstruction has no CLIP-T."""

    prompt: str
    group: str
    num_images: int
    clip_i: Score
    clip_t: Score | None
    clip_t_pairwise: Score | None


@dataclass(frozen=True)
class Evaluation:
    """What became of one way of asking for the concept.

    Attributes:
        name: the word, "step 500", a caption, ...
        kind: "word", "caption", "image only" or "prompt only".
        clip_i: of the pictures of the reconstruction prompt.
        clip_t, clip_t_pairwise: mean over the other prompts; None if there are none.
        rows: each prompt by itself, the one for reconstruction first.
        tradeoff: see the function of that name.
    """

    name: str
    kind: str
    clip_i: Score
    clip_t: Score | None
    clip_t_pairwise: Score | None
    rows: Sequence[Row] = ()
    tradeoff: Score | None = None


@dataclass
class Benchmark:
    """What words for one concept are measured by.

    Attributes:
        photos: (M, P) embeddings, of unit length.
        prompts: see `PromptList`.
        texts: prompt -> (P,) embedding of what is left of it without the word; not of the reconstruction's.
    """

    photos: Tensor
    prompts: PromptList
    texts: Mapping[str, Tensor] = field(repr=False)

    @classmethod
    def make(cls, scorer: Scorer, photos: Iterable[Image.Image], prompts: PromptList) -> Benchmark:
        """Embed photos, RGB and of any size, and prompts."""
        templates = [prompt.text for prompt in prompts.prompts]
        texts = scorer.embed_texts([fill(t, "") for t in templates]) if templates else ()
        return cls(scorer.embed_images(photos), prompts, dict(zip(templates, texts, strict=True)))

    def score(
        self, embeddings: Mapping[str, Tensor], name: str, kind: str = "word", seed: int = 0
    ) -> Evaluation:
        """Scores of pictures.

        Args:
            embeddings: prompt -> (N, P) pictures of it, for every template of `prompts`.
            seed: of the bootstrap.
        """

        def score(statistic: Statistic, templates: Sequence[str]) -> Score | None:
            other = {t: self.photos if statistic is clip_i else self.texts[t] for t in templates}
            terms = [(partial(statistic, embeddings[t], other[t]), len(embeddings[t])) for t in templates]
            return bootstrap(terms, seed) if terms else None

        rows = []
        groups = {prompt.text: prompt.group for prompt in self.prompts.prompts}
        for template in self.prompts.templates:
            edited = [template] if template in self.texts else []
            scores = score(clip_i, [template]), score(clip_t, edited), score(clip_t_pairwise, edited)
            rows.append(
                Row(template, groups.get(template, "reconstruction"), len(embeddings[template]), *scores)
            )
        edits = list(self.texts)
        mean = score(clip_t, edits), score(clip_t_pairwise, edits)
        return Evaluation(name, kind, score(clip_i, [self.prompts.reconstruction]), *mean, rows)

    def image_only(self) -> Evaluation:
        """The photos as if they had been generated, whatever the prompt. Pairs are of different photos."""
        uniform = torch.full((1, len(self.photos)), 1 / len(self.photos))

        def mean(statistic: Statistic) -> Score | None:
            values = [statistic(self.photos, text, uniform) for text in self.texts.values()]
            return Score(torch.cat(values).mean().item()) if values else None

        reconstruction = Score(image_only(self.photos))
        return Evaluation("image only", "image only", reconstruction, mean(clip_t), mean(clip_t_pairwise))


def word_jobs(
    sd: StableDiffusion,
    scorer: Scorer,
    prompts: PromptList,
    word: str,
    protocol: Protocol = PAPER,
    *,
    name: str | None = None,
) -> dict[str, Job]:
    """The pictures that an evaluation of a word needs, by prompt; for `Job.embed`, in any order or process.

    Args:
        word: a word that `sd` knows, or any text in its place: a caption, or "" for no word at all.
        name: its folder in a store; by default made of the word.

    Raises:
        InputError: a prompt has no room for the word.
    """
    folder, about = file_name(word if name is None else name), models(sd, scorer)
    return {
        t: prompt_job(sd, fill(t, word), protocol, about, f"{folder}/{file_name(t)}")
        for t in prompts.templates
    }


def evaluate_word(
    sd: StableDiffusion,
    scorer: Scorer,
    benchmark: Benchmark,
    word: str,
    protocol: Protocol = PAPER,
    *,
    name: str | None = None,
    kind: str = "word",
    store: Store | None = None,
    tick: Tick = lambda: None,
) -> Evaluation:
    """Make pictures with a word in every prompt of a benchmark, and score them.

    Args:
        word, name: see `word_jobs`; the name is also that of the evaluation.
        store: keeps the pictures; what is finished there is not made again.
        tick: called after each step of each batch.
    """
    jobs = word_jobs(sd, scorer, benchmark.prompts, word, protocol, name=name)
    embeddings = {template: job.embed(scorer, store, tick) for template, job in jobs.items()}
    return benchmark.score(embeddings, word if name is None else name, kind, protocol.seed)


def tradeoff(evaluation: Evaluation, image_only: Evaluation, prompt_only: Evaluation) -> Score | None:
    """One number for reconstruction and editability: their harmonic mean, on the scale of the references.

    CLIP-I and CLIP-T have ranges of their own, in which a hundredth may be much or little. So each is
    measured from the reference that ignores it (0) to the one that cares for nothing else (1): CLIP-I from
    Prompt Only to Image Only, CLIP-T from Image Only to Prompt Only. The harmonic mean is small where either
    is, so that neither reference scores more than 0; half way on both is 0.5. None if the references span no
    scale.
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
    """The word with the best trade-off, or the only word; None if nothing tells which of them is better."""
    words = [e for e in evaluations if e.kind == "word"]
    scored = [e for e in words if e.tradeoff is not None]
    return words[0] if len(words) == 1 else max(scored, key=lambda e: e.tradeoff.value, default=None)
