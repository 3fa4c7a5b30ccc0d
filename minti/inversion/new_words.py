"""Adding the words that are to be learned to the model, all or none, if they fit into their prompts."""

import logging
from collections.abc import Sequence

from torch import nn

from ..errors import InputError
from ..formats.concept import Concept
from ..model.stable_diffusion import StableDiffusion
from ..model.tokenizer import Tokenizer, clean
from .batches import Settings, Word
from .extensions import add_photo_words
from .prompt_variants import photo_word
from .templates import CONTEXT

log = logging.getLogger(__name__)


def add_words(
    sd: StableDiffusion,
    words: Sequence[Word],
    settings: Settings,
    *,
    replace: bool = False,
    templates: Sequence[str] = (),
) -> tuple[list[nn.Parameter], list[list[nn.Parameter]]]:
    """Teach the model words; the arguments are those of `Inversion`.

    Returns:
        The (num_vectors, D) float32 rows of each word, and for each word those of the words for its photos.

    Raises:
        InputError: a placeholder is taken; the model has no such time steps as the settings ask for; or see
            `check_prompts`. The model knows none of the words then.
    """
    settings.time_range(sd.schedule.config.num_train_timesteps)
    known = sd.tokenizer.placeholders
    try:
        rows = [sd.add_concept(Concept(w.placeholder, w.init), replace=replace) for w in words]
        photo_rows = [add_photo_words(sd, word) if settings.per_image else [] for word in words]
        for word in words:
            check_prompts(sd.tokenizer, word, words, settings, templates)
    except InputError:
        sd.tokenizer.placeholders = known
        raise
    return rows, photo_rows


def check_prompts(
    tokenizer: Tokenizer, word: Word, words: Sequence[Word], settings: Settings, templates: Sequence[str]
) -> None:
    """See that a word can be learned; a warning tells of prompts that name another one of the `words`.

    Args:
        tokenizer: the model's, which knows the words by now.
        word: the word to look at.
        words: all that are learned together.
        settings: how they are learned.
        templates: of prompts that the word will also be used in, beside its own.

    Raises:
        InputError: the word has another number of vectors than `settings.progressive` is for; it occurs in a
            prompt of its own without being put there; or there is no room for its vectors.
    """
    count = 1 + len(settings.progressive)
    if settings.progressive and len(word.init) != count:
        raise InputError(
            f"{word.placeholder!r} has {len(word.init)} vectors, progressive steps are for {count}: "
            "one to start with and one more at each"
        )
    key, learned = clean(word.placeholder), {clean(other.placeholder) for other in words}
    own = (*word.templates, *filter(None, word.captions))
    for text in own:
        pieces = {piece for piece, _ in tokenizer.pieces(text.replace("{}", " "))}
        if key in pieces:
            what = f"placeholder {word.placeholder!r} occurs in the prompt {text!r} itself"
            raise InputError(f"{what}; choose another, such as <{key}>")
        for other in learned & pieces:
            log.warning("%r and %r influence each other: %r names both", word.placeholder, other, text)
    extra = f" with {photo_word(word.placeholder, 0)}" if settings.per_image else ""
    longest = (*(text + extra for text in own), *templates, *(CONTEXT if settings.context_weight else ()))
    tokenizer([text.replace("{}", word.placeholder) for text in longest])
