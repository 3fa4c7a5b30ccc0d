"""How large the parts of the tiny model are, as the very `config.json` files that are shipped."""

CONTEXT = 128
TEXT = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_size": CONTEXT,
    "intermediate_size": 4 * CONTEXT,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    # The width of the space shared with pictures. It is the text encoder's own: there is no text_projection.
    "projection_dim": CONTEXT,
}
VISION = {
    "architectures": ["CLIPVisionModelWithProjection"],
    "model_type": "clip_vision_model",
    "image_size": 64,
    "patch_size": 8,
    "num_channels": 3,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": CONTEXT,
    "shares_text_space": True,  # minti's own key: texts end in this space, too, so it may judge pictures
}
VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [24, 48, 96],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 64,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "scaling_factor": 1.0,
}
UNET = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 16,
    "block_out_channels": [64, 96, 128],
    # As in SDXL the finest level has no attention: over 256 positions it would cost as much as all the rest.
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "layers_per_block": 1,
    "attention_head_dim": 4,  # in spite of its name, the number of heads
    "cross_attention_dim": CONTEXT,
    "norm_num_groups": 16,
    "norm_eps": 1e-5,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
}


def text_config(vocab_size: int) -> dict:
    ids = {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1, "pad_token_id": vocab_size - 1}
    return {**TEXT, "vocab_size": vocab_size, **ids}
