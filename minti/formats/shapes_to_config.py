"""Configs of single files, which carry none: from the names and shapes of their weights.

Every width, depth and count is seen in them. What shapes cannot tell follows the rules that all public
checkpoints keep: 32 groups; 8 heads a level where the attention blocks project with convolutions, 64 channels
a head where they project with matrices, and in CLIP. All functions take {key: shape} of one part of the
model, without its prefix, and raise KeyError for a key that should be there.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace

from ..errors import InputError
from ..model.bert import BertConfig
from ..model.config import TextConfig, UNetConfig, VAEConfig
from ..model.image_encoder import VisionConfig

Shapes = Mapping[str, tuple[int, ...]]


def _count(shapes: Shapes, pattern: str) -> int:
    """How many numbered siblings there are: `pattern` captures the number at the start of a key."""
    return len({m[1] for key in shapes if (m := re.match(pattern, key))})


def _sd2_layers(count: int, hidden: int, whole: bool) -> int:
    """How many layers of its text encoder Stable Diffusion 2 uses: all of OpenCLIP's but the last.

    OpenCLIP's ViT-H has 24. Files come with all of them, or without the last one. Of encoders of other sizes
    `whole` tells: they have the projection that belongs behind the last layer.
    """
    return min(count, 23) if hidden == 1024 else count - 1 if whole else count


def _clip_text(
    tokens: tuple[int, ...], mlp: tuple[int, ...], positions: tuple[int, ...], layers: int, hidden_act: str
) -> TextConfig:
    vocab_size, hidden = tokens
    return TextConfig(
        hidden_size=hidden,
        intermediate_size=mlp[0],
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        hidden_act=hidden_act,
        vocab_size=vocab_size,
        max_position_embeddings=positions[0],
        eos_token_id=min(vocab_size, 49408) - 1,
    )


def text_config(shapes: Shapes, *, is_sd2: bool = False) -> TextConfig:
    """From the keys of the Hugging Face layout (`text_model.encoder.layers...`)."""
    keys = ("embeddings.token_embedding", "encoder.layers.0.mlp.fc1", "embeddings.position_embedding")
    found = [shapes[f"text_model.{key}.weight"] for key in keys]
    count = _count(shapes, r"text_model\.encoder\.layers\.(\d+)\.")
    layers = _sd2_layers(count, found[0][-1], whole=False) if is_sd2 else count
    return _clip_text(*found, layers, "gelu" if is_sd2 else "quick_gelu")


def openclip_text_config(shapes: Shapes) -> TextConfig:
    """From the keys of OpenCLIP (`transformer.resblocks...`), as Stable Diffusion 2 uses it."""
    keys = ("token_embedding.weight", "transformer.resblocks.0.mlp.c_fc.weight", "positional_embedding")
    found = [shapes[key] for key in keys]
    count = _count(shapes, r"transformer\.resblocks\.(\d+)\.")
    layers = _sd2_layers(count, found[0][-1], whole="text_projection" in shapes)
    return _clip_text(*found, layers, "gelu")


def openai_text_config(shapes: Shapes) -> TextConfig:
    """From the keys of OpenAI's CLIP, which are OpenCLIP's; here all layers count."""
    return replace(
        openclip_text_config(shapes),
        num_hidden_layers=_count(shapes, r"transformer\.resblocks\.(\d+)\."),
        hidden_act="quick_gelu",
        projection_dim=shapes["text_projection"][1],
    )


def bert_config(shapes: Shapes) -> BertConfig:
    """From the keys of the first latent diffusion model's text encoder, which has 8 heads."""
    vocab_size, hidden = shapes["token_emb.weight"]
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=shapes["attn_layers.layers.1.1.net.0.0.weight"][0],
        num_hidden_layers=_count(shapes, r"attn_layers\.layers\.(\d+)\.") // 2,
        head_dim=shapes["attn_layers.layers.0.1.to_q.weight"][0] // 8,
        max_position_embeddings=shapes["pos_emb.emb.weight"][0],
    )


def openai_vision_config(shapes: Shapes) -> VisionConfig:
    """From the keys of OpenAI's CLIP (`visual...`), those with a vision transformer."""
    hidden, projection_dim = shapes["visual.proj"]
    patch_size = shapes["visual.conv1.weight"][-1]
    return VisionConfig(
        image_size=patch_size * math.isqrt(shapes["visual.positional_embedding"][0] - 1),
        patch_size=patch_size,
        hidden_size=hidden,
        intermediate_size=shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"][0],
        num_hidden_layers=_count(shapes, r"visual\.transformer\.resblocks\.(\d+)\."),
        num_attention_heads=max(1, hidden // 64),
        projection_dim=projection_dim,
    )


def unet_config(shapes: Shapes, *, is_sdxl: bool = True) -> UNetConfig:
    """From the keys of the CompVis layout (`input_blocks...`).

    There every level is `layers_per_block` residual blocks followed by one that halves the resolution (`op`),
    so the index of the first `op` tells the number of layers, and their count the number of levels.

    Args:
        is_sdxl: a `label_emb` is for SDXL's sizes and text; otherwise for the picture that unCLIP is shown.
    """
    ops = sorted(int(m[1]) for key in shapes if (m := re.match(r"input_blocks\.(\d+)\.0\.op\.weight", key)))
    layers = (ops[0] if ops else _count(shapes, r"input_blocks\.(\d+)\.")) - 1
    first = [1 + level * (layers + 1) for level in range(len(ops) + 1)]  # first residual block of each level
    channels = tuple(shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0] for i in first)
    blocks = [f"input_blocks.{i}.1" for i in first]
    depth = tuple(_count(shapes, rf"{re.escape(b)}\.transformer_blocks\.(\d+)\.") for b in blocks)
    has_mid = "middle_block.0.in_layers.0.weight" in shapes
    mid_depth = _count(shapes, r"middle_block\.1\.transformer_blocks\.(\d+)\.") if has_mid else None
    attended = [b for b, d in zip([*blocks, "middle_block.1"], [*depth, mid_depth], strict=True) if d]
    if not attended:
        raise InputError("the UNet has no cross-attention; only text-to-image models can be used")
    linear = len(shapes[f"{attended[0]}.proj_in.weight"]) == 2
    told = shapes.get("label_emb.0.0.weight")
    return UNetConfig(
        in_channels=shapes["input_blocks.0.0.weight"][1],
        out_channels=shapes["out.2.weight"][0],
        block_out_channels=channels,
        layers_per_block=layers,
        transformer_depth=depth,
        mid_depth=mid_depth,
        num_attention_heads=tuple(max(1, c // 64) if linear else 8 for c in channels),
        cross_attention_dim=shapes[f"{attended[0]}.transformer_blocks.0.attn2.to_k.weight"][1],
        use_linear_projection=linear,
        upcast_attention=linear and not (told and is_sdxl),  # SD 2.1 needs it, 2.0 cannot be told apart
        addition_time_embed_dim=256 if told and is_sdxl else None,
        projection_class_embeddings_input_dim=told[1] if told else None,
    )


def vae_config(shapes: Shapes) -> VAEConfig:
    """From the keys of the CompVis layout (`encoder.down.0.block...`)."""
    levels = _count(shapes, r"encoder\.down\.(\d+)\.")
    return VAEConfig(
        in_channels=shapes["encoder.conv_in.weight"][1],
        out_channels=shapes["decoder.conv_out.weight"][0],
        latent_channels=shapes["post_quant_conv.weight"][0],
        block_out_channels=tuple(shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)),
        layers_per_block=_count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
    )
