"""What `minti.evaluate` is asked to score, as jobs: words, captions, references in every prompt; or files."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..cli.model_options import load_model
from ..errors import InputError
from ..formats.checkpoint import choose_device
from ..formats.concept import Concept
from ..model.stable_diffusion import StableDiffusion
from ..model.tokenizer import clean, replace_words
from ..runs.verdict import Run
from ..version import __version__
from .benchmark import word_jobs
from .picture_jobs import Job, Protocol, file_name, files_job
from .prompts import Prompt, PromptList, check_prompt, fill, load_prompts
from .scorer import Scorer, choose_clip

SMALL_VOCABULARY = 10_000  # words; a model that knows fewer cannot know what ordinary prompts speak of


@dataclass(frozen=True)
class Subject:
    """One way of asking for the concept: what is put in the place of {}."""

    name: str
    kind: str  # as of `Evaluation`
    text: str


@dataclass
class Plan:
    """Everything that is to be done; nothing has been made or written yet.

    Attributes:
        jobs: for each subject, the pictures of every prompt.
        model, settings: for the record.
    """

    scorer: Scorer
    prompts: PromptList
    jobs: dict[Subject, dict[str, Job]]
    model: dict[str, Any]
    settings: dict[str, Any]


# Words, captions, references
# ----------------------------------------------------------------------------------------------------------


def plan_generation(args: argparse.Namespace, style: bool) -> Plan:
    """Pictures of every word, caption and reference in every prompt.

    Args:
        style: the word was learned from templates for a style.

    Raises:
        InputError: whatever is missing or does not fit together.
    """
    if args.checkpoint is None or not (args.concept or args.caption):
        raise InputError("--checkpoint and --concept must be given (or --samples); see --help")
    clip = choose_clip(args.clip, args.checkpoint)
    paths = [path for argument in args.concept for path in find_words(argument)]
    concepts = [Concept.load(path) for path in paths]
    sd = load_model(args)
    sd.schedule.timesteps(args.steps)
    if args.compile:
        sd.compile()
    scorer = Scorer.load(clip, device=sd.device, tokenizer=args.clip_tokenizer)
    name, prompts = choose_prompts(args, sd, style)
    subjects = add_words(sd, paths, concepts)
    subjects += [Subject(caption, "caption", caption) for caption in dict.fromkeys(args.caption)]
    if args.references:
        subjects.append(Subject("prompt only", "prompt only", ""))
    protocol = Protocol(**{key: getattr(args, key) for key in Protocol.__dataclass_fields__})
    jobs = {s: word_jobs(sd, scorer, prompts, s.text, protocol, name=s.name) for s in subjects}
    model = {"checkpoint": str(args.checkpoint), "dtype": str(sd.dtype).removeprefix("torch.")}
    settings = asdict(protocol) | {"size": list(sd.check_size(args.size)), "prompts": name}
    del settings["batch_size"]
    return Plan(scorer, prompts, jobs, model | _judge(clip), settings)


def find_words(argument: str) -> list[Path]:
    """The files that an argument of --concept means: itself, or the saved steps of a run."""
    path = Path(argument)
    if not path.is_dir():
        return [path]
    steps = Run(path).numbered("embeds", "safetensors") or sorted(path.glob("step-*.safetensors"))
    final = path / "learned_embeds.safetensors"
    if not steps and not final.exists():
        raise InputError(f"{path}: no learned word in it; give the folder of a run, or a file")
    return steps or [final]


def add_words(sd: StableDiffusion, paths: Sequence[Path], concepts: Sequence[Concept]) -> list[Subject]:
    """Teach the model all words at once, each under a name of its own that no prompt contains by chance."""
    found = []
    for i, (path, concept) in enumerate(zip(paths, concepts, strict=True)):
        internal = f"<{concept.placeholder.strip('<>')}#{i}>"
        try:
            sd.add_concept(Concept(internal, concept.vectors))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        step = path.stem.removeprefix("step-")
        name = f"step {int(step)}" if step.isdecimal() and step != path.stem else concept.placeholder
        found.append((name, path, internal))
    names = [name for name, _, _ in found]
    return [
        Subject(name if names.count(name) == 1 else str(path), "word", internal)
        for name, path, internal in found
    ]


def choose_prompts(args: argparse.Namespace, sd: StableDiffusion, style: bool) -> tuple[str, PromptList]:
    """The list of prompts and its name; "auto" goes by what was learned and by how much the model knows."""
    name = args.prompts
    if name == "auto":
        small = len(sd.vocabulary) < SMALL_VOCABULARY
        name = ("tiny-style" if style else "tiny") if small else ("style" if style else "object")
    prompts = load_prompts(name)
    if args.reconstruction_prompt is not None:
        check_prompt(args.reconstruction_prompt, "--reconstruction-prompt")
        others = [p for p in prompts.prompts if p.text != args.reconstruction_prompt]
        prompts = PromptList(others, args.reconstruction_prompt)
    return name, prompts


def _judge(clip: str) -> dict[str, str]:
    return {"clip": str(clip), "minti": __version__}


# Pictures of other tools
# ----------------------------------------------------------------------------------------------------------


def plan_samples(args: argparse.Namespace) -> Plan:
    """Pictures that are there, by the prompts that they were made of.

    Raises:
        InputError: whatever is missing or does not fit together.
    """
    if args.placeholder is None or args.concept or args.caption:
        raise InputError("--samples goes with --placeholder, and without --concept and --caption")
    clip = choose_clip(args.clip, args.checkpoint)
    paths = read_samples(Path(args.samples), args.placeholder)
    reconstruction = fill(clean(args.reconstruction_prompt or PromptList(()).reconstruction), "{}")
    if reconstruction not in paths:
        raise InputError(
            f"{args.samples}: no picture of {fill(reconstruction, args.placeholder)!r} to compare with the "
            "photos; say with --reconstruction-prompt 'TEXT with {}' which prompt only names the thing"
        )
    prompts = PromptList([Prompt(t) for t in paths if t != reconstruction], reconstruction)
    scorer = Scorer.load(clip, device=choose_device(args.device), tokenizer=args.clip_tokenizer)
    subject = Subject(args.placeholder, "word", args.placeholder)
    folder = file_name(subject.name)
    jobs = {t: files_job(scorer, paths[t], f"{folder}/{file_name(t)}") for t in prompts.templates}
    return Plan(scorer, prompts, {subject: jobs}, {"samples": str(args.samples)} | _judge(clip), {})


def read_samples(folder: Path, placeholder: str) -> dict[str, list[Path]]:
    """prompts.csv: each prompt, cleaned and with {} for the word, and its pictures.

    Raises:
        InputError: no such file, a row that is incomplete, a picture that is not there, a prompt without the
            word or with nothing else.
    """
    path = folder / "prompts.csv"
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); it should list file, prompt") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not a table in CSV ({error})") from None
    found: dict[str, list[Path]] = {}
    for number, row in enumerate(rows, 2):
        if not row.get("file") or not row.get("prompt"):
            raise InputError(f"{path}: row {number} lacks file or prompt; the first row is: file,prompt")
        picture = folder / row["file"]
        if not picture.is_file():
            raise InputError(f"{path}: row {number} names {row['file']}, which is not there")
        template = fill(replace_words(row["prompt"], [placeholder], "{}"), "{}")
        check_prompt(template, f"{path}: row {number}, with {{}} for {placeholder!r}")
        found.setdefault(template, []).append(picture)
    if not found:
        raise InputError(f"{path}: lists no pictures; write rows like: 1.png,a photo of {placeholder}")
    return found
