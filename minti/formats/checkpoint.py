"""The parts of a Stable Diffusion put together: words to context, noise to latents, latents to pictures."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..errors import InputError
from ..model.clip import CLIPTextModel
from ..model.config import TextConfig
from ..model.diffusion import Schedule
from ..model.stable_diffusion import StableDiffusion
from ..model.tokenizer import Tokenizer
from ..model.unet import UNet
from ..model.vae import VAE
from .folder import plan_folder
from .load_plan import Plan
from .single_file import plan_single_file
from .vocabulary import read_tokenizer

log = logging.getLogger(__name__)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    tokenizer: str | Path | None = None,
    prediction_type: str | None = None,
    variant: str | None = None,
    ema: bool = False,
) -> StableDiffusion:
    """Load a public Stable Diffusion checkpoint.

    Args:
        path: a folder in the diffusers layout, or a single `.safetensors` or `.ckpt` file.
        device: "cpu", "cuda", "mps", or "auto": the best there is.
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on the CPU, half precision elsewhere.
        tokenizer: folder or file, for single files, which come without one.
        prediction_type: "epsilon", "v_prediction" or "sample", where the checkpoint does not say or is wrong.
        variant: which of several sets of weights in a folder, such as "fp16".
        ema: for a single file that holds both, the averaged weights instead of the raw ones.

    Raises:
        InputError: one line that says what is wrong with the checkpoint or an argument.
    """
    where = choose_device(device)
    if dtype not in (*DTYPES, "auto"):
        raise InputError(f"dtype {dtype!r}: choose from auto, {', '.join(DTYPES)}")
    if dtype == "auto":
        half = "bfloat16" if where.type == "cuda" and torch.cuda.is_bf16_supported() else "float16"
        dtype = "float32" if where.type == "cpu" else half
    parts = load_parts(
        path,
        dtype=DTYPES[dtype],
        device=where,
        tokenizer=tokenizer,
        prediction_type=prediction_type,
        variant=variant,
        ema=ema,
    )
    if where.type == "cuda":
        # The layout that its convolutions are fastest in. On the CPU it gains nothing.
        parts.unet.to(memory_format=torch.channels_last)
        parts.vae.to(memory_format=torch.channels_last)
    return StableDiffusion(**vars(parts), source=str(path))


def choose_device(name: str) -> torch.device:
    """The device called "cpu", "cuda", "mps", or "auto": the best there is. InputError if it is not here."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r}: choose from auto, cpu, cuda, cuda:N, mps") from None
    if not available.get(device.type) or (
        device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    ):
        raise InputError(f"device {name!r} is not available here; use --device auto")
    return device


@dataclass
class Parts:
    """A loaded checkpoint: what `StableDiffusion` is made of."""

    tokenizer: Tokenizer
    text_encoder: CLIPTextModel
    unet: UNet
    vae: VAE
    schedule: Schedule


def load_parts(
    path: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    tokenizer: str | Path | None = None,
    prediction_type: str | None = None,
    variant: str | None = None,
    ema: bool = False,
) -> Parts:
    """Open a checkpoint. See `load` for the arguments.

    Raises:
        InputError: whatever keeps it from being loaded; the message names the file and the key.
    """
    plan = make_plan(path, variant=variant, ema=ema)
    if problems := plan.problems():
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise InputError(f"{plan.path}: does not fit; {'; '.join(problems[:3])}{more}")
    words = load_tokenizer(plan, tokenizer)
    modules = {name: part.load(dtype, device) for name, part in plan.parts.items()}
    if prediction_type:
        plan.schedule = replace(plan.schedule, prediction_type=prediction_type)
    elif plan.ask_prediction_type:
        kind = probe_prediction_type(modules["unet"])
        plan.schedule = replace(plan.schedule, prediction_type=kind)
        plan.notes.append(
            f"prediction type: {kind}, judging by the UNet's output (--prediction-type overrides)"
        )
    unet = modules["unet"]
    unet.config = replace(unet.config, sample_size=trained_size(plan))
    for note in plan.notes:
        log.info("%s: %s", plan.path, note)
    return Parts(tokenizer=words, schedule=Schedule(plan.schedule, device), **modules)


def check_exists(path: str | Path) -> Path:
    """The path of a checkpoint. Raises InputError if there is nothing."""
    path = Path(path)
    if not path.exists():
        dangling = "is a link to something that is not there" if path.is_symlink() else "does not exist"
        raise InputError(f"{path}: {dangling}; give the path of a checkpoint folder or file")
    return path


def make_plan(path: str | Path, *, variant: str | None = None, ema: bool = False) -> Plan:
    """Look at a checkpoint without reading its weights."""
    path = check_exists(path)
    return plan_folder(path, variant) if path.is_dir() else plan_single_file(path, ema)


def trained_size(plan: Plan) -> tuple[int, int]:
    """Height and width, in latents, of the pictures the model was trained on.

    Folders say it. Single files of SD 2.x that predict v were trained on 768 pixels, all others on 512.
    """
    large = plan.layout == "single file" and plan.family.startswith("SD 2.x")
    if large and plan.schedule.prediction_type == "v_prediction":
        return 96, 96
    return plan.parts["unet"].module.config.sample_size


@torch.no_grad()
def probe_prediction_type(unet: UNet) -> str:
    """Tell a UNet that predicts v from one that predicts eps by its answer to a constant picture.

    At t = 999 the input is as good as pure noise, so one that predicts eps returns about its input, 0.5; one
    that predicts v returns about minus the picture it imagines there. The threshold is the public one, -1
    below input.
    """
    config = unet.config
    device, dtype = unet.conv_in.weight.device, unet.conv_in.weight.dtype
    x = torch.full((1, config.in_channels, 8, 8), 0.5, device=device, dtype=dtype)
    context = torch.full((1, 77, config.cross_attention_dim), 0.5, device=device, dtype=dtype)
    output = unet(x, torch.tensor([999], device=device), context)
    return "v_prediction" if (output - x[:, : config.out_channels]).float().mean() < -1 else "epsilon"


def load_tokenizer(plan: Plan, path: str | Path | None = None) -> Tokenizer:
    """The tokenizer at `path`, or that of the checkpoint's folder, or one beside the single file."""
    return find_tokenizer(plan.path, plan.parts["text_encoder"].module.config, path, pad=plan.pad)


def find_tokenizer(
    checkpoint: Path,
    text: TextConfig,
    path: str | Path | None,
    *,
    pad: str | None = None,
    flag: str = "--tokenizer",
) -> Tokenizer:
    """The same for any text encoder; `flag` is the option that gives `path`, for messages."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    names = ("tokenizer", ".", "bpe_simple_vocab_16e6.txt.gz")
    candidates = [Path(path)] if path else [folder / name for name in names]
    for candidate in candidates:
        if candidate.is_file() or any((candidate / n).is_file() for n in ("vocab.json", "tokenizer.json")):
            tokenizer = read_tokenizer(candidate, pad=pad)
            if len(tokenizer) > text.vocab_size:
                raise InputError(
                    f"{candidate}: has {len(tokenizer)} ids, the text encoder of {checkpoint} knows "
                    f"{text.vocab_size}; give the tokenizer that belongs to it with {flag}"
                )
            return tokenizer
    if path:
        raise InputError(
            f"{path}: no tokenizer here (vocab.json and merges.txt, or bpe_simple_vocab_16e6.txt.gz)"
        )
    raise InputError(
        f"{checkpoint}: comes without a tokenizer; get CLIP's with `python tools/download.py tokenizer "
        f"{folder / 'tokenizer'}`, or give {flag} PATH"
    )
