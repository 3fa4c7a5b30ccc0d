"""Prompts that are the bare word, or also hold a word for their photo: options that are off by default."""

from .settings import Settings


def photo_word(placeholder: str, photo: int) -> str:
    """The word that belongs to one photo only, "<toy>:0"."""
    return f"{placeholder}:{photo}"


def vary_prompt(
    template: str, placeholder: str, photo: int, settings: Settings, drop: float, with_photo: float
) -> str:
    """The prompt of a sample.

    Args:
        template: a prompt with {} in the place of the word.
        photo: the photo that the sample shows.
        drop, with_photo: random numbers from 0 to 1, for `caption_dropout` and `per_image` of the settings.
    """
    text = "{}" if drop < settings.caption_dropout else template
    if with_photo < settings.per_image:
        text += f" with {photo_word(placeholder, photo)}"
    return text.replace("{}", placeholder)
