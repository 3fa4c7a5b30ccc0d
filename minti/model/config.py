"""What distinguishes one Stable Diffusion from another: a few frozen dataclasses.

Every part of the model is described by one of them, and by nothing else: the code of `clip.py`, `unet.py`,
`vae.py` and `diffusion.py` knows no family names. The values come from the `config.json` beside the weights
(`from_json`) or, for single files that carry none, from the shapes of the weights (`infer.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError


def _require(raw: Mapping[str, Any], source: str, supported: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse a config that switches on what minti does not implement. Absent keys keep their defaults."""
    for key, values in supported.items():
        if raw.get(key, values[0]) not in values:
            allowed = " or ".join(repr(v) for v in values)
            raise InputError(f"{source}: {key} = {raw[key]!r} is not supported, only {allowed}")


def _take(raw: Mapping[str, Any], source: str, *keys: str) -> list[Any]:
    """The values of keys that have no sensible default."""
    missing = [key for key in keys if raw.get(key) is None]
    if missing:
        raise InputError(
            f"{source}: {', '.join(missing)} missing; is this the config of another kind of model?"
        )
    return [raw[key] for key in keys]


def _per_level(value: Any, levels: int, key: str, source: str) -> tuple[int, ...]:
    """A config may give one number for all levels, or a list with one for each."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * levels
    if len(values) != levels or not all(isinstance(v, int) for v in values):
        raise InputError(
            f"{source}: {key} = {value!r} should be one integer or {levels} of them, one for each level"
        )
    return values


def _check_transformer(config: TextConfig | VisionConfig) -> None:
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        value = getattr(config, key)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"CLIP's {key} = {value!r} should be a positive integer")
    if config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"CLIP's hidden_size = {config.hidden_size} should be a multiple of num_attention_heads"
        )


@dataclass(frozen=True)
class TextConfig:
    """The CLIP text encoder. Defaults: ViT-L/14 as in SD 1.x."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"  # x * sigmoid(1.702 x) in OpenAI's models, "gelu" in OpenCLIP's
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    projection_dim: int | None = None  # None: the encoder ends without text_projection, as in SD 1.x and 2.x

    def __post_init__(self) -> None:
        _check_transformer(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], source: str) -> TextConfig:
        """Read the `config.json` of a CLIPTextModel or CLIPTextModelWithProjection."""
        _require(raw, source, {"hidden_act": ("quick_gelu", "gelu")})
        keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        vocab_size, hidden, intermediate, layers, heads = _take(raw, source, *keys)
        eos = raw.get("eos_token_id", 2)
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=raw.get("max_position_embeddings", 77),
            hidden_act=raw.get("hidden_act", "quick_gelu"),
            layer_norm_eps=raw.get("layer_norm_eps", 1e-5),
            # The published configs say 2, which is no end token at all: CLIP's is the last of its 49,408.
            eos_token_id=min(vocab_size, 49408) - 1 if eos == 2 else eos,
            projection_dim=(
                raw["projection_dim"]
                if any("WithProjection" in name for name in raw.get("architectures") or [])
                else None
            ),
        )


@dataclass(frozen=True)
class VisionConfig:
    """The CLIP image encoder. Defaults: ViT-B/32, with which the papers score their results."""

    image_size: int = 224
    patch_size: int = 32
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512

    def __post_init__(self) -> None:
        _check_transformer(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], source: str) -> VisionConfig:
        """Read the `config.json` of a CLIPVisionModelWithProjection."""
        _require(raw, source, {"hidden_act": ("quick_gelu", "gelu"), "num_channels": (3,)})
        names = cls.__dataclass_fields__
        required = (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "patch_size",
        )
        _take(raw, source, *required)
        return cls(**{name: raw[name] for name in names if name in raw})


@dataclass(frozen=True)
class UNetConfig:
    """The denoiser. Defaults: SD 1.x. Tuples have one entry for each level, from fine to coarse."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    transformer_depth: tuple[int, ...] = (1, 1, 1, 0)  # transformer blocks after each residual block; 0: none
    mid_depth: int | None = 1  # the same in the middle block; None: there is no middle block
    num_attention_heads: tuple[int, ...] = (8, 8, 8, 8)
    cross_attention_dim: int = 768
    use_linear_projection: bool = False
    upcast_attention: bool = False  # SD 2.1's attention logits overflow float16
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    addition_time_embed_dim: int | None = (
        None  # SDXL: width of the embedding of each size and crop coordinate
    )
    projection_class_embeddings_input_dim: int | None = (
        None  # SDXL: width of pooled text + six such embeddings
    )
    sample_size: int = 64  # height and width, in latents, of the pictures it was trained on

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], source: str) -> UNetConfig:
        """Read the `config.json` of a UNet2DConditionModel."""
        supported = {
            "act_fn": ("silu",),
            "center_input_sample": (False,),
            "flip_sin_to_cos": (True,),
            "freq_shift": (0,),
            "downsample_padding": (1,),
            "mid_block_scale_factor": (1,),
            "mid_block_type": ("UNetMidBlock2DCrossAttn", None),
            "dual_cross_attention": (False,),
            "only_cross_attention": (False,),
            "class_embed_type": (None,),
            "num_class_embeds": (None,),
            "addition_embed_type": (None, "text_time"),
            "encoder_hid_dim_type": (None,),
            "time_embedding_type": ("positional",),
            "time_cond_proj_dim": (None,),
            "resnet_time_scale_shift": ("default",),
            "attention_type": ("default",),
            "conv_in_kernel": (3,),
            "conv_out_kernel": (3,),
            "cross_attention_norm": (None,),
        }
        _require(raw, source, supported)
        channels, down, up, context_dim = _take(
            raw, source, "block_out_channels", "down_block_types", "up_block_types", "cross_attention_dim"
        )
        levels = len(channels)
        has_attention = [name == "CrossAttnDownBlock2D" for name in down]
        known = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
        if unknown := sorted({*down, *up} - known):
            raise InputError(
                f"{source}: block type {unknown[0]!r} is not supported, only {', '.join(sorted(known))}"
            )
        if [name == "CrossAttnUpBlock2D" for name in reversed(up)] != has_attention or len(down) != levels:
            raise InputError(f"{source}: up_block_types should mirror down_block_types, one for each level")
        depth = _per_level(
            raw.get("transformer_layers_per_block", 1), levels, "transformer_layers_per_block", source
        )
        # attention_head_dim holds, in spite of its name, the number of heads.
        heads = raw.get("num_attention_heads") or raw.get("attention_head_dim", 8)
        has_mid = raw.get("mid_block_type", "UNetMidBlock2DCrossAttn") is not None
        return cls(
            in_channels=raw.get("in_channels", 4),
            out_channels=raw.get("out_channels", 4),
            block_out_channels=tuple(channels),
            layers_per_block=_per_level(raw.get("layers_per_block", 2), 1, "layers_per_block", source)[0],
            transformer_depth=tuple(d * a for d, a in zip(depth, has_attention, strict=True)),
            mid_depth=depth[-1] if has_mid else None,
            num_attention_heads=_per_level(heads, levels, "attention_head_dim", source),
            cross_attention_dim=context_dim,
            use_linear_projection=bool(raw.get("use_linear_projection")),
            upcast_attention=bool(raw.get("upcast_attention")),
            norm_num_groups=raw.get("norm_num_groups", 32),
            norm_eps=raw.get("norm_eps", 1e-5),
            addition_time_embed_dim=raw.get("addition_time_embed_dim"),
            projection_class_embeddings_input_dim=raw.get("projection_class_embeddings_input_dim"),
            sample_size=raw.get("sample_size") or 64,
        )


@dataclass(frozen=True)
class VAEConfig:
    """The KL autoencoder. Defaults: SD 1.x and 2.x."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215  # the UNet sees latents times this, which gives them about unit variance

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], source: str) -> VAEConfig:
        """Read the `config.json` of an AutoencoderKL."""
        supported = {
            "act_fn": ("silu",),
            "mid_block_add_attention": (True,),
            "shift_factor": (None, 0),
            "latents_mean": (None,),
            "use_quant_conv": (True,),
            "use_post_quant_conv": (True,),
        }
        _require(raw, source, supported)
        channels, latent_channels = _take(raw, source, "block_out_channels", "latent_channels")
        return cls(
            in_channels=raw.get("in_channels", 3),
            out_channels=raw.get("out_channels", 3),
            latent_channels=latent_channels,
            block_out_channels=tuple(channels),
            layers_per_block=raw.get("layers_per_block", 2),
            norm_num_groups=raw.get("norm_num_groups", 32),
            scaling_factor=raw.get("scaling_factor", 0.18215),  # the oldest folders do not say
        )

    @property
    def downscale(self) -> int:
        """Pixels per latent, along each side: 8 for all public Stable Diffusion models."""
        return 2 ** (len(self.block_out_channels) - 1)


# Samplers whose models were all trained on the same forward process, the one of `diffusion.Schedule`.
# Whichever a checkpoint recommends, minti samples with DDIM.
DDPM_FAMILY = (
    *("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler"),
    *("EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"),
    *("DPMSolverSinglestepScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
    *("DEISMultistepScheduler", "UniPCMultistepScheduler"),
)


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule and the conventions of DDIM sampling. Defaults: SD 1.x."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"  # linear in sqrt(beta); or "linear"
    prediction_type: str = "epsilon"  # what the UNet predicts; or "v_prediction", or "sample" (x0)
    timestep_spacing: str = "leading"  # or "trailing", or "linspace"
    steps_offset: int = 1
    set_alpha_to_one: bool = False

    def __post_init__(self) -> None:
        choices = {
            "beta_schedule": ("scaled_linear", "linear"),
            "prediction_type": ("epsilon", "v_prediction", "sample"),
            "timestep_spacing": ("leading", "trailing", "linspace"),
        }
        _require(vars(self), "noise schedule", choices)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], source: str) -> ScheduleConfig:
        """Read a `scheduler_config.json`; keys it leaves out take the defaults of diffusers' DDIMScheduler.

        One of them is passed over on purpose: `clip_sample`, which many checkpoints of latent models omit and
        which then defaults to true, is meant for pictures; latents are not bounded by 1.
        """
        _require(
            raw,
            source,
            {
                "_class_name": DDPM_FAMILY,
                "trained_betas": (None,),
                "thresholding": (False,),
                "rescale_betas_zero_snr": (False,),
                "beta_schedule": ("linear", "scaled_linear"),
                "prediction_type": ("epsilon", "v_prediction", "sample"),
                "timestep_spacing": ("leading", "trailing", "linspace"),
            },
        )
        return cls(
            num_train_timesteps=raw.get("num_train_timesteps", 1000),
            beta_start=raw.get("beta_start", 0.0001),
            beta_end=raw.get("beta_end", 0.02),
            beta_schedule=raw.get("beta_schedule", "linear"),
            prediction_type=raw.get("prediction_type", "epsilon"),
            timestep_spacing=raw.get("timestep_spacing", "leading"),
            steps_offset=raw.get("steps_offset", 0),
            set_alpha_to_one=raw.get("set_alpha_to_one", True),
        )
