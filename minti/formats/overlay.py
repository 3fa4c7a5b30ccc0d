"""Weights of a file laid over a part of a model that is loaded: tuned, or another fine-tune of that part."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..model.model_hash import model_hash
from .folder import PARTS, find_alias, find_weights
from .keymap import IGNORED
from .kinds import kind_of_keys
from .load_plan import refuse_problems
from .weightfile import WeightFile

log = logging.getLogger(__name__)

WHAT = {"unet": "UNet", "text_encoder": "text encoder"}


@torch.no_grad()
def lay_over(part: str, module: nn.Module, path: str | Path) -> None:
    """Replace weights of a module by those of a file, some of them or all.

    Args:
        part: "unet" or "text_encoder".
        module: the part of the model, whose weights get the file's values in their own dtype.
        path: a file whose keys are those of a diffusers folder (for SDXL's two text encoders behind
            "text_encoder." and "text_encoder_2."); or the folder of a run of `minti.tune`; or that of the
            part in a diffusers checkpoint.

    Raises:
        InputError: the file cannot be read, or holds anything else than weights of this part.
    """
    path = Path(path)
    run = path / f"{part}.safetensors"
    single = run if path.is_dir() and run.is_file() else path
    files = [single] if not single.is_dir() else find_weights(path, PARTS[part][2])[0]
    for file in map(WeightFile, files):
        _lay_file_over(part, module, file)


def _lay_file_over(part: str, module: nn.Module, file: WeightFile) -> None:
    weights, keys = dict(module.named_parameters()), set(file.shapes)
    theirs = {find_alias(name, keys): name for name in weights}
    fitting, what = [key for key in file.shapes if key in theirs], WHAT[part]
    if not fitting:
        kind = kind_of_keys(keys)
        raise InputError(
            f"{file.path}: holds no weights of the {what} under the names of a diffusers folder"
            + (f"; it is {kind}" if kind else "")
        )
    problems = [f"unexpected key {key}" for key in keys if key not in theirs and not IGNORED.fullmatch(key)]
    for key in fitting:
        shape = tuple(weights[theirs[key]].shape)
        if file.shapes[key] != shape:
            problems.append(f"{key} has shape {file.shapes[key]}, that of the model has {shape}")
        elif not file.dtypes[key].is_floating_point:
            problems.append(f"{key} is {file.dtypes[key]}; quantised weights cannot be used")
    refuse_problems(file.path, sorted(problems))
    notes, dtype = read_notes(file.metadata), str(next(iter(weights.values())).dtype).removeprefix("torch.")
    if notes.get("base_dtype") == dtype and notes.get("base_hash") != model_hash(module):
        text = "%s: was tuned from another %s, of %s; the result may be poor"
        log.warning(text, file.path, what, notes.get("base_model"))
    for key, tensor in file.read(fitting, copied=True):
        weight = weights[theirs[key]]
        weight.data = tensor.to(weight.device, weight.dtype, copy=True)
        if not weight.isfinite().all():
            raise InputError(f"{file.path}: {key} holds NaN or infinity as {dtype}; tune or download again")
    log.info("%s: replaces %d of the %d weights of the %s", file.path, len(fitting), len(weights), what)


def read_notes(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What `minti.tune` says of a file in its metadata; {} if it was made otherwise."""
    try:
        notes = json.loads(metadata["minti"])
    except (KeyError, ValueError, RecursionError):
        return {}
    return notes if isinstance(notes, dict) else {}
