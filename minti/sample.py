"""python -m minti.sample: pictures from prompts."""

from __future__ import annotations

import argparse
import json
import logging
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .cli.command import run_command
from .cli.images import encode_png, image_grid
from .cli.model_options import load_model
from .cli.options import Options, number, size
from .cli.progress import Progress
from .cli.work_folder import to_yaml
from .errors import InputError
from .formats.atomic import write_atomically
from .formats.concept import Concept
from .judge.scorer import Scorer, choose_clip
from .model.stable_diffusion import StableDiffusion
from .model.tokenizer import replace_words
from .version import __version__

log = logging.getLogger(__name__)


def options() -> Options:
    """The command line."""
    opts = Options("minti.sample", "Make pictures with a Stable Diffusion checkpoint and learned words.")
    at_least_1 = number(int, 1)
    group = "what to make"
    opts.add(group, "--prompt", [], metavar="TEXT", help="what to show; give it again for more prompts")
    opts.add(group, "--negative-prompt", "", metavar="TEXT", help="what to steer away from")
    opts.add(
        group,
        "--concept",
        [],
        metavar="[WORD=]FILE",
        help="a learned word, renamed to WORD if given; repeatable",
    )
    opts.add(group, "--num-images", 4, type=at_least_1, metavar="N", help="pictures for each prompt")
    opts.add(
        group,
        "--seed",
        0,
        type=number(int, 0, 2**63 - 1),
        help="seed of the first; the next has seed + 1",
    )
    opts.add(group, "--size", type=size, metavar="PX|WxH", help="size in pixels; by default the model's own")
    opts.add(group, "--out", metavar="DIR", help="folder for the pictures")
    opts.add(group, "--overwrite", False, help="replace pictures of the same name")
    group = "how"
    opts.add(group, "--steps", 50, type=at_least_1, help="DDIM steps")
    opts.add(group, "--guidance-scale", 7.5, type=number(float, 0), help="how closely to follow the prompt")
    opts.add(group, "--eta", 0.0, type=number(float, 0, 1), help="0: deterministic, 1: as noisy as DDPM")
    opts.add(group, "--batch-size", 4, type=at_least_1, help="pictures at a time")
    group = "choosing"
    text = "make K candidates for every picture, and keep the one that CLIP finds closest to the prompt"
    opts.add(group, "--rank-by-clip", 1, type=at_least_1, metavar="K", help=text)
    opts.add_judge(group)
    opts.add_model()
    return opts


@dataclass(frozen=True)
class Job:
    """One picture to make."""

    prompt: str
    seed: int
    path: Path


def plan_jobs(prompts: Sequence[str], seed: int, num_images: int, out: Path) -> list[Job]:
    """Every picture and the file it goes to, `<prompt>-<seed>.png`; like names are numbered."""
    jobs, slugs = [], set()
    for prompt in prompts:
        slug = base = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:50].strip("-") or "picture"
        number = 1
        while slug in slugs:
            number += 1
            slug = f"{base}-no{number}"
        slugs.add(slug)
        jobs += [Job(prompt, seed + i, out / f"{slug}-{seed + i}.png") for i in range(num_images)]
    return jobs


def load_with_concepts(args: argparse.Namespace) -> tuple[StableDiffusion, dict[str, Concept]]:
    """The checkpoint with its learned words, (word -> concept)."""
    concepts, files = {}, {}
    for text in args.concept:
        word, equals, file = text.partition("=")
        if not equals or Path(text).exists():
            word, file = None, text
        for concept in [Concept.load(file, word)] if word else Concept.load_all(file):
            if concept.placeholder in concepts:
                raise InputError(
                    f"{file}: {concept.placeholder!r} is learned twice; rename one: --concept '<new>={file}'"
                )
            concepts[concept.placeholder], files[concept.placeholder] = concept, file
    sd = load_model(args)
    for word, concept in concepts.items():
        try:
            sd.add_concept(concept)
        except InputError as error:
            if concept.vectors.shape[1] != sd.text_encoder.config.hidden_size:
                raise InputError(f"{files[word]}: {error}") from None
            new = "<new>" if word.startswith("<") else f"<{word}>"
            raise InputError(f"{files[word]}: {error}: --concept '{new}={files[word]}'") from None
    return sd, concepts


def load_judge(args: argparse.Namespace, sd: StableDiffusion) -> Scorer:
    """The CLIP that chooses among candidates. Raises InputError if it cannot, or has no text to go by."""
    scorer = Scorer.load(
        choose_clip(args.clip, args.checkpoint), device=sd.device, tokenizer=args.clip_tokenizer
    )
    for prompt in args.prompt:
        if not any(c.isalnum() for c in replace_words(prompt, sd.tokenizer.placeholders)):
            raise InputError(f"--rank-by-clip: {prompt!r} says nothing but the learned word; add to it")
    return scorer


def choose(
    scorer: Scorer, learned: Iterable[str], candidates: Sequence[tuple[Job, Image.Image]]
) -> tuple[Job, Image.Image, float]:
    """Of pictures of one prompt the closest to it, learned words left out, and how close: the cosine."""
    text = replace_words(candidates[0][0].prompt, learned)
    images = scorer.embed_images([image for _, image in candidates])  # (K, P)
    cosines = images @ scorer.embed_texts([text])[0]
    return *candidates[int(cosines.argmax())], cosines.max().item()


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, make the pictures, write them one by one and a grid of all at the end."""
    args = options().parse(argv, required=["checkpoint", "prompt", "out"])
    out = Path(args.out)
    jobs = plan_jobs(args.prompt, args.seed, args.num_images * args.rank_by_clip, out)
    taken = [job.path for job in jobs if job.path.exists()]
    if taken and not args.overwrite:
        raise InputError(f"{taken[0]}: exists already; give another --out or --seed, or --overwrite")

    sd, concepts = load_with_concepts(args)
    width, height = sd.check_size(args.size)
    if (width, height) != sd.image_size:
        log.info(
            "%dx%d pixels: the model was trained on %dx%d, expect repetitions", width, height, *sd.image_size
        )
    sd.schedule.timesteps(args.steps)
    sd.tokenizer([*args.prompt, args.negative_prompt])  # complains now rather than later
    scorer = load_judge(args, sd) if args.rank_by_clip > 1 else None
    out.mkdir(parents=True, exist_ok=True)  # complains now
    if args.compile:
        sd.compile()

    settings = {key: getattr(args, key) for key in ("steps", "guidance_scale", "eta", "checkpoint", "dtype")}
    settings |= {"width": width, "height": height, "negative_prompt": args.negative_prompt}
    learned = {word: concept.digest for word, concept in concepts.items()}
    how = {
        "steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "eta": args.eta,
        "size": (width, height),
    }
    how |= {"negative_prompt": args.negative_prompt}
    batches = [jobs[i : i + args.batch_size] for i in range(0, len(jobs), args.batch_size)]
    progress = Progress(len(batches) * args.steps, "step")
    images, candidates, start = [], [], time.monotonic()
    try:
        for batch in batches:
            for x_t in sd.denoise([job.prompt for job in batch], [job.seed for job in batch], **how):
                latents = x_t
                progress.step()
            for candidate in zip(batch, sd.decode_latents(latents), strict=True):
                candidates.append(candidate)
                if len(candidates) < args.rank_by_clip:
                    continue
                (job, image), text = candidate, {}
                if scorer:
                    job, image, cosine = choose(scorer, sd.tokenizer.placeholders, candidates)
                    text = {"clip": f"{cosine:.4f}, best of {len(candidates)}"}
                candidates.clear()
                text |= {"prompt": job.prompt, "seed": str(job.seed), "settings": json.dumps(settings)}
                text |= {"concepts": json.dumps(learned), "software": f"minti {__version__}"}
                if not images:  # and nothing is written unless there is a picture
                    write_atomically(out / "config.yaml", to_yaml(vars(args), "minti.sample"))
                write_atomically(job.path, encode_png(image, text))
                images.append(image)
    finally:
        progress.close()
        if images:
            write_atomically(out / "grid.png", encode_png(image_grid(images, args.num_images), {}))
    log.info("%d pictures in %s (%.1f s), together in grid.png", len(images), out, time.monotonic() - start)


if __name__ == "__main__":
    run_command("minti.sample", main)
