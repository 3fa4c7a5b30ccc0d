"""The options of `python -m minti.train`, and the entries of `concepts:` in its config files."""

from __future__ import annotations

import argparse
from typing import Any

from ..cli.options import Options, number
from ..errors import InputError
from ..inversion.views import CROPS
from ..model.tokenizer import clean
from .folder import is_name

PER_WORD = ("images", "placeholder", "init_word", "init", "num_vectors", "templates", "lr", "seed")


def options() -> Options:
    """The command line."""
    opts = Options("minti.train", "Learn a word for what a few photos show (Textual Inversion).")
    count, share = number(int, 1), number(float, 0, 1)
    positive, decay = number(float, 0), number(float, 0, below=1)
    group = "what to learn"
    opts.add(group, "--images", metavar="DIR", help="folder with three to five photos")
    opts.add(group, "--placeholder", metavar="WORD", help="the new word, such as '<toy>'")
    opts.add(group, "--init-word", "", metavar="TEXT", help="coarse description to start from, such as toy")
    kinds = ["word", "output", "random", "file"]
    opts.add(
        group, "--init", "word", choices=kinds, help="how the init word becomes the start; file: it is a path"
    )
    text = "vectors the word stands for; with --init file, as many as there are in the file"
    opts.add(group, "--num-vectors", 1, type=number(int, 1, 75), help=text)
    opts.add(
        group,
        "--templates",
        "object",
        metavar="NAME|FILE",
        help="prompts to learn in: object, style, or a file",
    )
    opts.add(group, "--replace-word", False, help="allow a placeholder that means something already")
    opts.add(group, "--out", metavar="DIR", help="folder for everything the run writes")
    opts.add(group, "--resume", False, help="go on with the run in --out")
    opts.add(group, "--overwrite", False, help="replace the run in --out")
    group = "photos"
    opts.add(
        group, "--size", type=count, metavar="PX", help="side of the squares; by default the model's own"
    )
    opts.add(group, "--crop", "center", choices=CROPS, help="which part of a photo that is not square")
    opts.add(group, "--flip", True, help="also learn from mirror images; not for text or faces")
    group = "learning"
    opts.add(group, "--steps", 3000, type=count, help="updates")
    opts.add(group, "--batch-size", 4, type=count, help="samples of each word at a time")
    opts.add(group, "--accumulate", 1, type=count, help="batches summed up for an update")
    opts.add(group, "--lr", 5e-3, type=positive, help="learning rate of AdamW")
    opts.add(group, "--scale-lr", False, help="multiply lr by batch size, accumulation and processes")
    opts.add(group, "--lr-schedule", "constant", choices=["constant", "cosine"], help="how lr develops")
    opts.add(group, "--warmup", 0, type=number(int, 0), help="steps over which lr rises from zero")
    opts.add(group, "--weight-decay", 0.01, type=positive, help="of AdamW")
    opts.add(group, "--beta1", 0.9, type=decay, help="of AdamW")
    opts.add(group, "--beta2", 0.999, type=decay, help="of AdamW")
    opts.add(
        group, "--progressive", [], type=count, metavar="STEP", help="step at which one more vector joins in"
    )
    opts.add(
        group, "--regularization", 0.0, type=positive, help="weight of the squared distance to the start"
    )
    opts.add(group, "--max-norm", type=positive, help="longest vector, in mean lengths of the vocabulary")
    opts.add(
        group, "--per-image", 0.0, type=share, help="how often a word for the single photo is in the prompt"
    )
    opts.add(group, "--caption-dropout", 0.0, type=share, help="how often the prompt is the bare word")
    opts.add(group, "--seed", 0, type=number(int, 0, 2**63 - 1), help="of everything random")
    opts.add(group, "--gradient-checkpointing", False, help="less memory, a third more time")
    group = "watching"
    opts.add(group, "--save-every", 500, type=count, help="steps between savings")
    opts.add(group, "--eval-every", 100, type=number(int, 0), help="steps between evaluations; 0: none")
    opts.add(group, "--eval-size", 16, type=count, help="samples in an evaluation")
    opts.add(
        group, "--keep", "last", choices=["last", "best"], help="which vectors to keep: best by eval loss"
    )
    opts.add(
        group,
        "--early-stop",
        type=share,
        help="stop when eval loss varies this much less than at first: 0.15",
    )
    opts.add(group, "--early-stop-window", 10, type=number(int, 2), help="evaluations over which it varies")
    opts.add(group, "--sample-every", 500, type=number(int, 0), help="steps between previews; 0: none")
    opts.add(
        group, "--sample-prompt", [], metavar="TEXT", help="prompt of the previews, with {} for the word"
    )
    opts.add(group, "--sample-steps", 25, type=count, help="DDIM steps of the previews")
    opts.add_model()
    opts.file_only("concepts")
    return opts


def word_specs(opts: Options, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What to learn: the entries of `concepts:` in the config file, or the one word of the flags.

    Beside the options PER_WORD each has a `name`, that of its folder, and an `alias`, what the word is called
    while it is learned. Several entries may learn the same word, from other seeds for instance.

    Raises:
        InputError: an entry cannot be used.
    """
    common = {key: getattr(args, key) for key in PER_WORD}
    if args.concepts is None:
        entries = [{"name": ""}]
    else:
        entries = args.concepts
        if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
            raise InputError(
                "concepts: should list entries like {name: toy, images: DIR, placeholder: <toy>}"
            )
    specs = []
    for entry in entries:
        if unknown := set(entry) - {"name", *PER_WORD}:
            raise InputError(
                f"concepts: unknown key {min(map(str, unknown))!r}; there are name, {', '.join(PER_WORD)}"
            )
        name = str(entry.get("name", ""))
        if args.concepts is not None and not is_name(name):
            raise InputError(
                f"concepts: name {name!r} should consist of letters, digits, - and _, and not be that of a "
                "file or folder that a run writes"
            )
        spec = (
            common
            | opts.check({key: value for key, value in entry.items() if key != "name"})
            | {"name": name}
        )
        for key in ("images", "placeholder"):
            if spec[key] is None:
                raise InputError(
                    f"--{key} must be given" if args.concepts is None else f"concepts: {name} needs {key}"
                )
        word = spec["placeholder"]
        if clean(word) in {clean(other["placeholder"]) for other in specs}:
            # Where a word is found depends on how it begins and ends: its alias does so as well.
            word = f"{word}|{len(specs)}|{word}"
        specs.append(spec | {"alias": word})
    if len({spec["name"] for spec in specs}) < len(specs):
        raise InputError("concepts: two of them have the same name")
    return specs
