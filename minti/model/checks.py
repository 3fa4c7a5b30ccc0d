"""What `StableDiffusion` refuses: impossible options, broken weights, numbers that overflow."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from ..errors import InputError, check_number

MAX_SIDE = 16384  # pixels
OUTPUT = "_out"  # how the keys of vectors end that stand in a text encoder's output; see `output_embedding`
FAMILIES = {768: "SD 1.x", 1024: "SD 2.x", 1280: "LDM, or SDXL's second encoder", 2048: "SDXL, 768 + 1280"}


class LearnedWord(Protocol):
    """What the model needs to know of a `Concept`; see there."""

    placeholder: str
    vectors: Tensor
    widths: dict[str, int]


def is_per_layer(keys: Iterable[str]) -> bool:
    """Whether the parts of a word's vectors are for the cross-attention layers of a UNet; see `per_layer`."""
    return any(re.fullmatch(r"IN\d\d|MID|OUT\d\d", key) for key in keys)


def has_outputs(keys: Iterable[str]) -> bool:
    """Whether parts of a word's vectors stand in the output of a text encoder; see `output_embedding`."""
    return any(key.endswith(OUTPUT) for key in keys)


def is_plain(keys: Iterable[str]) -> bool:
    """Whether all parts of a word's vectors are rows of tables of word vectors, one for each text encoder."""
    return not is_per_layer(keys) and not has_outputs(keys)


def encoder_of(widths: Mapping[str, int]) -> str:
    """What kind of text encoder has word vectors of these parts and widths; see `Concept.widths`."""
    outputs = [width for key, width in widths.items() if key.endswith(OUTPUT)]
    width = next(iter(widths.values())) if is_per_layer(widths) else sum(outputs or widths.values())
    family = f" ({FAMILIES[width]})" if width in FAMILIES else ""
    layers = f" with words for {len(widths)} layers, {', '.join(widths)}" if is_per_layer(widths) else ""
    return f"{width}-wide encoder{family}{layers}"


def check_options(prompts: Sequence[str], seeds: Sequence[int], options: Mapping[str, object]) -> None:
    """Raise InputError unless these can be options of `StableDiffusion.denoise`."""
    for prompt in (*prompts, options.get("negative_prompt") or ""):
        if not isinstance(prompt, str):
            raise InputError(f"prompt {prompt!r}: should be text, or a list of texts")
    for seed in seeds:
        check_number("seed", seed, int, 0, 2**64 - 1)
    check_number("steps", options["steps"], int, 1)
    check_number("guidance_scale", options.get("guidance_scale", 1), float, 0, 1e6)
    check_number("eta", options["eta"], float, 0, 1)


def check_size(size: object, default: tuple[int, int], f: int) -> tuple[int, int]:
    """Width and height in pixels.

    Args:
        size: a number for both, (width, height), or None for the default.
        default: what the model was trained on.
        f: what both must be multiples of.

    Raises:
        InputError: they are not.
    """
    size = default if size is None else size
    sides = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(sides) != 2:
        raise InputError(f"size {size!r}: should be one number, or width and height")
    for side in sides:
        check_number("size", side, int, 1, MAX_SIDE)
    if any(side % f for side in sides):
        up, text = ("x".join(str(side) for side in both) for both in ([-(-s // f) * f for s in sides], sides))
        raise InputError(f"size {text}: both sides must be multiples of {f}, for instance {up}")
    return sides


def check_vectors(word: LearnedWord) -> None:
    """Raise InputError unless the vectors of a word are 1 to 75 of finite numbers."""
    vectors = word.vectors
    if not isinstance(vectors, Tensor) or vectors.ndim != 2 or not 0 < len(vectors) <= 75:
        raise InputError(f"{word.placeholder!r}: its vectors should be a tensor (n, D), with n from 1 to 75")
    if not vectors.isfinite().all():
        raise InputError(f"{word.placeholder!r}: has vectors that are not finite; learn it again")


def check_fit(word: LearnedWord, own: Mapping[str, int]) -> None:
    """Raise InputError unless a learned word fits a model, whose word vectors have these parts and widths."""
    width = word.vectors.shape[1]
    theirs = word.widths or {"": width}
    fits = width == sum(own.values()) and (is_plain(theirs) or [*theirs.values()] == [*own.values()])
    if not fits or (is_per_layer(theirs) and [*theirs] != [*own]):
        raise InputError(
            f"{word.placeholder!r} was learned on a {encoder_of(theirs)}, this checkpoint has a "
            f"{encoder_of(own)}; use the model it was learned on"
        )


class Model(Protocol):
    """What the checks need to know of a `StableDiffusion`."""

    source: str
    text_encoder: nn.Module
    unet: nn.Module
    vae: nn.Module


def check_output(output: Tensor, what: str, model: Model) -> None:
    """Raise InputError if an output is not finite, because of a weight or of an overflow.

    The weights are looked at only then: when they are loaded, it would take seconds.
    """
    if not output.isfinite().all():
        check_weights(model)
        dtype = str(output.dtype).removeprefix("torch.")
        raise InputError(f"{model.source}: the {what} overflows in {dtype}; use --dtype bfloat16 or float32")


def check_weights(model: Model) -> None:
    """Raise InputError with the name of a weight that is NaN or infinite, be it only in this dtype."""
    for part in ("text_encoder", "unet", "vae"):
        for name, weight in getattr(model, part).named_parameters():
            if not weight.isfinite().all():
                dtype = str(weight.dtype).removeprefix("torch.")
                remedy = "use another --dtype, or download it again"
                raise InputError(f"{model.source}: {part} {name} holds NaN or infinity as {dtype}; {remedy}")
