"""Choosing among pictures of one prompt the one that CLIP finds closest to it."""

from collections.abc import Iterable, Sequence

from PIL import Image

from ..errors import InputError
from .prompts import replace_words
from .scorer import Scorer


def ranking_text(prompt: str, learned_words: Iterable[str]) -> str:
    """What pictures of a prompt are compared with: the prompt without the learned words.

    Raises:
        InputError: nothing else is in the prompt.
    """
    text = replace_words(prompt, learned_words)
    if not any(c.isalnum() for c in text):
        raise InputError(f"{prompt!r} says nothing but the learned word, which CLIP does not know; add to it")
    return text


def closest(scorer: Scorer, text: str, images: Sequence[Image.Image]) -> tuple[int, float]:
    """The index of the picture closest to a text, and the cosine of their embeddings, -1 to 1."""
    cosines = scorer.embed_images(images) @ scorer.embed_texts([text])[0]  # (n,)
    return int(cosines.argmax()), cosines.max().item()
