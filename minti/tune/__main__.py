"""python -m minti.tune: change a model's weights for one thing, by pivotal tuning or DreamBooth."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial

import torch

from ..cli.command import out_of_memory, run_command
from ..cli.images import encode_png
from ..cli.model_options import load_model_with_words
from ..cli.options import Options, number, side
from ..cli.work_folder import WorkFolder
from ..errors import InputError
from ..formats.atomic import write_atomically
from ..formats.photos import load_photos
from ..formats.views import CROPS
from ..inversion.batches import Word
from ..inversion.divergence import Diverged
from ..inversion.templates import load_templates
from ..model.checks import check_weights
from ..model.fitting import SPECIAL
from ..model.model_hash import model_hash
from ..model.stable_diffusion import StableDiffusion
from ..runs.folder import STATE, read_state
from ..runs.options import parse_run
from ..runs.stop import Stop
from ..runs.words import encode_photos
from ..version import __version__
from .run import Run, as_bytes, make_class_pictures, refuse_others
from .tuner import WHAT, Tuner, TuneSettings, choose_weights, memory_needed

log = logging.getLogger(__name__)

# The first is the first to be removed: without it, nothing is resumed from the others.
MADE = (STATE, "unet.safetensors", "text_encoder.safetensors", "log.csv", "inputs.png", "samples", "class")
MAY_DIFFER = ("out", "device", "steps", "save_every", "sample_every", "sample_prompt", "checkpoint", "images")
MAY_DIFFER += ("concept", "templates", "unet", "text_encoder")  # whose contents are compared instead
ADVICE = "try --gradient-checkpointing, a smaller --size, --what cross-kv, or --sample-every 0"


def options() -> Options:
    """The command line."""
    opts = Options("minti.tune", "Tune a model to a thing: around a learned word, or by DreamBooth.")
    count, steps, some = number(int, 1), number(int, 0), number(int, 1, 4096)
    weight = number(float, 0, 1e6)
    group = "what to tune to"
    opts.add(group, "--images", metavar="DIR", help="folder with three to five photos")
    text = "a learned word, which stays as it is (pivotal tuning); renamed to WORD if given"
    opts.add(group, "--concept", [], metavar="[WORD=]FILE", help=text)
    text = "prompts around the word: object, style, or a file"
    opts.add(group, "--templates", "object", metavar="NAME|FILE", help=text)
    text = "instead of these, one prompt for all photos, such as 'a photo of sks dog' (DreamBooth)"
    opts.add(group, "--instance-prompt", metavar="TEXT", help=text)
    text = "'a photo of a dog': of this the model makes pictures first, which it should not unlearn"
    opts.add(group, "--class-prompt", metavar="TEXT", help=text)
    opts.add(group, "--class-images", 200, type=some, metavar="N", help="how many of them")
    opts.add(group, "--prior-weight", 1.0, type=weight, help="weight of their loss")
    opts.add(group, "--out", metavar="DIR", help="folder for everything the command writes")
    opts.add(group, "--resume", False, help="go on with what is in --out")
    opts.add(group, "--overwrite", False, help="replace what is in --out")
    group = "which weights"
    text = "unet: all of it; cross-kv: what sees the prompt, the keys and values of its cross-attention"
    opts.add(group, "--what", "unet", choices=list(WHAT), help=text)
    opts.add(group, "--train-text-encoder", False, help="and the text encoder")
    group = "photos"
    opts.add(group, "--size", type=side, metavar="PX", help="side of the squares; by default the model's own")
    opts.add(group, "--crop", "center", choices=CROPS, help="which part of a photo that is not square")
    opts.add(group, "--flip", True, help="also learn from mirror images; not for text or faces")
    group = "learning"
    opts.add(group, "--steps", type=count, help="updates; by default 400, or 800 with --class-prompt")
    opts.add(group, "--batch-size", 1, type=some, help="photos at a time, and as many of the class")
    opts.add(group, "--lr", 5e-6, type=number(float, 0), help="learning rate of AdamW")
    opts.add(group, "--weight-decay", 0.01, type=weight, help="of AdamW")
    opts.add(group, "--max-grad-norm", 1.0, type=weight, help="longer gradients are made shorter")
    opts.add(group, "--seed", 0, type=number(int, 0, 2**62), help="of everything random")
    opts.add(group, "--gradient-checkpointing", False, help="less memory, a third more time")
    group = "watching"
    text = "steps between savings, each of them three times as large as what is tuned, and more"
    opts.add(group, "--save-every", 200, type=count, help=text)
    opts.add(group, "--sample-every", 200, type=steps, help="steps between previews; 0: none")
    opts.add(group, "--sample-prompt", [], metavar="TEXT", help="of previews, {} is the word; repeatable")
    text = "DDIM steps of previews and of pictures of the class"
    opts.add(group, "--sample-steps", 50, type=number(int, 1, 4096), help=text)
    text = "how closely both follow their prompts"
    opts.add(group, "--guidance-scale", 7.5, type=number(float, 0), help=text)
    opts.add_model()
    return opts


def choose_prompts(args: argparse.Namespace, words: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The learned word, "" if there is none, and the prompts for photos, with {} in its place.

    Raises:
        InputError: nothing or too much is said of it.
    """
    if args.instance_prompt:
        if any("{}" in text for text in (args.instance_prompt, *args.sample_prompt)):
            raise InputError("--instance-prompt: with it there is no word that {} could stand for")
        return "", [args.instance_prompt]
    if len(words) != 1:
        what = "neither --concept nor" if not words else "several words, and no"
        raise InputError(f"{what} --instance-prompt given: what do prompts call the thing in the photos?")
    return words[0], load_templates(args.templates)


def check_memory(sd: StableDiffusion, args: argparse.Namespace) -> None:
    """Say what tuning needs. Raises InputError if that is more than there is, and warns if it is close."""

    def needed(what: str) -> int:
        return memory_needed(sd, choose_weights(sd, what, args.train_text_encoder))

    tuned = choose_weights(sd, args.what, args.train_text_encoder)
    count = sum(p.numel() for part in tuned.values() for p in part.values())
    text = "%s weights are tuned: %.2f GB for the model, its gradients and AdamW, and then the activations"
    log.info(text, f"{count:,}", needed(args.what) / 1e9)
    there = float("inf")
    if sd.device.type == "cuda":
        there = torch.cuda.mem_get_info(sd.device)[1]
    elif sd.device.type == "cpu" and hasattr(os, "sysconf"):
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed(args.what) > there:
        few = f"--what cross-kv needs {needed('cross-kv') / 1e9:.1f} GB"
        remedy = f"{few}; or leave out --train-text-encoder" if args.train_text_encoder else few
        raise InputError(f"{sd.device} has {there / 1e9:.1f} GB of memory, which is too little; {remedy}")
    if needed(args.what) > 0.8 * there:
        log.warning(
            "that is nearly all of the %.1f GB of %s; if it fails, %s", there / 1e9, sd.device, ADVICE
        )


def tune(args: argparse.Namespace, folder: WorkFolder) -> bool:
    """Tune as the options say. False if it was asked to stop before its end."""
    state = read_state(folder.path / STATE) if args.resume else {}
    with out_of_memory("the weights do not fit; --dtype bfloat16 needs half as much"):
        sd, concepts = load_model_with_words(args)
    if args.train_text_encoder and isinstance(sd.text_encoder, SPECIAL):
        kinds = "a word per layer or an output embedding"
        raise InputError(f"--train-text-encoder is not for {kinds}, as --concept is; leave it out")
    check_weights(sd)
    sd.schedule.timesteps(args.sample_steps)
    sd.unet.gradient_checkpointing = args.gradient_checkpointing
    check_memory(sd, args)
    word, templates = choose_prompts(args, list(concepts))
    photos = load_photos(args.images)
    captions = [photo.caption for photo in photos] if word else []
    # A prompt that has no room for the word is refused here.
    previews = [text.replace("{}", word) for text in args.sample_prompt or templates[:1]]
    texts = [text.replace("{}", word) for text in (*templates, *filter(None, captions))]
    sd.tokenizer([*texts, *previews, args.class_prompt or ""])
    size, how = sd.check_size(args.size)[0], {"crop": args.crop, "flip": args.flip, "seed": args.seed}
    with out_of_memory("encoding the photos needs it; try a smaller --size, or smaller photos"):
        latents, photos_hash, sheet = encode_photos(sd, photos, templates, size, **how)
    instance, prior = Word(word, torch.empty(0), latents, templates, captions, seed=args.seed), None
    digests = " ".join(concept.digest for concept in concepts.values())
    checks = {"set of photos or prompts": photos_hash, "learned word": as_bytes(digests)}
    checks["checkpoint or dtype"] = as_bytes(f"{model_hash(sd.text_encoder, sd.unet, sd.vae)} {sd.dtype}")
    if state:
        refuse_others(folder.path / STATE, state, checks)
    # Only now, with everything in order, is anything written or what was there removed.
    folder.begin()
    if not state:
        write_atomically(folder.path / "inputs.png", encode_png(sheet, {}))
    if args.class_prompt:
        with out_of_memory("making pictures of the class needs it; try a smaller --size"):
            pictures = make_class_pictures(sd, args, folder.path / "class")
        latents, checks["set of pictures of the class"], _ = encode_photos(sd, pictures, [], size, **how)
        prior = Word("", torch.empty(0), latents, [args.class_prompt], seed=args.seed)
    notes = {"base_model": str(args.checkpoint), "base_dtype": str(sd.dtype).removeprefix("torch.")}
    notes |= {"unet_hash": model_hash(sd.unet), "text_encoder_hash": model_hash(sd.text_encoder)}
    notes |= {"what": args.what, "prompt": texts[0], "made_by": f"minti.tune {__version__}"}
    with out_of_memory(ADVICE):
        keys = ("lr", "batch_size", "prior_weight", "weight_decay", "max_grad_norm")
        weights = choose_weights(sd, args.what, args.train_text_encoder)
        settings = TuneSettings(**{key: getattr(args, key) for key in keys})
        run = Run(args, Tuner(sd, weights, instance, prior, settings, args.compile), checks, notes)
        if state:
            run.resume(state)
        with Stop() as stop:
            return run.train(stop, previews)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, tune, and say how to use the result."""
    opts = options()
    argv = sys.argv[1:] if argv is None else argv
    args = parse_run(opts, argv)
    opts.refuse_idle(args, {"class_images": "class_prompt", "prior_weight": "class_prompt"})
    for key in ("checkpoint", "images"):
        if getattr(args, key) is None:
            raise InputError(f"--{key} must be given; see --help")
    args.steps = args.steps or (800 if args.class_prompt else 400)
    with opts.folder(args.out, args, MADE, may_differ=MAY_DIFFER, signature=("max_grad_norm",)) as folder:
        folder.check(resume=args.resume, overwrite=args.overwrite)
        try:
            done = tune(args, folder)
        except Diverged as error:
            raise InputError(f"{error}; what was saved before is in {folder.path}") from None
    if not done:
        raise KeyboardInterrupt
    parts = ["unet", "text_encoder"] if args.train_text_encoder else ["unet"]
    flags = " ".join(f"--{part.replace('_', '-')} {folder.path / part}.safetensors" for part in parts)
    log.info("to use it: python -m minti.sample --checkpoint %s %s ...", args.checkpoint, flags)


command = partial(run_command, "minti.tune", main)

if __name__ == "__main__":
    command()
