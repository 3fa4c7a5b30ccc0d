"""What an evaluation scores: words, captions and references in every prompt, or pictures in files."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..formats.concept import Concept, refuse_folder
from ..formats.reading import check_regular
from ..model.stable_diffusion import StableDiffusion
from ..model.tokenizer import clean
from .benchmark import word_jobs
from .picture_jobs import PictureJob, Protocol, file_name, files_job, models_of
from .prompts import Prompt, PromptList, check_prompt, fill, load_prompts, replace_words
from .scorer import Scorer

SMALL_VOCABULARY = 10_000  # words; a model that knows fewer does not know what ordinary prompts speak of


@dataclass(frozen=True)
class Subject:
    """One way of asking for the concept.

    Attributes:
        name, kind: those of its `Evaluation`.
        text: what is put in the place of {}.
    """

    name: str
    kind: str
    text: str


@dataclass
class EvaluationPlan:
    """Everything that an evaluation has to do; nothing has been made or written yet.

    Attributes:
        jobs: for each subject the pictures of every prompt.
        settings: how the pictures are made, for the record.
    """

    prompts: PromptList
    jobs: dict[Subject, dict[str, PictureJob]]
    settings: dict[str, Any]


# Words, captions, references
# ----------------------------------------------------------------------------------------------------------


def find_words(argument: str) -> list[Path]:
    """The files that an argument of --concept names: a file; or the saved steps of a run, and its last word.

    The last word is that of `learned_embeds.safetensors`. It is left out if it equals one of the steps.

    Raises:
        InputError: a folder without a learned word; a file that cannot be read.
    """
    path = Path(argument)
    if not path.is_dir():
        return [path]
    steps = next(filter(None, (sorted(f.glob("step-*.safetensors")) for f in (path / "embeds", path))), [])
    steps = [step for step in steps if step.stem.removeprefix("step-").isdecimal()]
    final = path / "learned_embeds.safetensors"
    if not final.exists():
        if not steps:
            refuse_folder(path)
        return steps
    last = Concept.load(final).digest
    return steps if any(Concept.load(step).digest == last for step in steps) else [*steps, final]


def add_words(sd: StableDiffusion, words: Sequence[tuple[Path, Concept]]) -> list[Subject]:
    """Teach the model all words at once, each under a name of its own that no prompt contains by chance.

    Raises:
        InputError: a word was learned for another kind of model.
    """
    found = []
    for i, (path, concept) in enumerate(words):
        internal = f"<{concept.placeholder.strip('<>')}#{i}>"
        try:
            sd.add_concept(replace(concept, placeholder=internal))
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


def plan_generation(
    sd: StableDiffusion, scorer: Scorer, subjects: Sequence[Subject], prompts: PromptList, protocol: Protocol
) -> EvaluationPlan:
    """Pictures of every subject in every prompt.

    Raises:
        InputError: a prompt has no room for a word; the size or the number of steps does not suit the model.
    """
    inputs = models_of(sd, scorer)
    jobs = {s: word_jobs(sd, prompts, s.text, protocol, inputs, name=s.name) for s in subjects}
    settings = asdict(protocol) | {"size": list(sd.check_size(protocol.size))}
    del settings["batch_size"]
    return EvaluationPlan(prompts, jobs, settings)


def list_name(vocabulary: int, style: bool) -> str:
    """The list of prompts for a model that knows so many words, and for a word learned as a style or not."""
    if vocabulary < SMALL_VOCABULARY:
        return "tiny-style" if style else "tiny"
    return "style" if style else "object"


def choose_prompts(name: str, reconstruction: str | None) -> PromptList:
    """A list of prompts, with another one for reconstruction if that is given. Raises InputError."""
    prompts = load_prompts(name)
    if reconstruction is None:
        return prompts
    check_prompt(reconstruction, "--reconstruction-prompt")
    others = [prompt for prompt in prompts.prompts if prompt.text != reconstruction]
    return replace(prompts, prompts=others, reconstruction=reconstruction)


# Pictures of other tools
# ----------------------------------------------------------------------------------------------------------


def plan_samples(
    scorer: Scorer, folder: Path, placeholder: str, reconstruction: str | None
) -> EvaluationPlan:
    """Pictures that exist already, by the prompts that they were made from.

    Args:
        folder: the pictures and their prompts.csv; see `read_samples`.
        placeholder: the learned word in those prompts.
        reconstruction: the prompt that only names the concept, with {}; by default that of a `PromptList`.

    Raises:
        InputError: the table cannot be used, or has no picture of the prompt for reconstruction.
    """
    paths = read_samples(folder, placeholder)
    reconstruction = fill(clean(reconstruction or PromptList(()).reconstruction), "{}")
    if reconstruction not in paths:
        raise InputError(
            f"{folder}: no picture of {fill(reconstruction, placeholder)!r} to compare with the photos; "
            "say with --reconstruction-prompt 'TEXT with {}' which prompt only names the thing"
        )
    prompts = PromptList([Prompt(t) for t in paths if t != reconstruction], reconstruction)
    name = file_name(placeholder)
    jobs = {t: files_job(scorer, paths[t], f"{name}/{file_name(t)}") for t in prompts.templates}
    return EvaluationPlan(prompts, {Subject(placeholder, "word", placeholder): jobs}, {})


def read_samples(folder: Path, placeholder: str) -> Mapping[str, list[Path]]:
    """prompts.csv: each prompt, cleaned and with {} for the word, and its pictures.

    Raises:
        InputError: there is no such file; a row is incomplete; a picture does not exist; a prompt lacks the
            word, or says nothing else.
    """
    path = folder / "prompts.csv"
    if path.exists():
        check_regular(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            entries = list(csv.DictReader(file))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); it should list file, prompt") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not a table in CSV ({error})") from None
    found: dict[str, list[Path]] = {}
    for number, entry in enumerate(entries, 2):
        if not entry.get("file") or not entry.get("prompt"):
            raise InputError(f"{path}: row {number} lacks file or prompt; the first row is: file,prompt")
        picture = folder / entry["file"]
        if not picture.is_file():
            raise InputError(f"{path}: row {number} names {entry['file']}, which is not there")
        template = fill(replace_words(entry["prompt"], [placeholder], "{}"), "{}")
        check_prompt(template, f"{path}: row {number}, with {{}} for {placeholder!r}")
        found.setdefault(template, []).append(picture)
    if not found:
        raise InputError(f"{path}: lists no pictures; write rows like: 1.png,a photo of {placeholder}")
    return found
