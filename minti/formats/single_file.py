"""Plans for single-file checkpoints: which tensor of the file belongs to which weight of the model."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from torch import Tensor

from ..errors import InputError
from ..model.bert import BertTextModel
from ..model.clip import CLIPTextModel
from ..model.config import ScheduleConfig
from ..model.diffusion import Schedule
from ..model.image_encoder import CLIPVisionModel
from ..model.tokenizer import END
from ..model.unet import UNet
from ..model.vae import VAE
from . import configs, keymap, shapes_to_config
from .folder import PLAYGROUND, REFINER, STEM, current_snapshot, folder_part
from .json_checks import one_of, read_keys, real, whole
from .keymap import OPENAI_LAYERS, OPENCLIP_LAYERS, UNET_LAYERS, VAE_LAYERS, Origin, find_origins
from .kinds import kind_of_keys
from .load_plan import CheckpointPlan, PartPlan, unclaimed_keys
from .reading import naming, read_bytes
from .weightfile import WeightFile

UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
# Where text encoders stand: OpenCLIP's, in Stability AI's two training codes, and CLIP's.
OPENCLIP_PREFIXES = ("cond_stage_model.model.", "conditioner.embedders.0.model.")
CLIP_PREFIXES = (
    "cond_stage_model.transformer.text_model.",
    "cond_stage_model.transformer.",
    "conditioner.embedders.0.transformer.text_model.",  # SDXL's first
)
SDXL_PREFIX_2 = "conditioner.embedders.1.model."
UNCLIP_PREFIX = "embedder.model."  # of the CLIP whose image encoder unCLIP has
# Keys that would be errors if they were not there twice: the text encoder again, under its other prefix.
TWICE = r"cond_stage_model\.transformer\.(embeddings|encoder|final_layer_norm)\..*"
MODEL = "a whole Stable Diffusion model"
VIT_H = 1280  # the width of OpenCLIP's ViT-H/14, which is unCLIP-h's


def plan_single_file(path: Path, ema: bool, vae: PartPlan | None = None) -> CheckpointPlan:
    """Plan for a single file.

    Args:
        ema: take the running average of the UNet's weights that the file holds beside the raw ones.
        vae: an autoencoder from elsewhere, instead of the file's own.
    """
    file = WeightFile(path)
    if file.shapes.keys() & {"edm_mean", "edm_vpred.sigma_max"}:
        raise InputError(f"{path}: {PLAYGROUND}")
    is_sdxl = any(key.startswith(SDXL_PREFIX_2) for key in file.shapes)
    conditioned = f"{UNET_PREFIX}label_emb.0.0.weight" in file.shapes
    if conditioned and not is_sdxl and any(key.startswith(OPENCLIP_PREFIXES[1]) for key in file.shapes):
        raise InputError(f"{path}: {REFINER}")
    text_prefix = _refuse_unless_whole(file, with_vae=vae is None)
    with naming(path, MODEL), torch.device("meta"):
        below = strip_prefix(UNET_PREFIX, file.shapes)
        unet = UNet(shapes_to_config.unet_config(below, is_sdxl=is_sdxl))
        # Stable Diffusion 2 is told by its OpenCLIP, or by the projections of its UNet if that is renamed.
        is_sd2 = not is_sdxl and (text_prefix in OPENCLIP_PREFIXES or unet.config.use_linear_projection)
        text = _plan_text(file, text_prefix, is_sd2)
        text_2 = _plan_second_text(file, unet) if is_sdxl else None
        image = _plan_image(file) if f"{UNCLIP_PREFIX}visual.proj" in file.shapes else None
        blocks = keymap.unet_blocks(unet.config)
    unet_part = PartPlan(unet, find_origins(unet.state_dict(), blocks, UNET_LAYERS, UNET_PREFIX), [file])
    if vae:
        text.ignored += f"|{re.escape(VAE_PREFIX)}.*"
    parts = {"text_encoder": text, "unet": unet_part, "vae": vae or _plan_vae_in(file, VAE_PREFIX)}
    if text_2:
        parts["text_encoder_2"] = text_2
    if image:
        parts["image_encoder"] = image
    pad = "!" if is_sd2 else END
    plan = CheckpointPlan(path, "single file", parts, ScheduleConfig(), pad, zero_empty_prompt=is_sdxl)
    ours = [part for part in plan.parts.values() if part.files == [file]]
    plan.unexpected = [key for key in unclaimed_keys(ours) if key not in MARKERS]
    if image and image.module.config.hidden_size != VIT_H:
        plan.notes.append(
            "picture embeddings: mean 0 and std 1, since the file does not hold those of unCLIP-l; its "
            "diffusers folder does"
        )
    _choose_ema(plan, file, ema)
    _read_schedule(plan, file, ask=is_sd2)
    return plan


def plan_vae(path: Path) -> PartPlan:
    """Plan for an autoencoder by itself: a folder with its config.json, or a file in the CompVis layout.

    A whole checkpoint is accepted, too; its autoencoder is taken.
    """
    if path.is_dir():
        folder = current_snapshot(path)
        folder = folder / "vae" if (folder / "vae").is_dir() else folder
        return folder_part(folder, configs.vae_config, VAE, STEM)
    file = WeightFile(path)
    if any(".down_blocks." in key for key in file.shapes):
        raise InputError(f"{path}: is from a folder of diffusers; give that folder, with its config.json")
    return _plan_vae_in(file, VAE_PREFIX if any(key.startswith(VAE_PREFIX) for key in file.shapes) else "")


def _plan_vae_in(file: WeightFile, prefix: str) -> PartPlan:
    with naming(file.path, "a whole autoencoder"), torch.device("meta"):
        vae = VAE(shapes_to_config.vae_config(strip_prefix(prefix, file.shapes)))
    return PartPlan(
        vae, find_origins(vae.state_dict(), keymap.vae_blocks(vae.config), VAE_LAYERS, prefix), [file]
    )


def strip_prefix(
    prefix: str, shapes: Mapping[str, tuple[int, ...]], new: str = ""
) -> dict[str, tuple[int, ...]]:
    """The shapes of the keys under a prefix, which is replaced by `new`."""
    return {new + key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


def _refuse_unless_whole(file: WeightFile, with_vae: bool) -> str:
    """The prefix of the text encoder. InputError says what a file without one, or a UNet, seems to be."""

    def has(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in file.shapes)

    prefix = next(filter(has, (*OPENCLIP_PREFIXES, *CLIP_PREFIXES)), "")
    missing = [] if has(UNET_PREFIX) else [f"no UNet ({UNET_PREFIX}*)"]
    missing += [] if prefix else ["no text encoder (cond_stage_model.*)"]
    if with_vae and not has(VAE_PREFIX):
        missing.append(f"no autoencoder ({VAE_PREFIX}*){'' if missing else ': give one with --vae PATH'}")
    if missing:
        kind = kind_of_keys(file.shapes)
        seems = f"it seems to be {kind}" if kind and len(missing) > 1 else ""
        why = ", ".join(missing)
        raise InputError(f"{file.path}: is not {MODEL}: {seems or why}{f' ({why})' if seems else ''}")
    return prefix


def _plan_text(file: WeightFile, prefix: str, is_sd2: bool) -> PartPlan:
    """The text encoder. Stable Diffusion 2 leaves out the last block of OpenCLIP, which files may have."""
    if f"{prefix}token_emb.weight" in file.shapes:
        bert = BertTextModel(shapes_to_config.bert_config(strip_prefix(prefix, file.shapes)))
        return PartPlan(
            bert, find_origins(bert.state_dict(), keymap.bert_blocks(bert.config), {}, prefix), [file]
        )
    if prefix in OPENCLIP_PREFIXES:
        config = shapes_to_config.openclip_text_config(strip_prefix(prefix, file.shapes))
        blocks, layers, stack = keymap.openclip_blocks(config), OPENCLIP_LAYERS, "transformer.resblocks"
    else:
        shapes = strip_prefix(prefix, file.shapes, "text_model.")
        config = shapes_to_config.text_config(shapes, is_sd2=is_sd2)
        blocks, layers, stack = {"text_model.": ""}, {}, "encoder.layers"
    text = CLIPTextModel(config)
    unused = re.escape(f"{prefix}{stack}.{config.num_hidden_layers}.") + ".*"
    ignored = f"{unused}|{TWICE}" if prefix == CLIP_PREFIXES[0] else unused
    return PartPlan(text, find_origins(text.state_dict(), blocks, layers, prefix), [file], ignored)


def _plan_second_text(file: WeightFile, unet: UNet) -> PartPlan:
    """SDXL's second text encoder, of which all layers count. Its width tells that of the UNet's sizes."""
    shapes = strip_prefix(SDXL_PREFIX_2, file.shapes)
    config = replace(shapes_to_config.openai_text_config(shapes), hidden_act="gelu")
    sizes = unet.config.projection_class_embeddings_input_dim - config.projection_dim
    unet.config = replace(unet.config, addition_time_embed_dim=sizes // 6)
    text, blocks = CLIPTextModel(config), keymap.openai_text_blocks(config)
    return PartPlan(text, find_origins(text.state_dict(), blocks, OPENAI_LAYERS, SDXL_PREFIX_2), [file])


def _plan_image(file: WeightFile) -> PartPlan:
    """The image encoder of unCLIP: of OpenCLIP's ViT-H/14, or of OpenAI's ViT-L/14, without the text half."""
    config = shapes_to_config.openai_vision_config(strip_prefix(UNCLIP_PREFIX, file.shapes))
    if config.hidden_size == VIT_H:
        config = replace(config, hidden_act="gelu", num_attention_heads=16)
    image, blocks = CLIPVisionModel(config), keymap.openai_image_blocks(config)
    unused = rf"{re.escape(UNCLIP_PREFIX)}(?!visual\.).*|noise_augmentor\..*"
    return PartPlan(
        image, find_origins(image.state_dict(), blocks, OPENAI_LAYERS, UNCLIP_PREFIX), [file], unused
    )


def _choose_ema(plan: CheckpointPlan, file: WeightFile, ema: bool) -> None:
    """Training keeps a running average beside the raw weights; some files have both."""
    origins = plan.parts["unet"].origins
    averaged = {name: Origin(keymap.ema_key(origin.key), origin.form) for name, origin in origins.items()}
    has_ema = all(origin.key in file.shapes for origin in averaged.values())
    if ema and not has_ema:
        raise InputError(f"{plan.path}: holds no EMA weights beside the others; leave out --ema")
    if ema:
        plan.parts["unet"].origins = averaged
    if has_ema:
        plan.notes.append(
            "UNet: averaged (EMA) weights" if ema else "UNet: raw weights (--ema for the averaged ones)"
        )


# The noise schedule and what the UNet predicts ---

MARKERS = {"v_pred", "ztsnr"}  # empty tensors of fine-tunes: predicts v; no signal is left at the last time
KINDS = {"v": "v_prediction", "eps": "epsilon", "x0": "sample"}
YAML = {  # of the training code's config, which calls "linear" what diffusers calls "scaled_linear"
    "parameterization": ("eps", one_of("eps", "v", "x0")),
    "linear_start": (0.00085, real(0, 1)),
    "linear_end": (0.012, real(0, 1)),
    "timesteps": (1000, whole(1, 100_000)),
    "beta_schedule": ("linear", one_of("linear")),
}


def _read_schedule(plan: CheckpointPlan, file: WeightFile, ask: bool) -> None:
    """What a file says of its schedule: the config beside it, its metadata, marker keys, and buffers."""
    told: list[tuple[str, str]] = []  # (kind of prediction, who says so), the most reliable first
    config = ScheduleConfig()
    path = next((p for e in (".yaml", ".yml") if (p := plan.path.with_suffix(e)).exists()), None)
    if path:
        with naming(path, "the config of a latent diffusion model, which may be removed"):
            params = yaml.safe_load(read_bytes(path, 2**20).decode("utf-8-sig"))["model"]["params"]
            told.append((KINDS[params.get("parameterization", "eps")], f"{path.name} says"))
            values = read_keys({key: params[key] for key in YAML if key in params}, YAML, str(path))
        config = replace(
            config,
            beta_start=values["linear_start"],
            beta_end=values["linear_end"],
            num_train_timesteps=values["timesteps"],
        )
    meta = file.metadata
    kind = meta.get("modelspec.prediction_type", "").removesuffix("_prediction").replace("epsilon", "eps")
    if kind in KINDS:
        told.append((KINDS[kind], "its metadata says"))
    if meta.get("ss_v_parameterization") == "True":
        told.append(("v_prediction", "its metadata says"))
    if "v_pred" in file.shapes:
        told.append(("v_prediction", "its key v_pred says"))

    if plan.is_unclip:
        told.append(("v_prediction", "all unCLIP models do"))

    zero = "ztsnr" in file.shapes or meta.get("ss_zero_terminal_snr") == "True"
    if (found := _stored_schedule(file)) is not None:
        rescaled = replace(config, prediction_type="v_prediction", rescale_betas_zero_snr=True)
        if len(found) == config.num_train_timesteps and _is_like(found, rescaled):
            zero = True
        elif len(found) != config.num_train_timesteps or not _is_like(found, config):
            raise InputError(
                f"{plan.path}: its noise schedule (betas, alphas_cumprod) is not Stable Diffusion's; put "
                f"its linear_start and linear_end into {plan.path.stem}.yaml beside it"
            )
    if zero:
        # Nothing of the picture is left at the last step, which has to be visited; there eps says nothing.
        told.append(("v_prediction", "zero terminal SNR asks for it"))
        config = replace(
            config, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        )
        plan.notes.append("noise schedule: rescaled to zero terminal SNR")
    plan.ask_prediction_type = ask and not told
    plan.schedule = replace(config, prediction_type=told[0][0]) if told else config
    if told:
        plan.notes.append(f"prediction type: {told[0][0]}, as {told[0][1]}")


def _stored_schedule(file: WeightFile) -> Tensor | None:
    """The buffer alphas_cumprod, (T,), of a file that has it, or what its betas amount to."""
    for key in ("alphas_cumprod", "betas"):
        if key in file.shapes and len(file.shapes[key]) == 1 and file.dtypes[key].is_floating_point:
            ((_, values),) = file.read([key], copied=True)
            return values.double() if key == "alphas_cumprod" else (1 - values.double()).cumprod(0)
    return None


def _is_like(values: Tensor, config: ScheduleConfig) -> bool:
    """Whether stored numbers are those of a schedule, to the rounding of half precision (2^-9)."""
    return (values - Schedule(config).alphas_cumprod).abs().max().item() < 5e-3
