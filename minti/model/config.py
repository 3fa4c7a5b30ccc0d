"""What distinguishes one Stable Diffusion from another: a few frozen dataclasses.

Every part of the model is described by one of them, and by nothing else: the code of `clip.py`, `unet.py`,
`vae.py` and `diffusion.py` knows no family names. The values come from the configs beside the weights
(`formats/configs.py`) or, for single files that carry none, from the shapes of the weights
(`formats/shapes_to_config.py`). Numbers that contradict each other raise InputError.
"""

from dataclasses import dataclass

from .config_checks import check_heads, check_prediction


@dataclass(frozen=True)
class TransformerConfig:
    """The transformer in an encoder of CLIP. Defaults: the text encoder of ViT-L/14, as in SD 1.x."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "quick_gelu"  # x * sigmoid(1.702 x) in OpenAI's models, "gelu" in OpenCLIP's
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_heads((self.hidden_size, self.num_attention_heads, self.num_hidden_layers))


@dataclass(frozen=True)
class TextConfig(TransformerConfig):
    """CLIP's text encoder."""

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407
    projection_dim: int | None = None  # None: the encoder ends without text_projection, as in SD 1.x and 2.x


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
    # SDXL: widths of the embedding of one size, and of the pooled text together with six such embeddings.
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None  # alone: width of what unCLIP is shown
    sample_size: tuple[int, int] = (64, 64)  # height and width, in latents, of the pictures it was trained on

    def __post_init__(self) -> None:
        levels = zip(self.block_out_channels, self.num_attention_heads, self.transformer_depth, strict=True)
        check_heads(*levels, (self.block_out_channels[-1], self.num_attention_heads[-1], self.mid_depth))


@dataclass(frozen=True)
class VAEConfig:
    """The KL autoencoder. Defaults: SD 1.x and 2.x."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    force_upcast: bool = True  # of SDXL only: keep it in float32 where the rest is float16
    scaling_factor: float = 0.18215  # the UNet sees latents times this, which gives them about unit variance

    @property
    def downscale(self) -> int:
        """Pixels per latent, along each side: 8 for all public Stable Diffusion models."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule and the conventions of DDIM sampling. Defaults: SD 1.x."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"  # linear in sqrt(beta); or "linear", or "squaredcos_cap_v2"
    prediction_type: str = "epsilon"  # what the UNet predicts; or "v_prediction", or "sample" (x0)
    timestep_spacing: str = "leading"  # or "trailing", or "linspace"
    steps_offset: int = 1  # added to all time steps of "leading"
    set_alpha_to_one: bool = False  # whether the last step ends at alpha 1 instead of that of t = 0
    # Rescale the betas so that nothing of the picture is left at the last time step (arXiv 2305.08891, 3.1).
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        check_prediction(self.prediction_type, self.rescale_betas_zero_snr)
