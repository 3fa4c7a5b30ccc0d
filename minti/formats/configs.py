"""The JSON configs that lie beside the weights, read into the dataclasses of `minti/model/config.py`.

Each kind of config has a table (see `json_checks.py`) of the keys that minti acts on, and of those of which
it implements one value. Names and defaults are those of diffusers and transformers.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from ..errors import InputError
from ..model.bert import BertConfig
from ..model.config import ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from ..model.image_encoder import VisionConfig
from ..model.unclip import NormalizerConfig
from .json_checks import (
    REQUIRED,
    Table,
    each,
    flag,
    number_or_list,
    one_of,
    optional,
    read_keys,
    real,
    text,
    whole,
)

Config = TypeVar("Config")
# No public model comes near these; they keep a damaged config from building a module for hours.
WIDTH, LAYERS, LEVELS, VOCABULARY = 2**16, 256, 8, 2**20

TRANSFORMER: Table = {
    "hidden_size": (REQUIRED, whole(1, WIDTH)),
    "intermediate_size": (REQUIRED, whole(1, WIDTH)),
    "num_hidden_layers": (REQUIRED, whole(1, LAYERS)),
    "num_attention_heads": (REQUIRED, whole(1, WIDTH)),
    "hidden_act": ("quick_gelu", one_of("quick_gelu", "gelu")),
    "layer_norm_eps": (1e-5, real(0, 1)),
    "projection_dim": (512, optional(whole(1, WIDTH))),
    "architectures": (None, optional(each(text, 8))),
}
TEXT: Table = TRANSFORMER | {
    "model_type": ("clip_text_model", one_of("clip_text_model")),
    "vocab_size": (REQUIRED, whole(2, VOCABULARY)),
    "max_position_embeddings": (77, whole(1, 4096)),
    "eos_token_id": (2, whole(0, VOCABULARY)),
}
VISION: Table = TRANSFORMER | {
    "model_type": ("clip_vision_model", one_of("clip_vision_model")),
    "image_size": (224, whole(1, 4096)),
    "patch_size": (REQUIRED, whole(1, 4096)),
    "num_channels": (3, one_of(3)),
    "shares_text_space": (False, flag),  # ours: the text encoder beside it ends in the same space
}
BERT: Table = {
    "model_type": ("ldmbert", one_of("ldmbert")),
    "vocab_size": (REQUIRED, whole(2, VOCABULARY)),
    "d_model": (REQUIRED, whole(1, WIDTH)),
    "encoder_ffn_dim": (REQUIRED, whole(1, WIDTH)),
    "encoder_layers": (REQUIRED, whole(1, LAYERS)),
    "encoder_attention_heads": (REQUIRED, whole(1, WIDTH)),
    "head_dim": (64, whole(1, WIDTH)),
    "max_position_embeddings": (77, whole(1, 4096)),
    "activation_function": ("gelu", one_of("gelu")),
    "scale_embedding": (False, one_of(False)),
    "num_hidden_layers": (None, optional(whole(1, LAYERS))),  # not used, as what follows
    "init_std": (0.02, real(0, 10)),
    "architectures": (None, optional(each(text, 8))),
}
DOWN = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}  # name: whether it has attention
UP = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
UNET: Table = {
    "_class_name": ("UNet2DConditionModel", one_of("UNet2DConditionModel")),
    "sample_size": (None, optional(number_or_list(whole(1, 4096)))),
    "in_channels": (4, whole(1, WIDTH)),
    "out_channels": (4, whole(1, WIDTH)),
    "block_out_channels": (REQUIRED, each(whole(1, WIDTH), LEVELS)),
    "down_block_types": (REQUIRED, each(one_of(*DOWN), LEVELS)),
    "up_block_types": (REQUIRED, each(one_of(*UP), LEVELS)),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", one_of("UNetMidBlock2DCrossAttn", None)),
    "layers_per_block": (2, number_or_list(whole(1, 16))),
    "transformer_layers_per_block": (1, number_or_list(whole(1, 32))),
    "attention_head_dim": (8, number_or_list(whole(1, WIDTH))),  # in spite of its name, how many heads
    "cross_attention_dim": (REQUIRED, whole(1, WIDTH)),
    "use_linear_projection": (False, flag),
    "upcast_attention": (False, flag),
    "norm_num_groups": (32, whole(1, WIDTH)),
    "norm_eps": (1e-5, real(0, 1)),
    "addition_embed_type": (None, one_of(None, "text_time")),
    "addition_time_embed_dim": (None, optional(whole(2, WIDTH))),
    "projection_class_embeddings_input_dim": (None, optional(whole(1, WIDTH))),
    "class_embed_type": (None, one_of(None, "projection")),
    # What follows has one value in all models that minti implements.
    "act_fn": ("silu", one_of("silu", "swish")),
    "flip_sin_to_cos": (True, one_of(True)),
    "freq_shift": (0, one_of(0)),
    "downsample_padding": (1, one_of(1)),
    "mid_block_scale_factor": (1, one_of(1)),
    "resnet_out_scale_factor": (1.0, one_of(1)),
    "conv_in_kernel": (3, one_of(3)),
    "conv_out_kernel": (3, one_of(3)),
    "resnet_time_scale_shift": ("default", one_of("default")),
    "time_embedding_type": ("positional", one_of("positional")),
    "attention_type": ("default", one_of("default")),
}
VAE: Table = {
    "_class_name": ("AutoencoderKL", one_of("AutoencoderKL")),
    "in_channels": (3, one_of(3)),
    "out_channels": (3, one_of(3)),
    "latent_channels": (REQUIRED, whole(1, 256)),
    "block_out_channels": (REQUIRED, each(whole(1, WIDTH), LEVELS)),
    "down_block_types": (("DownEncoderBlock2D",), each(one_of("DownEncoderBlock2D"), LEVELS)),
    "up_block_types": (("UpDecoderBlock2D",), each(one_of("UpDecoderBlock2D"), LEVELS)),
    "layers_per_block": (2, whole(1, 16)),
    "norm_num_groups": (32, whole(1, WIDTH)),
    "scaling_factor": (0.18215, real(0, 1e4)),  # the oldest folders leave it out
    "force_upcast": (True, one_of(True, False)),
    "sample_size": (None, optional(number_or_list(whole(1, WIDTH)))),  # not used
    "act_fn": ("silu", one_of("silu", "swish")),
    "mid_block_add_attention": (True, one_of(True)),
    "use_quant_conv": (True, one_of(True)),
    "use_post_quant_conv": (True, one_of(True)),
}
# Samplers whose models were all trained on the same forward process, the one of `diffusion.Schedule`.
DDPM_FAMILY = """
    DDIM DDPM PNDM EulerDiscrete EulerAncestralDiscrete LMSDiscrete HeunDiscrete DPMSolverMultistep
    DPMSolverSinglestep DPMSolverSDE KDPM2Discrete KDPM2AncestralDiscrete DEISMultistep UniPCMultistep
    SASolver DDIMParallel DDPMParallel
"""
SCHEDULE: Table = {
    "_class_name": ("DDIMScheduler", one_of(*(f"{name}Scheduler" for name in DDPM_FAMILY.split()))),
    "num_train_timesteps": (1000, whole(1, 100_000)),
    "beta_start": (0.0001, real(0, 1)),
    "beta_end": (0.02, real(0, 1)),
    "beta_schedule": ("linear", one_of("linear", "scaled_linear")),
    "prediction_type": ("epsilon", one_of("epsilon", "v_prediction", "sample")),
    "timestep_spacing": ("leading", one_of("leading", "trailing", "linspace")),
    "timestep_type": ("discrete", one_of("discrete")),
    "steps_offset": (0, whole(0, 1000)),
    "set_alpha_to_one": (True, one_of(True, False)),
    "rescale_betas_zero_snr": (False, flag),
}
# Of the noise in unCLIP's pictures, and of the pictures' embeddings.
IMAGE_NOISE: Table = SCHEDULE | {"beta_schedule": (REQUIRED, one_of("squaredcos_cap_v2"))}
NORMALIZER: Table = {"embedding_dim": (768, whole(1, WIDTH))}


def per_level(values: Mapping[str, Any], key: str, levels: int, source: str) -> tuple[int, ...]:
    """One number for each level, of a key that may give one for all."""
    value = values[key] if isinstance(values[key], tuple) else (values[key],) * levels
    if len(value) != levels:
        raise InputError(f"{source}: {key} = {list(value)} should be one number, or a list of {levels}")
    return value


def text_config(raw: Mapping[str, Any], source: str, *, projected: bool = False) -> TextConfig:
    """The config of a CLIPTextModel or CLIPTextModelWithProjection; of a CLIPModel's half if `projected`."""
    values = read_keys(raw, TEXT, source)
    if values["eos_token_id"] == 2:
        # The published configs say 2, which is no end token at all: CLIP's is the last of its 49,408.
        values["eos_token_id"] = min(values["vocab_size"], 49408) - 1
    if values["eos_token_id"] >= values["vocab_size"]:
        raise InputError(f"{source}: eos_token_id = {values['eos_token_id']} is no id of the vocabulary")
    if not (projected or any("WithProjection" in name for name in values["architectures"] or ())):
        values["projection_dim"] = None
    return _same_names(TextConfig, values)


def bert_config(raw: Mapping[str, Any], source: str) -> BertConfig:
    """The config of an LDMBertModel."""
    values = read_keys(raw, BERT, source)
    return BertConfig(
        vocab_size=values["vocab_size"],
        hidden_size=values["d_model"],
        intermediate_size=values["encoder_ffn_dim"],
        num_hidden_layers=values["encoder_layers"],
        num_attention_heads=values["encoder_attention_heads"],
        head_dim=values["head_dim"],
        max_position_embeddings=values["max_position_embeddings"],
    )


def vision_config(raw: Mapping[str, Any], source: str) -> VisionConfig:
    """The config of a CLIPVisionModelWithProjection."""
    return _same_names(VisionConfig, read_keys(raw, VISION, source))


def unet_config(raw: Mapping[str, Any], source: str) -> UNetConfig:
    """The config of a UNet2DConditionModel."""
    values = read_keys(raw, UNET, source)
    channels = values["block_out_channels"]
    attended = [DOWN[name] for name in values["down_block_types"]]
    mirrored = [UP[name] for name in reversed(values["up_block_types"])]
    if mirrored != attended or len(attended) != len(channels):
        raise InputError(f"{source}: up_block_types should mirror down_block_types, one for each level")
    depth = per_level(values, "transformer_layers_per_block", len(channels), source)
    layers = per_level(values, "layers_per_block", len(channels), source)
    if len(set(layers)) > 1:
        raise InputError(f"{source}: layers_per_block = {list(layers)} should be the same for each level")
    if values["addition_embed_type"] is None:
        values["addition_time_embed_dim"] = None
        if values["class_embed_type"] is None:
            values["projection_class_embeddings_input_dim"] = None
    return _same_names(
        UNetConfig,
        values,
        layers_per_block=layers[0],
        transformer_depth=tuple(d if has else 0 for d, has in zip(depth, attended, strict=True)),
        mid_depth=depth[-1] if values["mid_block_type"] else None,
        num_attention_heads=per_level(values, "attention_head_dim", len(channels), source),
        use_linear_projection=bool(values["use_linear_projection"]),
        upcast_attention=bool(values["upcast_attention"]),
        sample_size=per_level({"sample_size": values["sample_size"] or 64}, "sample_size", 2, source),
    )


def vae_config(raw: Mapping[str, Any], source: str) -> VAEConfig:
    """The config of an AutoencoderKL."""
    return _same_names(VAEConfig, read_keys(raw, VAE, source))


def normalizer_config(raw: Mapping[str, Any], source: str) -> NormalizerConfig:
    """The config of a StableUnCLIPImageNormalizer."""
    return _same_names(NormalizerConfig, read_keys(raw, NORMALIZER, source))


def schedule_config(raw: Mapping[str, Any], source: str, table: Table = SCHEDULE) -> ScheduleConfig:
    """The config of a scheduler; keys it leaves out take the defaults of diffusers' DDIMScheduler."""
    return _same_names(ScheduleConfig, read_keys(raw, table, source))


def _same_names(kind: type[Config], values: Mapping[str, Any], **others: Any) -> Config:
    """A dataclass from the keys that are called like its fields, and from others."""
    return kind(**{key: value for key, value in values.items() if key in kind.__dataclass_fields__} | others)
