"""The model that the options of a command ask for, and the learned words that it is to know."""

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from ..formats.checkpoint import load
from ..formats.concept import Concept
from ..model import kernels
from ..model.stable_diffusion import StableDiffusion

LAID_OVER = ("unet", "text_encoder")  # files of weights that replace those of the checkpoint
# Options that must be the same where a word is learned and where it is used.
OF_A_MODEL = ("tokenizer", "variant", "ema", "vae", "schedule", "prediction_type", "clip_skip", *LAID_OVER)


def load_model(args: argparse.Namespace) -> StableDiffusion:
    """The model that the options of `Options.add_model` ask for."""
    sd = load(args.checkpoint, **{key: getattr(args, key) for key in (*OF_A_MODEL, "device", "dtype")})
    kernels.use(args.attention, sd.device)
    sd.vae.tile = args.vae_tile and args.vae_tile // sd.vae.config.downscale
    return sd


def laid_over(args: argparse.Namespace) -> dict[str, str]:
    """The files of weights that replace those of the checkpoint, for the record: option -> path."""
    return {key: getattr(args, key) for key in LAID_OVER if getattr(args, key) is not None}


def made_of(args: argparse.Namespace, *photos: str) -> dict[str, str]:
    """Digests of what pictures depend on beside the values of options: learned words, and files of options.

    They are for the settings of a `WorkFolder`, which then refuses to continue with another word or file.

    Args:
        photos: the options that name photos.
    """
    found = {f"word {word}": concept.digest for word, (_, concept) in load_concepts(args.concept).items()}
    for key in ("vae", *LAID_OVER, *photos):
        given, digest = getattr(args, key), hashlib.sha256()
        for path in map(Path, given if isinstance(given, list) else filter(None, [given])):
            # What is not there, or is no file, is refused where it is read.
            for file in sorted(p for p in (path, *path.rglob("*")) if p.is_file()):
                with open(file, "rb") as content:
                    while chunk := content.read(2**20):
                        digest.update(chunk)
        if given:
            found[key] = digest.hexdigest()[:12]
    return found


def load_concepts(arguments: Sequence[str]) -> dict[str, tuple[str, Concept]]:
    """Learned words by name, with their files, from the arguments of --concept: FILE, or WORD=FILE."""
    concepts: dict[str, tuple[str, Concept]] = {}
    for text in arguments:
        word, equals, file = text.partition("=")
        if not equals or Path(text).exists():
            word, file = None, text
        for concept in [Concept.load(file, word)] if word else Concept.load_all(file):
            if concept.placeholder in concepts:
                raise InputError(
                    f"{file}: {concept.placeholder!r} is learned twice; rename one: --concept '<new>={file}'"
                )
            concepts[concept.placeholder] = file, concept
    return concepts


def load_model_with_words(args: argparse.Namespace) -> tuple[StableDiffusion, dict[str, Concept]]:
    """The model, and the words of --concept by name, which it has been taught.

    Raises:
        InputError: a word was learned for another kind of model, or its name has a meaning already.
    """
    learned, sd = load_concepts(args.concept), load_model(args)
    for word, (file, concept) in learned.items():
        try:
            sd.add_concept(concept)
        except InputError as error:
            if not str(error).startswith("placeholder"):
                raise InputError(f"{file}: {error}") from None
            new = "<new>" if word.startswith("<") else f"<{word}>"
            raise InputError(f"{file}: {error}: --concept '{new}={file}'") from None
    return sd, {word: concept for word, (_, concept) in learned.items()}
