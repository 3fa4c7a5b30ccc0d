"""Reading JSON files in which every key is checked, and one that is not understood is refused by name.

A config is described by a table, {key: (default, check)}. A check returns the value or raises ValueError with
what was expected, so that reading and refusing are one mechanism. A key that stands in no table is refused by
name, unless it is `HARMLESS` or its value switches nothing on (null, false, 0 or empty).
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from .reading import naming, read_bytes

Check = Callable[[Any], Any]
Table = Mapping[str, tuple[Any, Check]]

REQUIRED = object()  # stands for the default of a key that has no sensible one
JSON_LIMIT = 64 * 2**20  # bytes; the largest files that are read, tokenizers, have four million

# transformers: bookkeeping, dropout, the initialisation of training, and settings for generating text.
BOOKKEEPING = """
    transformers_version torch_dtype dtype id2label label2id return_dict output_hidden_states use_cache
    initializer_range initializer_factor logit_scale_init_value dropout attention_dropout bos_token_id
    pad_token_id tie_word_embeddings max_length num_beams num_beam_groups length_penalty repetition_penalty
    num_return_sequences temperature top_k top_p typical_p
"""
# diffusers: samplers (minti samples with DDIM, whichever is recommended), the heads of an embedding that is
# not supported, and the dtype that SDXL's autoencoder needs. `clip_sample` is for pictures: latents are not
# bounded by 1, and the pipeline of diffusers switches it off, too.
SAMPLING = """
    clip_sample clip_sample_range sample_max_value dynamic_thresholding_ratio variance_type skip_prk_steps
    interpolation_type use_karras_sigmas use_exponential_sigmas use_beta_sigmas use_lu_lambdas sigma_min
    sigma_max final_sigmas_type algorithm_type solver_type solver_order solver_p lower_order_final
    euler_at_final lambda_min_clipped predict_x0 disable_corrector flow_shift time_shift_type predictor_order
    corrector_order addition_embed_type_num_heads
"""
HARMLESS = frozenset(f"{BOOKKEEPING} {SAMPLING}".split())


def whole(low: int, high: int) -> Check:
    """A whole number from `low` to `high`."""
    return _number(lambda v: type(v) is int and low <= v <= high, f"whole numbers {low} to {high}")


def real(low: float, high: float) -> Check:
    """A number between `low` and `high`, which are excluded; so are NaN and infinity."""
    kinds = (int, float)
    return _number(lambda v: type(v) in kinds and low < v < high, f"numbers between {low:g} and {high:g}")


def _number(fits: Callable[[Any], bool], expected: str) -> Check:
    def check(value: Any) -> Any:
        if not fits(value):
            raise ValueError(expected)
        return value

    return check


def one_of(*allowed: Any) -> Check:
    """One of a few values."""

    def check(value: Any) -> Any:
        if value not in allowed:
            names = [repr(name) for name in allowed[:4]]
            raise ValueError(" or ".join(names) + (" and the like" if len(allowed) > 4 else ""))
        return value

    return check


def optional(inner: Check) -> Check:
    """Null, or what another check allows."""
    return lambda value: None if value is None else inner(value)


def each(inner: Check, most: int) -> Check:
    """A list of 1 to `most` values, each of which another check allows."""

    def check(value: Any) -> tuple:
        try:
            if isinstance(value, list | tuple) and 1 <= len(value) <= most:
                return tuple(map(inner, value))
            raise ValueError("values that are")
        except ValueError as error:
            raise ValueError(f"a list of at most {most}: {error}") from None

    return check


def number_or_list(inner: Check) -> Check:
    """One value for all levels, or a list with one for each; see `per_level`."""
    return lambda value: each(inner, 64)(value) if isinstance(value, list | tuple) else inner(value)


def text(value: Any) -> str:
    """A name."""
    if not isinstance(value, str):
        raise ValueError("text")
    return value


flag = one_of(False, True, None)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError if there is none."""
    content = read_bytes(path, JSON_LIMIT)
    with naming(path, "valid JSON"):
        value = json.loads(content.decode("utf-8-sig"))  # with or without a byte order mark
    if not isinstance(value, dict):
        raise InputError(f"{path}: should hold a JSON object; download it again")
    return value


def read_keys(raw: Mapping[str, Any], table: Table, source: str) -> dict[str, Any]:
    """The value of every key of a table, checked; see the top of this module.

    Raises:
        InputError: naming the config `source`, the key, its value and what is supported.
    """
    required = [key for key, (default, _) in table.items() if default is REQUIRED]
    if missing := [key for key in required if raw.get(key) is None]:
        raise InputError(
            f"{source}: {', '.join(missing)} missing; is this the config of another kind of model?"
        )
    values = {}
    for key, (default, check) in table.items():
        try:
            values[key] = check(raw[key]) if key in raw else default
        except ValueError as error:
            raise _unsupported(source, key, raw[key], f"only {error}") from None
    for key, value in raw.items():
        if value and key not in table and key not in HARMLESS and not key.startswith("_"):
            raise _unsupported(source, key, value, "minti does not implement this key")
    return values


def _unsupported(source: str, key: str, value: Any, why: str) -> InputError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    return InputError(f"{source}: {key} = {shown} is not supported, {why}")
