"""Ways of making pictures of a concept: with a learned word at the guidance of the study, and its rivals."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import InputError, check_number

TUNED = ("pivotal", "dreambooth")
RARE_WORD = "sks"  # what DreamBooth calls the concept, before the word for its class


@dataclass(frozen=True)
class Way:
    """How pictures are made. Impossible values raise InputError.

    Attributes:
        guidance: guidance scale; None: that of the study.
        text: what prompts call the concept instead of a learned word: a kind of its captions, or "init_word".
        tune: "pivotal": the UNet is tuned around the word; "dreambooth": with a rare word in its place.
        tune_steps, tune_lr, class_images: how; see `minti.tune`.
        clip_guidance: scale; see `edit.clip_guidance`.
        from_photo: begin with the first photo of the concept, instead of with noise.
        show_photos: show all its photos to a model that is unCLIP, beside the prompt.
    """

    guidance: float | None = None
    text: str = ""
    tune: str = ""
    tune_steps: int = 300
    tune_lr: float = 5e-5
    class_images: int = 24
    clip_guidance: float = 0.0
    from_photo: bool = False
    show_photos: bool = False

    def __post_init__(self) -> None:
        for name in ("guidance", "tune_lr", "clip_guidance"):
            if (value := getattr(self, name)) is not None:
                check_number(name, value, float, 0, 1e6)
        check_number("tune_steps", self.tune_steps, int, 1)
        check_number("class_images", self.class_images, int, 1, 4096)
        if not isinstance(self.text, str):
            raise InputError(f"text {self.text!r}: name a kind of caption, or init_word")
        if self.tune not in ("", *TUNED):
            raise InputError(f"tune {self.tune!r}: choose from {', '.join(TUNED)}")
        for name in ("from_photo", "show_photos"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} {getattr(self, name)!r}: should be true or false")
        if self.tune and (self.text or self.clip_guidance or self.from_photo or self.show_photos):
            raise InputError("tune: goes neither with text nor with clip_guidance, from_photo or show_photos")

    @property
    def has_word(self) -> bool:
        """Whether a word is learned for it."""
        return not self.text and self.tune != "dreambooth"


PLAIN = Way()
WAYS = tuple(f.name for f in fields(Way))


def way_of(values: Mapping[str, Any], scale: float = 1.0) -> Way:
    """That of the settings of a setup, with numbers of steps times `scale`. Raises InputError."""
    own = {key: values[key] for key in WAYS if values.get(key) is not None}
    way = Way(**own)
    return Way(**own | {"tune_steps": max(1, round(way.tune_steps * scale))})
