"""The options of `python -m minti.train`, and the entries of `concepts:` in its config files."""

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..cli.options import Options, number, side
from ..cli.yaml_files import read_yaml
from ..errors import InputError
from ..formats.views import CROPS
from ..inversion.batches import Settings
from ..model.tokenizer import clean
from .folder import is_name
from .run_word import Watching

log = logging.getLogger(__name__)

PER_WORD = ("images", "placeholder", "init_word", "init", "num_vectors", "templates", "lr", "seed")


def options() -> Options:
    """The command line of `python -m minti.train`."""
    opts = Options("minti.train", "Learn a word for what a few photos show (Textual Inversion).")
    share, decay = number(float, 0, 1), number(float, 0, below=1)
    weight, rate = number(float, 0, 1e6), number(float, 0)
    count, steps, some = number(int, 1), number(int, 0), number(int, 1, 4096)
    group = "what to learn"
    opts.add(group, "--images", metavar="DIR", help="folder with three to five photos")
    opts.add(group, "--placeholder", metavar="WORD", help="the new word, such as '<toy>'")
    opts.add(group, "--init-word", "", metavar="TEXT", help="coarse description to start from, such as toy")
    kinds = ["word", "output", "random", "file"]
    text = "how the init word becomes the start; file: it is a path"
    opts.add(group, "--init", "word", choices=kinds, help=text)
    text = "vectors the word stands for; with --init file, as many as there are in the file"
    opts.add(group, "--num-vectors", 1, type=number(int, 1, 75), help=text)
    text = "with vectors of its own for each cross-attention layer of the UNet (XTI)"
    opts.add(group, "--per-layer", False, help=text)
    text = "with vectors that replace the text encoder's output, as OneTrainer's output embeddings"
    opts.add(group, "--output-embedding", False, help=text)
    text = "prompts to learn in: object, style, or a file"
    opts.add(group, "--templates", "object", metavar="NAME|FILE", help=text)
    opts.add(group, "--replace-word", False, help="allow a placeholder that means something already")
    opts.add(group, "--out", metavar="DIR", help="folder for everything the run writes")
    opts.add(group, "--resume", False, help="go on with the run in --out")
    opts.add(group, "--overwrite", False, help="replace the run in --out")
    group = "photos"
    text = "side of the squares; by default the model's own"
    opts.add(group, "--size", type=side, metavar="PX", help=text)
    opts.add(group, "--crop", "center", choices=CROPS, help="which part of a photo that is not square")
    opts.add(group, "--flip", True, help="also learn from mirror images; not for text or faces")
    group = "learning"
    text = "loss of the diffusion model; or, as a rival, of the CLIP whose text encoder it has"
    opts.add(group, "--objective", "diffusion", choices=["diffusion", "clip"], help=text)
    opts.add(group, "--steps", 3000, type=count, help="updates")
    opts.add(group, "--batch-size", 4, type=some, help="samples of each word at a time")
    opts.add(group, "--accumulate", 1, type=some, help="batches summed up for an update")
    text = "direction: vectors keep the mean length of the vocabulary's; try --lr 0.01"
    opts.add(group, "--optimizer", "adamw", choices=["adamw", "direction"], help=text)
    text = "of --optimizer direction: pull towards the start; more follows prompts closer"
    opts.add(group, "--kappa", 1e-4, type=weight, help=text)
    opts.add(group, "--lr", 5e-3, type=rate, help="learning rate")
    opts.add(group, "--scale-lr", False, help="multiply lr by batch size, accumulation and processes")
    opts.add(group, "--lr-schedule", "constant", choices=["constant", "cosine"], help="how lr develops")
    opts.add(group, "--warmup", 0, type=steps, help="steps over which lr rises from zero")
    opts.add(group, "--weight-decay", 0.01, type=weight, help="of AdamW")
    opts.add(group, "--beta1", 0.9, type=decay, help="of AdamW")
    opts.add(group, "--beta2", 0.999, type=decay, help="of AdamW")
    opts.add(group, "--t-min", 0, type=steps, help="learn only from time steps from here on; try 400")
    opts.add(group, "--t-max", type=steps, help="and up to here; by default the last one")
    text = "the result is the mean over so many of the last steps"
    opts.add(group, "--average", 1, type=count, help=text)
    text = "step at which one more vector joins in"
    opts.add(group, "--progressive", [], type=count, metavar="STEP", help=text)
    text = "weight of the squared distance to the start"
    opts.add(group, "--regularization", 0.0, type=weight, help=text)
    text = "of a thing: weight of keeping what other words say (CoRe); try 0.1 if prompts are ignored"
    opts.add(group, "--context-weight", 0.0, type=weight, help=text)
    opts.add(group, "--max-norm", type=weight, help="longest vector, in mean lengths of the vocabulary")
    text = "how often a word for the single photo is in the prompt"
    opts.add(group, "--per-image", 0.0, type=share, help=text)
    opts.add(group, "--caption-dropout", 0.0, type=share, help="how often the prompt is the bare word")
    opts.add(group, "--seed", 0, type=number(int, 0, 2**63 - 1), help="of everything random")
    opts.add(group, "--gradient-checkpointing", False, help="less memory, a third more time")
    group = "watching"
    opts.add(group, "--save-every", 500, type=count, help="steps between savings")
    opts.add(group, "--eval-every", 100, type=steps, help="steps between evaluations; 0: none")
    opts.add(group, "--eval-size", 16, type=some, help="samples in an evaluation")
    text = "which vectors to keep: best by eval loss"
    opts.add(group, "--keep", "last", choices=["last", "best"], help=text)
    text = "stop when eval loss varies this much less than at first: 0.15"
    opts.add(group, "--early-stop", type=share, help=text)
    text = "evaluations over which it varies"
    opts.add(group, "--early-stop-window", 10, type=number(int, 2, 4096), help=text)
    opts.add(group, "--sample-every", 500, type=steps, help="steps between previews; 0: none")
    text = "prompt of the previews, with {} for the word"
    opts.add(group, "--sample-prompt", [], metavar="TEXT", help=text)
    opts.add(group, "--sample-steps", 25, type=number(int, 1, 4096), help="DDIM steps of the previews")
    text = "also log for TensorBoard, which has to be installed, in the folder tensorboard"
    opts.add(group, "--tensorboard", False, help=text)
    opts.add_judge("the CLIP of --objective clip")
    opts.add_model()
    opts.file_only("concepts")
    return opts


def _pick(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that are fields of a dataclass."""
    return {field.name: values[field.name] for field in fields(kind) if field.name in values}


def learning_settings(values: Mapping[str, Any]) -> Settings:
    """The options that say how words are learned. Raises InputError if they do not go together."""
    if values["warmup"] > values["steps"]:
        text = "--warmup %d: the run ends before, after %d steps, so that lr never reaches --lr"
        log.warning(text, values["warmup"], values["steps"])
    own = {"betas": (values["beta1"], values["beta2"]), "progressive": tuple(values["progressive"])}
    return Settings(**_pick(Settings, values) | own)


def watching_settings(values: Mapping[str, Any]) -> Watching:
    """The options that say how a run is watched."""
    return Watching(**_pick(Watching, values))


def parse_run(opts: Options, argv: Sequence[str]) -> argparse.Namespace:
    """The options of a run; with --resume those that it was begun with, but for what `argv` changes.

    Raises:
        InputError: they cannot be used.
    """
    args = opts.parse(argv, required=["out"])
    if not args.resume:
        return args
    if args.overwrite:
        raise InputError("--resume continues what is in --out and --overwrite removes it; give one of them")
    saved = Path(args.out) / "config.yaml"
    if saved.exists():
        return opts.parse(argv, required=["out"], base=_read_saved(opts, saved))
    if args.checkpoint is None:
        raise InputError(f"{args.out}: holds no run to resume; check --out")
    log.info("%s: holds no run to resume, so a new one begins", args.out)
    return args


def _read_saved(opts: Options, saved: Path) -> dict[str, Any]:
    """The settings that a run has saved.

    Raises:
        InputError: this version of minti has not one of the options in them, or not its value.
    """
    config = read_yaml(saved)
    by = f"the run was begun by {config.get('made_by', 'another version of minti')}"
    known = {*opts.defaults, "concepts", "made_by"}
    if unknown := sorted({*map(str, config)} - known):
        raise InputError(f"{saved}: option {unknown[0]!r} is unknown; {by}, so continue it with that")
    for key in config.keys() & opts.defaults.keys():
        try:
            opts.check({key: config[key]})
        except InputError as error:
            raise InputError(f"{saved}: {error}; {by}, so continue it with that, or --overwrite it") from None
    return config


def word_specs(opts: Options, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What to learn: the entries of `concepts:` in the config file, or the one word of the flags.

    Beside the options PER_WORD each has a `name`, that of its folder, and a `learning_name`, the placeholder
    while it is learned. Several entries may learn the same word, from other seeds for instance.

    Raises:
        InputError: an entry cannot be used.
    """
    common = {key: values[key] for key in PER_WORD}
    entries, many = values["concepts"], values["concepts"] is not None
    if not many:
        entries = [{"name": ""}]
    elif not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        raise InputError("concepts: should list entries like {name: toy, images: DIR, placeholder: <toy>}")
    for key in PER_WORD:
        if key in opts.given and many and all(key in entry for entry in entries):
            text = "--%s has no effect: every entry of concepts in the config has its own"
            log.warning(text, key.replace("_", "-"))
    specs: list[dict[str, Any]] = []
    for entry in entries:
        if unknown := set(entry) - {"name", *PER_WORD}:
            known = f"there are name, {', '.join(PER_WORD)}"
            raise InputError(f"concepts: unknown key {min(map(str, unknown))!r}; {known}")
        name = entry.get("name", "")
        if not isinstance(name, str):
            raise InputError(f"concepts: name {name!r} is no text in YAML; put it between quotes")
        if many and not is_name(name):
            rule = "letters, digits, - and _, and not be that of a file or folder that a run writes"
            raise InputError(f"concepts: name {name!r} should consist of {rule}")
        own = opts.check({key: value for key, value in entry.items() if key != "name"})
        spec = common | own | {"name": name}
        for key in ("images", "placeholder"):
            if spec[key] is None:
                raise InputError(f"concepts: {name} needs {key}" if many else f"--{key} must be given")
        word = spec["placeholder"]
        if not word.strip():
            raise InputError(f"placeholder {word!r} is empty")
        if clean(word) in {clean(other["placeholder"]) for other in specs}:
            # Where a word is found in a prompt depends on how it begins and ends; so does its other name.
            word = f"{word}|{len(specs)}|{word}"
        specs.append(spec | {"learning_name": word})
    if len({spec["name"].lower() for spec in specs}) < len(specs):
        raise InputError("concepts: two of them have the same name")
    return specs
