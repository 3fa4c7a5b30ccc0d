"""The kinds of files that `fuzz.py` damages, and how minti reads each.

All paths are relative to a folder that holds one folder for each kind, which is the working directory.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from minti import concept, evaluate, report, sample, train
from minti.formats.photos import load_photos
from minti.formats.views import make_views
from minti.formats.vocabulary import read_tokenizer
from minti.judge.scorer import Scorer
from minti.study import __main__ as study
from minti.study.classifier import Judge

from . import inputs

Steps = list[Callable[[], object]]


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        make: makes good files in an empty folder.
        read: what to call, one after the other, to read the folder in which this file was damaged.
        written: whether reading also writes into the folder, as a command does that continues its work; then
            the folder is not there before `make`.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], Steps]
    written: bool = False


# What a damaged file may ask for, and what would only take time, is given on the command line.
CHEAP = [
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--no-compile",
    "--size",
    "16",
    "--sample-steps",
    "1",
    "--batch-size",
    "1",
]
SHORT = [
    "--steps",
    "2",
    "--accumulate",
    "1",
    "--eval-size",
    "1",
    "--save-every",
    "1",
    "--eval-every",
    "2",
    "--sample-every",
    "0",
]
SCORED = ["--num-images", "1", "--prompts", "texts/prompts.txt", "--images", "texts", *CHEAP]
STUDIED = [
    "--device",
    "cpu",
    "--no-compile",
    "--num-images",
    "1",
    "--sample-steps",
    "1",
    "--sample-batch-size",
    "1",
    "--repeats",
    "1",
]


def call(main: Callable[[Sequence[str]], None], *argv: str | Sequence[str]) -> Callable[[], None]:
    """A command with arguments, some of which may be lists of them."""
    flat = [part for item in argv for part in ([item] if isinstance(item, str) else item)]
    return partial(main, flat)


def sampling(checkpoint: str, *more: str) -> Callable[[], None]:
    argv = ["--checkpoint", checkpoint, "--prompt", "a photo of a cat", "--num-images", "1"]
    return call(sample.main, argv, CHEAP, "--out", "out/pictures", *more)


def training(*more: str | Sequence[str]) -> Callable[[], None]:
    return call(train.main, *more, CHEAP, SHORT)


WORD_FLAGS = ["--images", "texts", "--placeholder", "<cat>", "--init-word", "cat", "--checkpoint", "model"]


def scoring(*more: str) -> Callable[[], None]:
    return call(evaluate.main, "--checkpoint", "model", "--concept", "words/own.safetensors", SCORED, *more)


def studying(*more: str) -> Callable[[], None]:
    return call(study.main, "recipes/study.yaml", STUDIED, *more)


def read_single(path: Path) -> Steps:
    weights = path if path.suffix in (".safetensors", ".ckpt") else Path("single/model.safetensors")
    return [sampling(str(weights))]


def read_judge(path: Path) -> Steps:
    return [lambda: Scorer.load("judge").measure([inputs.picture(16, 16)]), lambda: Judge.load(Path("judge"))]


def read_tokenizers(path: Path) -> Steps:
    of = path if path.parent.name == "tokenizers" else path.parent
    return [lambda: read_tokenizer(of)(["a Photo of <cat>, naïve 你好 42!"])]


def read_word(path: Path) -> Steps:
    convert = call(concept.main, "convert", str(path), "out/word.safetensors")
    return [call(concept.main, "inspect", str(path)), convert, sampling("model", "--concept", str(path))]


def read_photos(path: Path) -> Steps:
    return [lambda: list(make_views(load_photos("photos"), 16, crop="random", flip=True))]


def read_texts(path: Path) -> Steps:
    if path.name == "templates.txt":
        return [training(WORD_FLAGS, "--templates", str(path), "--out", "out")]
    if path.name == "prompts.txt":
        return [scoring("--out", "out")]
    samples = ["--samples", "texts", "--placeholder", "<cat>", "--images", "texts", "--clip", "model"]
    return [call(evaluate.main, samples, "--device", "cpu", "--out", "out")]


def read_recipe(path: Path) -> Steps:
    config = ["--config", str(path), "--out", "out"]
    if path.stem in ("train", "words"):
        return [training(config)]
    if path.stem == "sample":
        return [call(sample.main, config, CHEAP, "--rank-by-clip", "1", "--num-images", "1")]
    if path.stem == "evaluate":
        return [call(evaluate.main, config, SCORED)]
    opts = study.options()
    argv = ["recipes/study.yaml", "--out", "out", *STUDIED]
    return [lambda: study.plan_of(opts.parse(argv, required=[], base=study.read_recipe(argv[0])))]


def make_run(folder: Path) -> None:
    """Runs of one word and of several. How long a step took is the only thing that differs each time."""
    training(WORD_FLAGS, "--out", "run/one")()
    training("--config", "recipes/words.yaml", "--out", "run/two")()
    for path in folder.rglob("log.csv"):
        path.write_text(re.sub(r",[\d.]+$", ",0.1", path.read_text(), flags=re.MULTILINE))


def read_run(path: Path) -> Steps:
    run = "/".join(path.parts[:2])
    again, word = ["--resume"], run
    if run == "run/two":
        word = f"{run}/dog" if "dog" in path.parts else f"{run}/cat"
        again += ["--config", "recipes/words.yaml"]
    scored = call(evaluate.main, "--concept", word, SCORED, "--checkpoint", "model", "--out", "out/scores")
    return [call(report.main, run), training(again, "--out", run), scored]


# In an order in which each needs only files of those before it.
KINDS = {
    "tokenizers": Kind(inputs.make_tokenizers, read_tokenizers),
    "photos": Kind(inputs.make_photos, read_photos),
    "model": Kind(inputs.make_model, lambda path: [sampling("model", "--rank-by-clip", "2")]),
    "words": Kind(inputs.make_words, read_word),
    "single": Kind(inputs.make_single, read_single),
    "judge": Kind(inputs.make_judge, read_judge),
    "texts": Kind(inputs.make_texts, read_texts),
    "recipes": Kind(inputs.make_recipes, read_recipe),
    "run": Kind(make_run, read_run, written=True),
    "evaluation": Kind(
        lambda folder: scoring("--out", "evaluation")(),
        lambda path: [scoring("--out", "evaluation")],
        written=True,
    ),
    "study": Kind(
        lambda folder: studying("--out", "study")(), lambda path: [studying("--out", "study")], written=True
    ),
}

TRAINED = {"texts", "recipes", "run", "study"}  # those that are read by learning a word
