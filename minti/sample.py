"""python -m minti.sample: pictures from prompts."""

import argparse
import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from .cli.command import run_command
from .cli.images import COLUMNS, encode_png, image_grid, thumbnails
from .cli.model_options import laid_over, load_model_with_words, made_of
from .cli.options import Options, number, size
from .cli.progress import Progress
from .edit.clip_guidance import ClipGuidance
from .edit.inverting import encode_mean
from .edit.region import as_tensor
from .errors import InputError
from .formats.atomic import write_atomically
from .formats.concept import Concept
from .formats.photos import open_image
from .judge.prompts import notices
from .judge.ranking import closest, ranking_text
from .judge.scorer import Scorer, choose_clip
from .model import kernels
from .model.stable_diffusion import StableDiffusion
from .model.unclip import ImagePrompt
from .version import __version__

log = logging.getLogger(__name__)

MAY_DIFFER = ("out", "device", "batch_size", "compile", "attention")  # when sampling is continued
RIVAL = ("init_image", "strength", "clip_guidance")
MOST_PICTURES = 1_000_000  # made by one command
GRID_LINES, GRID_SIDE = 16, 512  # of a sheet: lines of pictures, and the longer side of each in pixels


def options() -> Options:
    """The command line."""
    opts = Options("minti.sample", "Make pictures with a Stable Diffusion checkpoint and learned words.")
    count = number(int, 1, 100_000)
    group = "what to make"
    opts.add(group, "--prompt", [], metavar="TEXT", help="what to show; give it again for more prompts")
    text = "what to steer away from; to SDXL an empty text is not the same as none"
    opts.add(group, "--negative-prompt", metavar="TEXT", help=text)
    text = "read prompts of more than 75 tokens in parts, as AUTOMATIC1111 does, instead of cutting them"
    opts.add(group, "--long-prompts", False, help=text)
    text = "a learned word, renamed to WORD if given; repeatable"
    opts.add(group, "--concept", [], metavar="[WORD=]FILE", help=text)
    opts.add(group, "--num-images", 4, type=count, metavar="N", help="pictures for each prompt")
    text = "seed of the first; the next has seed + 1"
    opts.add(group, "--seed", 0, type=number(int, 0, 2**63 - 1 - MOST_PICTURES), help=text)
    opts.add(group, "--size", type=size, metavar="PX|WxH", help="size in pixels; by default the model's own")
    opts.add(group, "--out", metavar="DIR", help="folder for the pictures")
    opts.add(group, "--overwrite", False, help="begin anew, whatever is finished in --out")
    group = "how"
    opts.add(group, "--sample-steps", 50, alias="--steps", type=number(int, 1, 10_000), help="DDIM steps")
    opts.add(group, "--guidance-scale", 7.5, type=number(float, 0), help="how closely to follow the prompt")
    opts.add(group, "--eta", 0.0, type=number(float, 0, 1), help="0: deterministic, 1: as noisy as DDPM")
    opts.add(group, "--batch-size", 4, type=number(int, 1, 10_000), help="pictures at a time")
    group = "from a picture, and a rival"
    text = "picture to start from, instead of from noise alone"
    opts.add(group, "--init-image", metavar="PATH", help=text)
    text = "share of the steps that is walked from it; at 1 nothing of it is left"
    opts.add(group, "--strength", 0.75, type=number(float, 0, 1), help=text)
    text = "let CLIP bend every step towards the prompt, so strongly (CLIP-guided diffusion)"
    opts.add(group, "--clip-guidance", 0.0, type=number(float, 0, 1e6), metavar="SCALE", help=text)
    group = "what unCLIP is shown beside the prompt"
    text = (
        "a picture that pictures should resemble, of several their mean; without any, unCLIP is shown zeros"
    )
    opts.add(group, "--image-prompt", [], metavar="PATH", help=text)
    text = "noise mixed into it: more resembles it less; at most 999"
    opts.add(group, "--noise-level", 0, type=number(int, 0, 999), metavar="N", help=text)
    group = "what SDXL is told beside the prompt"
    text = "of a photo that pictures should look like; by default --size"
    opts.add(group, "--original-size", type=size, metavar="PX|WxH", help=text)
    opts.add(group, "--crop-from", type=corner, metavar="LEFT,TOP", help="where such a photo was cropped")
    opts.add(group, "--target-size", type=size, metavar="PX|WxH", help="to which; by default --size")
    group = "choosing"
    text = "make K candidates for every picture, and keep the one that CLIP finds closest to the prompt"
    opts.add(group, "--rank-by-clip", 1, type=number(int, 1, 1000), metavar="K", help=text)
    opts.add_judge(group)
    opts.add_model()
    return opts


def corner(text: str) -> tuple[int, int]:
    """A type of option: `0,256`, pixels from the left and from the top."""
    left, top = (int(part) for part in text.split(","))
    if min(left, top) < 0:
        raise ValueError
    return left, top


def size_condition(args: argparse.Namespace, sd: StableDiffusion) -> tuple[int, ...] | None:
    """The six numbers that SDXL is told, as the options say. Raises InputError for another model."""
    given = (args.original_size, args.crop_from, args.target_size)
    if given == (None, None, None):
        return None
    if sd.unet.add_embedding is None:
        raise InputError("--original-size, --crop-from and --target-size are for SDXL only; leave them out")
    sides = [(side, side) if isinstance(side, int) else side for side in given]
    size = sd.check_size(args.size)
    original, (left, top), target = sides[0] or size, sides[1] or (0, 0), sides[2] or size
    return (*original[::-1], top, left, *target[::-1])


def image_prompt(args: argparse.Namespace, sd: StableDiffusion) -> ImagePrompt:
    """The pictures that the options show to unCLIP. Raises InputError for another model."""
    if sd.image_prompter is None:
        raise InputError(
            f"--image-prompt: {args.checkpoint} is no unCLIP, so it sees no pictures; leave it out"
        )
    images = [open_image(Path(path)) for path in args.image_prompt]
    return sd.image_prompter.prompt(images, args.noise_level)


def own_sampler(
    args: argparse.Namespace,
    sd: StableDiffusion,
    seeds: Sequence[int],
    scorer: Scorer | None,
    texts: Sequence[str],
) -> ClipGuidance | None:
    """What samples instead of DDIM if the options ask for it; `texts` are what CLIP compares with."""
    if args.init_image is None and not args.clip_guidance:
        return None
    if args.eta:
        raise InputError("--eta: should be 0 with --init-image or --clip-guidance; leave it out")
    z0 = None
    if args.init_image is not None:
        image = ImageOps.fit(open_image(Path(args.init_image)), sd.check_size(args.size))
        z0 = encode_mean(sd, as_tensor(image))
    embedded = scorer.embed_texts(texts) if args.clip_guidance else None
    how = {"scale": args.clip_guidance, "z0": z0, "strength": args.strength}
    return ClipGuidance(sd, args.sample_steps, seeds, scorer, embedded, **how)


@dataclass(frozen=True)
class Picture:
    """A picture to make, and the name of its file."""

    prompt: str
    seed: int
    file: str


def plan_pictures(prompts: Sequence[str], seed: int, num_images: int, rank: int = 1) -> list[list[Picture]]:
    """The candidates for every picture, `rank` each; `num_images` pictures of each prompt, in order.

    Files are called `PROMPT-SEED.png`, with the prompt shortened; prompts that look alike are numbered.
    """
    planned, slugs = [], set()
    for prompt in prompts:
        slug = base = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:50].strip("-") or "picture"
        number = 1
        while slug in slugs:
            number += 1
            slug = f"{base}-no{number}"
        slugs.add(slug)
        for first in range(seed, seed + num_images * rank, rank):
            seeds = range(first, first + rank)
            planned.append([Picture(prompt, s, f"{slug}-{s}.png") for s in seeds])
    return planned


def files_made(settings: Mapping[str, Any]) -> list[str]:
    """The names of all files that a command with these settings writes, beside its config.yaml."""
    keys = ("prompt", "seed", "num_images", "rank_by_clip")
    files = [p.file for candidates in plan_pictures(*(settings[key] for key in keys)) for p in candidates]
    return [*files, "grid.png", *(f"grid_{i}.png" for i in range(2, 2 + len(files) // GRID_LINES))]


def write_grids(out: Path, planned: Sequence[Sequence[Picture]]) -> None:
    """Show the pictures that are finished side by side, on as many sheets as it takes.

    The pictures of a prompt begin a new line. Large ones are made smaller.
    """
    finished: dict[str, list[Path]] = {}
    for candidates in planned:
        paths = [path for path in (out / picture.file for picture in candidates) if path.exists()]
        finished.setdefault(candidates[0].prompt, []).extend(paths)
    columns = min(COLUMNS, max(1, *map(len, finished.values())))
    lines = [paths[i : i + columns] for paths in finished.values() for i in range(0, len(paths), columns)]
    for sheet, start in enumerate(range(0, len(lines), GRID_LINES)):
        cells = []
        for line in lines[start : start + GRID_LINES]:
            images = thumbnails([open_image(path) for path in line], GRID_SIDE)
            cells += [*images, *[Image.new("RGB", images[0].size, "white")] * (columns - len(line))]
        name = f"grid_{sheet + 1}.png" if sheet else "grid.png"  # no picture has such a name
        write_atomically(out / name, encode_png(image_grid(cells, columns), {}))


def load(args: argparse.Namespace) -> tuple[StableDiffusion, dict[str, Concept]]:
    """The checkpoint with its learned words, ready to sample. Raises InputError if it cannot."""
    sd, concepts = load_model_with_words(args)
    width, height = sd.check_size(args.size)
    if (width, height) != sd.image_size:
        text = "%dx%d pixels: the model was trained on %dx%d, expect repetitions"
        log.info(text, width, height, *sd.image_size)
    sd.schedule.timesteps(args.sample_steps)
    if not args.long_prompts:
        sd.tokenizer([*args.prompt, args.negative_prompt or ""])
    for notice in notices(args.prompt, args.negative_prompt, args.guidance_scale, sd.tokenizer):
        log.warning("%s", notice)
    if args.compile:
        kernels.compile_denoiser(sd.unet)
    return sd, concepts


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, make the pictures, write them one by one and in the end sheets of all."""
    opts = options()
    shows_pictures = bool(opts.parse(argv, required=[]).image_prompt)
    args = opts.parse(argv, required=["checkpoint", *([] if shows_pictures else ["prompt"]), "out"])
    opts.refuse_idle(args, {"strength": "init_image", "noise_level": "image_prompt"})
    args.prompt = args.prompt or [""]
    if len(args.prompt) * args.num_images * args.rank_by_clip > MOST_PICTURES:
        raise InputError(f"more than {MOST_PICTURES:,} pictures; lower --num-images or --rank-by-clip")
    planned = plan_pictures(args.prompt, args.seed, args.num_images, args.rank_by_clip)
    start, out = time.monotonic(), Path(args.out)
    args.made_of = made_of(args, "init_image", "image_prompt")
    how = {"may_differ": MAY_DIFFER, "signature": ("rank_by_clip", "prompt")}
    with opts.folder(out, args, files_made, **how) as folder:
        begun = folder.check(resume=True, overwrite=args.overwrite)
        todo = [c for c in planned if not (begun and any((out / p.file).exists() for p in c))]
        sd, concepts = load(args)
        scorer, texts = None, {}
        if args.rank_by_clip > 1 or args.clip_guidance:
            texts = {prompt: ranking_text(prompt, sd.tokenizer.placeholders) for prompt in args.prompt}
            clip = choose_clip(args.clip, args.checkpoint)
            scorer = Scorer.load(clip, device=sd.device, tokenizer=args.clip_tokenizer)
        how = {"steps": args.sample_steps, "guidance_scale": args.guidance_scale, "eta": args.eta}
        how |= {"negative_prompt": args.negative_prompt, "long_prompts": args.long_prompts}
        if conditions := size_condition(args, sd):
            how["size_condition"] = conditions
        size = dict(zip(("width", "height"), sd.check_size(args.size), strict=True))
        settings = {**how, **size, **laid_over(args), "checkpoint": args.checkpoint, "dtype": args.dtype}
        learned = {word: concept.digest for word, concept in concepts.items()}
        each = [(p.prompt, p.seed) for candidates in todo for p in candidates]
        seeds = [seed for _, seed in each]
        sampler = own_sampler(args, sd, seeds, scorer, [texts.get(prompt, "") for prompt, _ in each])
        settings |= {key: getattr(args, key) for key in RIVAL} if sampler else {}
        if args.image_prompt:
            how["image_prompt"] = image_prompt(args, sd)
            settings |= {"image_prompt": args.image_prompt, "noise_level": args.noise_level}
        steps = len(sampler.path) if sampler else args.sample_steps
        progress = Progress(-(-len(each) // args.batch_size) * steps, "step")
        how |= {"size": args.size, "batch_size": args.batch_size, "sampler": sampler}
        images = sd.sample_each(each, on_step=progress.step, **how)
        try:
            for candidates in todo:
                group, chosen, text = list(islice(images, len(candidates))), 0, {}
                if args.rank_by_clip > 1:
                    chosen, cosine = closest(scorer, texts[candidates[0].prompt], group)
                    text = {"clip": f"{cosine:.4f}, best of {len(group)}"}
                picture = candidates[chosen]
                text |= {"prompt": picture.prompt, "seed": str(picture.seed)}
                text |= {"settings": json.dumps(settings), "concepts": json.dumps(learned)}
                text |= {"software": f"minti {__version__}"}
                if not begun:  # a model whose first picture fails leaves nothing behind
                    folder.begin()
                    begun = True
                write_atomically(out / picture.file, encode_png(group[chosen], text))
        finally:
            progress.close()
            if begun:
                write_grids(out, planned)
    seconds = time.monotonic() - start
    count = f"{len(planned)} picture{'s' * (len(planned) > 1)}"
    log.info("%s in %s (%.1f s), together in grid.png", count, out, seconds)


command = partial(run_command, "minti.sample", main)

if __name__ == "__main__":
    command()
