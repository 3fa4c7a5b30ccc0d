"""Opening a checkpoint: from a path to a StableDiffusion.

`load` makes a plan (`load_plan.py`), by way of `folder.py` or `single_file.py`, and lets each part of the
plan load itself.
"""

import logging
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..errors import InputError, check_number
from ..model.bert import BertConfig, BertTextModel
from ..model.clip import CLIPTextModel
from ..model.config import TextConfig
from ..model.diffusion import Schedule
from ..model.sdxl import TwoTextEncoders
from ..model.stable_diffusion import StableDiffusion
from ..model.tokenizer import Tokenizer
from ..model.unclip import ImageNormalizer, ImagePrompter, NormalizerConfig
from ..model.unet import UNet
from ..model.wordpiece import WordPieceTokenizer
from .folder import plan_folder
from .load_plan import CheckpointPlan, refuse_problems
from .overlay import lay_over
from .preprocess import Preprocess
from .single_file import plan_single_file, plan_vae
from .vocabulary import read_tokenizer

log = logging.getLogger(__name__)

SDXL_SCALE = 0.13025  # of its latents; the same autoencoder as Stable Diffusion 1's, trained anew
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
    vae: str | Path | None = None,
    schedule: str = "auto",
    clip_skip: int | None = None,
    unet: str | Path | None = None,
    text_encoder: str | Path | None = None,
) -> StableDiffusion:
    """Load a public Stable Diffusion checkpoint.

    Args:
        path: a folder in the diffusers layout, or a single `.safetensors` or `.ckpt` file.
        device: "cpu", "cuda", "mps", or "auto": the best there is.
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on the CPU, half precision elsewhere.
        tokenizer: folder or file, for single files, which come without one.
        prediction_type: "epsilon", "v_prediction" or "sample", where the checkpoint does not say or is wrong.
        variant: which of several sets of weights in a folder, such as "fp16"; parts without it use another.
        ema: for a single file that holds both, the averaged weights instead of the raw ones.
        vae: folder or file of an autoencoder that takes the place of the checkpoint's own.
        schedule: "as-published" believes the folder of the first latent diffusion model, whose noise schedule
            is not the one it was trained with; "auto" takes the right one.
        clip_skip: the layer of CLIP's text encoder that the UNet attends to, counted from the end: 1 is the
            last one. By default the one the model was trained with: 2 for SDXL, 1 for others.
        unet, text_encoder: files of weights that take the place of the checkpoint's own, some of them or all,
            such as those that `python -m minti.tune` writes; see `overlay.lay_over`.

    Raises:
        InputError: one line that says what is wrong with the checkpoint or an argument.
    """
    where = choose_device(device)
    if dtype not in (*DTYPES, "auto"):
        raise InputError(f"dtype {dtype!r}: choose from auto, {', '.join(DTYPES)}")
    if dtype == "auto":
        half = "bfloat16" if where.type == "cuda" and torch.cuda.is_bf16_supported() else "float16"
        dtype = "float32" if where.type == "cpu" else half

    plan = make_plan(path, variant=variant, ema=ema, vae=vae, schedule=schedule)
    refuse_problems(plan.path, plan.problems())
    words = load_tokenizer(plan, tokenizer)
    dtypes = dict.fromkeys(plan.parts, DTYPES[dtype]) | {"image_normalizer": torch.float32}
    if plan.is_sdxl and dtype == "float16" and plan.parts["vae"].module.config.force_upcast:
        dtypes["vae"] = torch.float32
    modules = {name: part.load(dtypes[name], where) for name, part in plan.parts.items()}
    if plan.is_sdxl:
        pad_2 = load_tokenizer(plan, tokenizer, second=True).pad_id
        both = modules["text_encoder"], modules.pop("text_encoder_2")
        modules["text_encoder"] = TwoTextEncoders(*both, pad_2)
    if plan.is_unclip:
        modules["image_prompter"] = make_prompter(plan, modules, where)
    for name, other in {"unet": unet, "text_encoder": text_encoder}.items():
        if other is not None:
            lay_over(name, modules[name], other)
    if clip_skip is not None:
        set_clip_skip(modules["text_encoder"], clip_skip)
    if prediction_type:
        plan.schedule = replace(plan.schedule, prediction_type=prediction_type)
    elif plan.ask_prediction_type:
        kind = probe_prediction_type(modules["unet"])
        plan.schedule = replace(plan.schedule, prediction_type=kind)
        note = f"prediction type: {kind}, judging by the UNet's output (--prediction-type overrides)"
        plan.notes.append(note)
    modules["unet"].config = replace(modules["unet"].config, sample_size=trained_size(plan))
    for note in plan.notes:
        log.info("%s: %s", plan.path, note)
    if where.type == "cuda":
        for name in ("unet", "vae"):  # the layout in which convolutions are fastest; not so on the CPU
            modules[name].to(memory_format=torch.channels_last)
    modules |= {"schedule": Schedule(plan.schedule, where), "zero_empty_prompt": plan.zero_empty_prompt}
    return StableDiffusion(words, source=str(path), **modules)


def make_prompter(plan: CheckpointPlan, modules: dict[str, nn.Module], device: torch.device) -> ImagePrompter:
    """What unCLIP is shown pictures by, of the modules that belong to it, which are taken out."""
    encoder, normalizer = modules.pop("image_encoder"), modules.pop("image_normalizer", None)
    if normalizer is None:  # files do not hold it
        normalizer = ImageNormalizer(NormalizerConfig(encoder.config.projection_dim)).to(device)
    preprocess = Preprocess.read(plan.path / "feature_extractor", encoder.config.image_size)
    return ImagePrompter(encoder, normalizer, Schedule(plan.image_noise), preprocess)


def set_clip_skip(text_encoder: nn.Module, layer: int) -> None:
    """Let the UNet attend to another text layer, counted from the end. InputError if there is none such."""
    counts = [m.config.num_hidden_layers for m in text_encoder.modules() if isinstance(m, CLIPTextModel)]
    if not counts:
        raise InputError("clip_skip is for models with CLIP's text encoder; leave it out")
    check_number("clip_skip", layer, int, 1, min(counts))
    text_encoder.context_layer = layer


def choose_device(name: str) -> torch.device:
    """The device called "cpu", "cuda", "mps", or "auto": the best there is. InputError if it is not here."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r}: choose from auto, cpu, cuda, cuda:N, mps") from None
    missing = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    if missing or not available.get(device.type):
        raise InputError(f"device {name!r} is not available here; use --device auto")
    return device


def check_exists(path: str | Path) -> Path:
    """The path of a checkpoint. Raises InputError if there is nothing."""
    path = Path(path)
    if not path.exists():
        dangling = "is a link to something that is not there" if path.is_symlink() else "does not exist"
        hint = "give the path of a checkpoint folder or file"
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.parent.exists():
            hint = f"to get it from the Hugging Face hub: python tools/download.py {path} weights/{path.name}"
        raise InputError(f"{path}: {dangling}; {hint}")
    return path


def make_plan(
    path: str | Path,
    *,
    variant: str | None = None,
    ema: bool = False,
    vae: str | Path | None = None,
    schedule: str = "auto",
) -> CheckpointPlan:
    """Look at a checkpoint without reading its weights. The arguments are those of `load`."""
    path = check_exists(path)
    other = plan_vae(check_exists(vae)) if vae else None
    if path.is_dir():
        plan = plan_folder(path, variant, other, as_published=schedule == "as-published")
    else:
        plan = plan_single_file(path, ema, other)
    if plan.is_sdxl and not plan.parts["vae"].has_config:
        module = plan.parts["vae"].module
        module.config = replace(module.config, scaling_factor=SDXL_SCALE)
    return plan


def trained_size(plan: CheckpointPlan) -> tuple[int, int]:
    """Height and width, in latents, of the pictures the model was trained on.

    Folders say it. Of single files, SDXL was trained on 1024 pixels, an SD 2.x that predicts v on 768, the
    first latent diffusion model on 256, and all others on 512.
    """
    if plan.layout == "single file" and plan.is_sdxl:
        return 128, 128
    text = plan.parts.get("text_encoder")
    if plan.layout == "single file" and text and isinstance(text.module, BertTextModel):
        return 32, 32
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


def load_tokenizer(
    plan: CheckpointPlan, path: str | Path | None = None, *, second: bool = False
) -> Tokenizer:
    """The tokenizer at `path`, or that of the checkpoint's folder, or one beside the single file.

    SDXL's second encoder has the same vocabulary and another padding token, as the folder says or "!".
    """
    if second and plan.layout == "diffusers" and (plan.path / "tokenizer_2").is_dir():
        path = plan.path / "tokenizer_2"
    config, pad = plan.parts["text_encoder"].module.config, plan.pad
    return find_tokenizer(plan.path, config, path, pad="!" if second and plan.layout != "diffusers" else pad)


def find_tokenizer(
    checkpoint: Path,
    text: TextConfig | BertConfig,
    path: str | Path | None,
    *,
    pad: str | None = None,
    flag: str = "--tokenizer",
) -> Tokenizer:
    """The tokenizer of a text encoder.

    Args:
        checkpoint: the folder or file that the encoder is from; a tokenizer is looked for in it or beside it.
        text: the encoder's config.
        path: the tokenizer, if the user gave one.
        pad: the padding token, where the family fixes it.
        flag: the option that gives `path`, for messages.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    names = ("tokenizer", ".", "bpe_simple_vocab_16e6.txt.gz")
    for candidate in [Path(path)] if path else [folder / name for name in names]:
        known = any((candidate / name).is_file() for name in ("vocab.json", "tokenizer.json", "vocab.txt"))
        if not (path or known or candidate.is_file()):
            continue
        tokenizer = read_tokenizer(candidate, pad=pad)
        wanted = WordPieceTokenizer if isinstance(text, BertConfig) else Tokenizer
        if type(tokenizer) is not wanted:
            raise InputError(
                f"{candidate}: is {tokenizer.kind}'s tokenizer, {checkpoint} needs {wanted.kind}'s"
            )
        if len(tokenizer) > text.vocab_size:
            raise InputError(
                f"{candidate}: has {len(tokenizer)} ids, the text encoder of {checkpoint} knows "
                f"{text.vocab_size}; give the tokenizer that belongs to it with {flag}"
            )
        return tokenizer
    remedy = f"get CLIP's with `python tools/download.py tokenizer {folder / 'tokenizer'}`"
    if isinstance(text, BertConfig):
        remedy = "put vocab.txt of bert-base-uncased beside it"
    raise InputError(f"{checkpoint}: comes without a tokenizer; {remedy}, or give {flag} PATH")
