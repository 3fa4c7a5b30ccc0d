"""What files of learned words hold, whatever program wrote them; the file's name only gives a word its name.

diffusers           {word: (n, D)}, or (D,); also {word: (D,), word_1: (D,), ...} for several vectors
AUTOMATIC1111       {string_to_param: {"*": (n, D)}, name, step, ...}, in a pickle or in the text of a PNG
                    picture; the word is the file's name. As safetensors like kohya's
the official code   {string_to_param: ParameterDict, string_to_token: ...}
LoRA                {bundle_emb.WORD.KEY: ...} beside its own tensors, KEY being one of the others'
kohya, per layer    {IN01: (n, D), IN02: ..., MID: ..., OUT03: ...}; the word is the file's name
OneTrainer          {emp_params_out: (n, D)}, output embeddings: keys of FORMATS with _out behind them
others              a row of FORMATS; or a tensor by itself; the word is the file's name
"""

import base64
import json
from collections import ChainMap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..errors import InputError
from ..model.checks import OUTPUT, is_per_layer
from .kinds import kind_of_keys
from .photos import reading_picture

PICTURES = ("PNG", "WEBP", "JPEG", "BMP", "TIFF", "GIF")
MAX_VECTORS = 75  # the room in a prompt


class Format(NamedTuple):
    """A format that holds one word, with a key for its vectors for each text encoder."""

    name: str
    keys: tuple[str, ...]


PIVOTAL = Format("pivotal tuning with diffusers (.pti)", ("text_encoders_0", "text_encoders_1"))
SDXL = Format("SDXL, SD 3 or Flux", ("clip_l", "clip_g", "t5xxl", "t5"))
FORMATS = (
    Format("kohya, invoke-training or AUTOMATIC1111", ("emb_params",)),
    Format("OneTrainer", ("emp_params",)),
    SDXL,
    PIVOTAL,
)

Words = list[tuple[str, Tensor]]
Widths = dict[str, dict[str, int]]


def refusal(why: str) -> InputError:
    """The error that a file is something else; `naming` puts the file's name before it."""
    return InputError(f"is not a learned word: {why}")


def find_words(content: Any, name: str) -> tuple[str, Words, Widths, str]:
    """Find the words in what a file holds, and see that they are words before any of their data is read.

    Args:
        content: nested dictionaries of tensors, numbers and text; or a tensor.
        name: what a word is called that has no name in the file.

    Returns:
        The name of the format; the vectors of each word, (n, D) or (D,), where a word for several text
        encoders comes several times, in several widths; for each word that is per layer or has output
        vectors the parts of its vectors and their widths, see `Concept`; what was left aside, in words.

    Raises:
        InputError: there is no learned word in it.
    """
    if isinstance(content, Tensor):
        return "a tensor by itself", _checked([(name, content)]), {}, ""
    if not isinstance(content, dict):
        raise refusal(f"it holds a {type(content).__name__}")
    if layers := layer_keys(content):
        return "kohya, a word per layer (XTI)", *_join(name, content, layers, one_width=True), ""
    if isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    content = {key: value for key, value in content.items() if isinstance(key, str)}
    if bundles := _bundles(content):
        found = [find_words(bundle, word) for word, bundle in bundles.items()]
        words = [pair for _, pairs, *_ in found for pair in pairs]
        widths = dict(ChainMap(*(widths for *_, widths, _ in found)))
        return "bundled with a LoRA", words, widths, "the LoRA itself"
    if "string_to_param" in content:
        table = content["string_to_param"]
        if not isinstance(table, dict):
            raise refusal(f"string_to_param is a {type(table).__name__}")
        # The official code's users write the word as it stands in the file; A1111's, the name of the file.
        if "name" not in content:
            return "official Textual Inversion code", _checked(list(table.items())), {}, ""
        words = _checked([(name if k == "*" else k, rows) for k, rows in table.items()])
        return "AUTOMATIC1111", words, {}, ""
    for format in FORMATS:
        keys = [key for key in format.keys if key in content]
        outputs = [key + OUTPUT for key in format.keys if key + OUTPUT in content]
        if outputs:
            words, widths = _join(name, content, keys + outputs)
            sizes = [*widths[name].values()]
            if keys and sizes != sizes[len(keys) :] * 2:
                raise refusal(f"{', '.join(keys)} do not go with {', '.join(outputs)}")
            return format.name, words, widths, ""
        if keys:
            words = _checked([(name, content[key]) for key in keys], one_width=len(format.keys) == 1)
            if format is PIVOTAL:  # there a word is <s0><s1>..., with a part for each vector
                count = len(torch.atleast_2d(words[0][1]))
                words = [("".join(f"<s{i}>" for i in range(count)), rows) for _, rows in words]
            return format.name, words, {}, ""
    if kind := kind_of_keys(content):
        raise refusal(f"it is {kind}")
    words = _checked([(key, value) for key, value in content.items() if isinstance(value, Tensor)])
    return "diffusers", list(join_numbered(dict(words)).items()), {}, ""


def _join(
    name: str, content: Mapping[str, Any], keys: Sequence[str], *, one_width: bool = False
) -> tuple[Words, Widths]:
    """Make one word of parts with as many vectors, one beside the other."""
    parts = _checked([(key, content[key]) for key in keys], one_width=one_width)
    parts = [(key, torch.atleast_2d(rows.detach()).float()) for key, rows in parts]
    if len({len(rows) for _, rows in parts}) > 1:
        raise refusal(f"its parts {', '.join(keys)} have different numbers of vectors")
    widths = {key: rows.shape[1] for key, rows in parts}
    return [(name, torch.cat([rows for _, rows in parts], dim=1))], {name: widths}


def layer_keys(content: Mapping[str, Any]) -> list[str]:
    """The keys of a word per layer in the order of the forward pass; [] if the content is something else."""
    if not content or not all(isinstance(key, str) and is_per_layer([key]) for key in content):
        return []
    return sorted(content, key=lambda key: (("IN", "MID", "OUT").index(key.rstrip("0123456789")), key))


def _bundles(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Word -> what its file would hold, from `bundle_emb.WORD.KEY` or `bundle_emb.WORD.string_to_param.*`."""
    bundles: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        match key.split(".", 3):
            case ["bundle_emb", word, name]:
                bundles.setdefault(word, {})[name] = value
            case ["bundle_emb", word, name, inner]:
                bundles.setdefault(word, {"name": word})[name] = {inner: value}
    return bundles


def _checked(named: Sequence[tuple[Any, Any]], *, one_width: bool = True) -> Words:
    if not named:
        raise refusal("there are no vectors in it")
    for key, rows in named:
        if not isinstance(rows, Tensor) or not isinstance(key, str):
            raise refusal(f"{key!r} is a {type(rows).__name__}")
        shape = tuple(rows.shape)
        fits = rows.ndim in (1, 2) and 0 < (1, *shape)[-2] <= MAX_VECTORS and 0 < shape[-1] <= 2**16
        plain = rows.is_floating_point() and rows.layout == torch.strided and rows.device.type == "cpu"
        if not fits or not plain or key.endswith((".weight", ".bias")):  # as a model's tensors are called
            beside = f", beside {len(named) - 1} others" if len(named) > 1 else ""
            expected = f"floats, (D,) or (n, D), n at most {MAX_VECTORS}, the room in a prompt"
            dtype = str(rows.dtype).removeprefix("torch.")
            raise refusal(f"{key!r} is {shape} {dtype}{beside}; vectors are {expected}")
    if one_width and len(widths := sorted({rows.shape[-1] for _, rows in named})) > 1:
        raise refusal(f"its {len(named)} tensors have widths {', '.join(map(str, widths))}")
    return list(named)


def join_numbered(words: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make one word w of `w, w_1, w_2, ...` that have one vector each, (D,) or (1, D)."""
    words = {word: torch.atleast_2d(rows) for word, rows in words.items()}
    joined = dict(words)
    for word, first in words.items():
        vectors = [first]
        while (key := f"{word}_{len(vectors)}") in words:
            vectors.append(words[key])
        if len(vectors) > 1 and all(len(rows) == 1 for rows in vectors):
            for i in range(1, len(vectors)):
                joined.pop(f"{word}_{i}", None)
            joined[word] = torch.cat(vectors)
    return joined


def is_picture(path: Path) -> bool:
    """Whether a file begins as a picture does."""
    with suppress(InputError), reading_picture(path), Image.open(path, formats=PICTURES):
        return True
    return False


def read_picture(path: Path) -> Any:
    """Read the dictionary that AUTOMATIC1111 puts into the text of a picture: base64 of JSON.

    Raises:
        InputError: the picture is damaged or has no such text.
    """
    with reading_picture(path), Image.open(path, formats=PICTURES) as image:
        image.load()
        text = image.info.get("sd-ti-embedding", "")
    try:
        return json.loads(base64.b64decode(text), object_hook=_as_tensor)
    except (ValueError, TypeError, RuntimeError):  # RuntimeError: absurd nesting, numbers
        why = "it is a picture without one in its text; get it as .pt or .safetensors"
        raise refusal(why) from None


def _as_tensor(value: dict[str, Any]) -> Any:
    return torch.tensor(value["TORCHTENSOR"], dtype=torch.float32) if "TORCHTENSOR" in value else value
