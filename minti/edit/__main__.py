"""python -m minti.edit: change a photo with a prompt, inside a mask or as a whole."""

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..cli.command import run_command
from ..cli.images import COLUMNS, encode_png, image_grid, thumbnails
from ..cli.model_options import load_model_with_words, made_of
from ..cli.options import Options, number
from ..cli.progress import Progress
from ..cli.work_folder import WorkFolder
from ..errors import InputError
from ..formats.atomic import write_atomically
from ..formats.photos import Photo, open_image
from ..judge.prompts import notices
from ..judge.ranking import closest, ranking_text
from ..judge.scorer import Scorer
from ..model import kernels
from ..model.stable_diffusion import StableDiffusion, last
from ..version import __version__
from .blending import paint
from .inverting import encode_mean, invert_photo, sample_from
from .region import around, as_tensor, opacity, prepare_mask, whole

log = logging.getLogger(__name__)

WITH_MASK = ("num_images", "strength", "grow", "blur", "dilate", "fixed_noise", "paste", "clip")
WITHOUT_MASK = ("inversion", "inverse_guidance")
MAY_DIFFER = ("out", "device", "batch_size", "compile", "attention")
INVERTED = ("reconstruction.png", "reconstruction-guided.png", "edit.png")
GRID_SIDE = 512  # the longer side of each picture in grid.png, in pixels


def options() -> Options:
    """The command line."""
    opts = Options("minti.edit", "Change a photo with a prompt: the part that a mask shows, or all of it.")
    whole_number, share = number(int, 0, 1024), number(float, 0, 1)
    group = "what to edit"
    opts.add(group, "--image", metavar="PATH", help="the photo, of any size")
    opts.add(group, "--prompt", metavar="TEXT", help="what the edited photo shows")
    opts.add(group, "--negative-prompt", metavar="TEXT", help="what to steer away from")
    text = "a learned word, renamed to WORD if given; repeatable"
    opts.add(group, "--concept", [], metavar="[WORD=]FILE", help=text)
    opts.add(group, "--out", metavar="DIR", help="folder for the pictures")
    opts.add(group, "--overwrite", False, help="begin anew, whatever is finished in --out")
    group = "with a mask"
    text = "a picture as large as the photo: white is painted, black stays, grey is painted a little"
    opts.add(group, "--mask", metavar="PATH", help=text)
    opts.add(group, "--num-images", 4, type=number(int, 1, 10_000), metavar="N", help="candidates")
    text = "seed of the first candidate; the next has seed + 1"
    opts.add(group, "--seed", 0, type=number(int, 0, 2**62), help=text)
    text = "1 begins with noise, less keeps more of what was there"
    opts.add(group, "--strength", 1.0, type=share, help=text)
    opts.add(group, "--grow", 0, type=whole_number, metavar="PX", help="make the mask wider")
    text = "width of a soft edge, which lies inside the mask"
    opts.add(group, "--blur", 0, type=whole_number, metavar="PX", help=text)
    text = "for thin masks: begin with one that is N latents wider, and shrink it on the way"
    opts.add(group, "--dilate", 0, type=number(int, 0, 64), metavar="N", help=text)
    text = "mix the photo with the same noise at all steps, as diffusers does"
    opts.add(group, "--fixed-noise", False, help=text)
    text = "leave each pixel outside the mask as it is in the photo; --no-paste shows what the model made"
    opts.add(group, "--paste", True, help=text)
    opts.add(group, "--batch-size", 4, type=number(int, 1, 10_000), help="candidates at a time")
    group = "without a mask"
    text = "what the photo shows; the noise is sought from which this prompt leads to it"
    opts.add(group, "--source-prompt", metavar="TEXT", help=text)
    text = "authors: ask the model at the time where it is, 250 steps, as the authors of the paper did"
    opts.add(group, "--inversion", "exact", choices=["exact", "authors"], help=text)
    opts.add(group, "--inverse-guidance", 1.0, type=number(float, 0), help="guidance on the way to the noise")
    group = "how"
    text = "DDIM steps; by default 50, or 250 with --inversion authors"
    opts.add(group, "--sample-steps", alias="--steps", type=number(int, 1, 10_000), help=text)
    text = "how closely to follow the prompt; without a mask, low values keep the structure"
    opts.add(group, "--guidance-scale", 7.5, type=number(float, 0), help=text)
    opts.add_judge("choosing among candidates: ranked if --clip is given")
    opts.add_model()
    return opts


def check_mode(args: argparse.Namespace, defaults: Mapping[str, Any]) -> None:
    """Raises InputError unless exactly one of the two kinds of edit is asked for, and its options only."""
    if (args.mask is None) == (args.source_prompt is None):
        what = "neither is" if args.mask is None else "both are"
        raise InputError(f"{what} given: --mask paints a part anew, --source-prompt changes the whole photo")
    for key in WITHOUT_MASK if args.mask else WITH_MASK:
        if getattr(args, key) != defaults[key]:
            mode = "--source-prompt" if args.mask else "--mask"
            raise InputError(f"--{key.replace('_', '-')} has no effect without {mode}; leave it out")
    if args.sample_steps is None:
        args.sample_steps = 250 if args.inversion == "authors" else 50


def files_made(settings: Mapping[str, Any]) -> list[str]:
    """The names of all files that a command with these settings writes, beside its config.yaml."""
    if settings.get("source_prompt"):
        return [*INVERTED, "grid.png"]
    seeds = range(settings["seed"], settings["seed"] + settings["num_images"])
    return [*(f"edit-{seed}.png" for seed in seeds), "grid.png"]


class Editor:
    """What both kinds of edit share: the model, the options, and the folder that pictures are written to."""

    def __init__(self, args: argparse.Namespace, folder: WorkFolder, begun: bool) -> None:
        self.args, self.folder, self.begun, self.out = args, folder, begun, Path(args.out)
        self.source = Photo(Path(args.image), args.mask and Path(args.mask))
        self.photo = self.source.open()
        self.how = {"guidance_scale": args.guidance_scale, "negative_prompt": args.negative_prompt}

    def load(self) -> StableDiffusion:
        """The model with its words, ready to edit. Raises InputError if it cannot."""
        args = self.args
        sd, concepts = load_model_with_words(args)
        self.learned = {word: concept.digest for word, concept in concepts.items()}
        sd.schedule.timesteps(args.sample_steps)
        prompts = [prompt for prompt in (args.source_prompt, args.prompt) if prompt is not None]
        sd.tokenizer([*prompts, args.negative_prompt or ""])
        for notice in notices(prompts, args.negative_prompt, args.guidance_scale, sd.tokenizer):
            log.warning("%s", notice)
        if args.compile:
            kernels.compile_denoiser(sd.unet)
        return sd

    def write(self, name: str, image: Image.Image, text: Mapping[str, str]) -> None:
        """Write a picture with the settings it was made with; the first one begins the folder."""
        if not self.begun:
            self.folder.begin()
            self.begun = True
        settings = {key: value for key, value in vars(self.args).items() if value is not None}
        about = {"settings": json.dumps(settings), "concepts": json.dumps(self.learned)}
        about |= {"software": f"minti {__version__}"}
        write_atomically(self.out / name, encode_png(image, {**text, **about}))

    def write_grid(self, images: Sequence[Image.Image]) -> None:
        """Show pictures side by side."""
        grid = image_grid(thumbnails(images, GRID_SIDE), min(COLUMNS, len(images)))
        write_atomically(self.out / "grid.png", encode_png(grid, {}))

    def with_mask(self) -> None:
        """Make the candidates that are not there yet, put them into the photo, and rank them."""
        args = self.args
        try:
            mask = prepare_mask(self.source.open_mask(self.photo.size), args.grow)
            opaque = opacity(mask, args.blur) if args.paste else None
        except InputError as error:
            raise InputError(f"{args.mask}: {str(error).removeprefix(f'{args.mask}: ')}") from None
        sd = self.load()
        if sd.unet.config.in_channels > sd.vae.config.latent_channels and (args.dilate or args.fixed_noise):
            log.warning("--dilate and --fixed-noise have no effect on a model made for inpainting")
        if args.clip:
            text = ranking_text(args.prompt, sd.tokenizer.placeholders)
            scorer = Scorer.load(args.clip, device=sd.device, tokenizer=args.clip_tokenizer)
        region = around(mask, sd.image_size, sd.vae.config.downscale)
        pixels, cells = region.cut(self.photo), region.cut_mask(mask)
        names = {seed: f"edit-{seed}.png" for seed in range(args.seed, args.seed + args.num_images)}
        todo = [seed for seed, name in names.items() if not (self.begun and (self.out / name).exists())]
        steps = int(args.sample_steps * args.strength)
        keys = ("strength", "fixed_noise", "dilate")
        how = {"steps": args.sample_steps, **self.how, **{key: getattr(args, key) for key in keys}}
        with closing(Progress(-(-len(todo) // args.batch_size) * steps, "step")) as progress:
            for first in range(0, len(todo), args.batch_size):
                seeds = todo[first : first + args.batch_size]
                way = paint(sd, pixels, cells, args.prompt, seeds, **how)
                images = sd.decode_latents(last(way, progress.step))
                for seed, image in zip(seeds, images, strict=True):
                    edited = region.put_back(self.photo, image, opaque)
                    self.write(names[seed], edited, {"prompt": args.prompt, "seed": str(seed)})
        edits = {name: open_image(self.out / name) for name in names.values()}
        if args.clip:
            scores = {
                name: closest(scorer, text, [image.crop(region.box)])[1] for name, image in edits.items()
            }
            edits = dict(sorted(edits.items(), key=lambda item: -scores[item[0]]))
            log.info("by CLIP, the best first:")
            for name in edits:
                log.info("%s %.4f", name, scores[name])
        self.write_grid([self.photo, mask.convert("RGB"), *edits.values()])

    def without_mask(self) -> None:
        """Invert the photo, see how well the noise leads back to it, and sample with the other prompt."""
        args, sd = self.args, self.load()
        region = whole(self.photo.size, sd.image_size, sd.vae.config.downscale)
        pixels = region.cut(self.photo)
        z0 = encode_mean(sd, pixels)
        how = {"steps": args.sample_steps, "negative_prompt": args.negative_prompt}
        back = {"at_current": args.inversion == "authors", "guidance_scale": args.inverse_guidance}
        with closing(Progress(4 * args.sample_steps - (args.inversion == "authors"), "step")) as progress:
            x_T = last(invert_photo(sd, z0, args.source_prompt, **how, **back), progress.step)
            ways = [(args.source_prompt, 1.0), (args.source_prompt, args.guidance_scale)]
            ways.append((args.prompt, args.guidance_scale))
            latents = []
            for prompt, guidance in ways:
                way = sample_from(sd, x_T, prompt, guidance_scale=guidance, **how)
                latents.append(last(way, progress.step))
        images = [sd.decode_latents(z)[0] for z in latents]
        alone = psnr(pixels, as_tensor(sd.decode_latents(z0)[0]))
        for (_, guidance), z, image in zip(ways[:2], latents, images, strict=False):
            error, ratio = (z - z0).square().mean().item(), psnr(pixels, as_tensor(image))
            text = "there and back at guidance %g: latents differ by %.4f (MSE), pixels by %.1f dB (PSNR)"
            log.info(f"{text}; %.1f dB is the autoencoder's own", guidance, error, ratio, alone)
        for name, (prompt, guidance), image in zip(INVERTED, ways, images, strict=True):
            self.write(name, image, {"prompt": prompt, "guidance_scale": str(guidance)})
        self.write_grid([self.photo, *images])


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in decibels of two pictures in [-1, 1]."""
    return (10 * torch.log10(4 / (a - b).square().mean())).item()


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, edit the photo, and write the results and a sheet of them."""
    opts = options()
    args = opts.parse(argv, required=["checkpoint", "image", "prompt", "out"])
    check_mode(args, opts.defaults)
    args.made_of = made_of(args, "image", "mask")
    with opts.folder(
        args.out, args, files_made, may_differ=MAY_DIFFER, signature=("image", "prompt")
    ) as folder:
        editor = Editor(args, folder, folder.check(resume=True, overwrite=args.overwrite))
        editor.with_mask() if args.mask else editor.without_mask()
    log.info("%s: together in grid.png", args.out)


command = partial(run_command, "minti.edit", main)

if __name__ == "__main__":
    command()
