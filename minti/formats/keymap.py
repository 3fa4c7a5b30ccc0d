"""Where each of our weights is found in single-file checkpoints (CompVis, OpenCLIP and OpenAI layout).

Our own names are those of diffusers folders, so folders need no map, only a few aliases (`FOLDER_ALIASES`).
For single files the tables below say, from our side, how a block is called there (`*_blocks`, which depends
on how many there are) and how a layer inside a block (`*_LAYERS`). Each of our keys is claimed by one row, so
the same tables serve both directions.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..model.bert import BertConfig
from ..model.config import TextConfig, UNetConfig, VAEConfig
from ..model.image_encoder import VisionConfig


@dataclass(frozen=True)
class Origin:
    """The place of one of our tensors in a file."""

    key: str
    form: str = "same"  # how it is stored there, see `to_ours`


THIRDS = {"q": 0, "k": 1, "v": 2}


def stored_shapes(ours: tuple[int, ...], form: str) -> list[tuple[int, ...]]:
    """The shapes that one of our tensors may have in the file, the usual one first."""
    if form in THIRDS:
        return [(3 * ours[0], *ours[1:])]
    if form == "conv":
        return [(*ours, 1, 1), ours]
    return [ours[::-1] if form == "transposed" else ours]


def to_ours(tensor: Tensor, form: str) -> Tensor:
    """The stored tensor in the form we keep it."""
    if form in THIRDS:
        # (3D, ...) -> (D, ...): queries, keys and values were one matrix
        return tensor.chunk(3)[THIRDS[form]]
    if form == "conv":
        return tensor.flatten(1)  # (out, in, 1, 1) -> (out, in); a few files have (out, in) already
    return tensor.T if form == "transposed" else tensor


UNET_LAYERS = {
    "norm1.": ("in_layers.0.", "same"),
    "conv1.": ("in_layers.2.", "same"),
    "time_emb_proj.": ("emb_layers.1.", "same"),
    "norm2.": ("out_layers.0.", "same"),
    "conv2.": ("out_layers.3.", "same"),
    "conv_shortcut.": ("skip_connection.", "same"),
}


def unet_blocks(config: UNetConfig) -> dict[str, str]:
    """One numbered list of blocks down and one up; a change of resolution is a block, or the end of one."""
    blocks = {
        "time_embedding.linear_1.": "time_embed.0.",
        "time_embedding.linear_2.": "time_embed.2.",
        "add_embedding.linear_1.": "label_emb.0.0.",
        "add_embedding.linear_2.": "label_emb.0.2.",
        "class_embedding.linear_1.": "label_emb.0.0.",
        "class_embedding.linear_2.": "label_emb.0.2.",
        "conv_in.": "input_blocks.0.0.",
        "mid_block.resnets.0.": "middle_block.0.",
        "mid_block.attentions.0.": "middle_block.1.",
        "mid_block.resnets.1.": "middle_block.2.",
        "conv_norm_out.": "out.0.",
        "conv_out.": "out.2.",
    }
    per_level = config.layers_per_block + 1
    for level, depth in enumerate(config.transformer_depth):
        for layer in range(config.layers_per_block):
            block = f"input_blocks.{1 + level * per_level + layer}"
            blocks[f"down_blocks.{level}.resnets.{layer}."] = f"{block}.0."
            blocks[f"down_blocks.{level}.attentions.{layer}."] = f"{block}.1."
        blocks[f"down_blocks.{level}.downsamplers.0.conv."] = f"input_blocks.{(level + 1) * per_level}.0.op."
        up = len(config.transformer_depth) - 1 - level  # the same level on the way up
        for layer in range(per_level):
            block = f"output_blocks.{up * per_level + layer}"
            blocks[f"up_blocks.{up}.resnets.{layer}."] = f"{block}.0."
            blocks[f"up_blocks.{up}.attentions.{layer}."] = f"{block}.1."
        blocks[f"up_blocks.{up}.upsamplers.0.conv."] = f"{block}.{2 if depth else 1}.conv."
    return blocks


VAE_LAYERS = {
    "conv_shortcut.": ("nin_shortcut.", "same"),
    "group_norm.": ("norm.", "same"),
    "to_q.bias": ("q.bias", "same"),
    "to_k.bias": ("k.bias", "same"),
    "to_v.bias": ("v.bias", "same"),
    "to_q.weight": ("q.weight", "conv"),
    "to_k.weight": ("k.weight", "conv"),
    "to_v.weight": ("v.weight", "conv"),
    "to_out.0.bias": ("proj_out.bias", "same"),
    "to_out.0.weight": ("proj_out.weight", "conv"),
}


def vae_blocks(config: VAEConfig) -> dict[str, str]:
    """Levels are counted from fine to coarse there, also on the way up."""
    blocks = {"quant_conv.": "quant_conv.", "post_quant_conv.": "post_quant_conv."}
    for half in ("encoder", "decoder"):
        blocks |= {
            f"{half}.conv_in.": f"{half}.conv_in.",
            f"{half}.mid_block.resnets.0.": f"{half}.mid.block_1.",
            f"{half}.mid_block.attentions.0.": f"{half}.mid.attn_1.",
            f"{half}.mid_block.resnets.1.": f"{half}.mid.block_2.",
            f"{half}.conv_norm_out.": f"{half}.norm_out.",
            f"{half}.conv_out.": f"{half}.conv_out.",
        }
    levels = len(config.block_out_channels)
    for level in range(levels):
        up = levels - 1 - level
        for layer in range(config.layers_per_block + 1):
            blocks[f"encoder.down_blocks.{level}.resnets.{layer}."] = f"encoder.down.{level}.block.{layer}."
            blocks[f"decoder.up_blocks.{up}.resnets.{layer}."] = f"decoder.up.{level}.block.{layer}."
        blocks[f"encoder.down_blocks.{level}.downsamplers.0."] = f"encoder.down.{level}.downsample."
        blocks[f"decoder.up_blocks.{up}.upsamplers.0."] = f"decoder.up.{level}.upsample."
    return blocks


OPENCLIP_LAYERS = {
    "layer_norm1.": ("ln_1.", "same"),
    "layer_norm2.": ("ln_2.", "same"),
    "mlp.fc1.": ("mlp.c_fc.", "same"),
    "mlp.fc2.": ("mlp.c_proj.", "same"),
    "self_attn.out_proj.": ("attn.out_proj.", "same"),
    **{
        f"self_attn.{form}_proj.{kind}": (f"attn.in_proj_{kind}", form)
        for form in THIRDS
        for kind in ("weight", "bias")
    },
}


def openclip_blocks(config: TextConfig) -> dict[str, str]:
    layers = range(config.num_hidden_layers)
    return {
        "text_model.embeddings.token_embedding.": "token_embedding.",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.": "ln_final.",
        **{f"text_model.encoder.layers.{i}.": f"transformer.resblocks.{i}." for i in layers},
    }


# OpenAI's CLIP: the same names, and matrices (in, out) that lead into the space shared with pictures.
OPENAI_LAYERS = OPENCLIP_LAYERS | {".weight": ("", "transposed")}


def openai_text_blocks(config: TextConfig) -> dict[str, str]:
    return openclip_blocks(config) | {"text_projection": "text_projection"}


def openai_image_blocks(config: VisionConfig) -> dict[str, str]:
    layers = range(config.num_hidden_layers)
    return {
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding.": "visual.conv1.",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.pre_layrnorm.": "visual.ln_pre.",
        "vision_model.post_layernorm.": "visual.ln_post.",
        "visual_projection": "visual.proj",
        **{f"vision_model.encoder.layers.{i}.": f"visual.transformer.resblocks.{i}." for i in layers},
    }


def bert_blocks(config: BertConfig) -> dict[str, str]:
    """The first latent diffusion model's text encoder: attention and perceptron are layers of their own."""
    blocks = {
        "model.embed_tokens.": "token_emb.",
        "model.embed_positions.": "pos_emb.emb.",
        "model.layer_norm.": "norm.",
    }
    for i in range(config.num_hidden_layers):
        ours, attention, mlp = f"model.layers.{i}.", *(f"attn_layers.layers.{2 * i + j}." for j in (0, 1))
        blocks |= {f"{ours}self_attn.{name}_proj.": f"{attention}1.to_{name}." for name in (*THIRDS, "out")}
        blocks |= {
            f"{ours}self_attn_layer_norm.": f"{attention}0.",
            f"{ours}final_layer_norm.": f"{mlp}0.",
            f"{ours}fc1.": f"{mlp}1.net.0.0.",
            f"{ours}fc2.": f"{mlp}1.net.2.",
        }
    return blocks


def find_origins(
    keys: Iterable[str], blocks: Mapping[str, str], layers: Mapping[str, tuple[str, str]], prefix: str
) -> dict[str, Origin]:
    """Our key -> its place in a single file where this part of the model stands under `prefix`."""
    origins = {}
    for key in keys:
        (block,) = (b for b in blocks if key.startswith(b))
        rest = key.removeprefix(block)
        (layer,) = [name for name in layers if rest.startswith(name)] or [""]
        theirs, form = layers.get(layer, ("", "same"))
        origins[key] = Origin(prefix + blocks[block] + theirs + rest.removeprefix(layer), form)
    return origins


def ema_key(key: str) -> str:
    """The running average that training kept of a UNet weight: its name without any dots."""
    return "model_ema." + key.removeprefix("model.").replace(".", "")


# Under which names, besides our own, folders have been seen to store a weight: (ours, theirs), one at a time.
FOLDER_ALIASES = (
    ("text_model.", ""),  # transformers 5 writes no prefix
    (".to_q.", ".query."),  # the autoencoder's attention before diffusers 0.15
    (".to_k.", ".key."),
    (".to_v.", ".value."),
    (".to_out.0.", ".proj_attn."),
)

# What a file may hold besides weights: constants, training statistics, other models' heads.
IGNORED = re.compile(
    r"(.*\.)?(position_ids|logit_scale|attn_mask)"
    r"|(posterior_|sqrt_|log_one_minus_)\w+|betas|alphas_cumprod(_prev)?|logvar|scale_factor"
    r"|(first_stage_model\.)?(model_ema|loss)\..*|lvlb_weights"
    r"|(cond_stage_model|conditioner\.embedders\.0)\.model\.(text_projection|visual\..*)"
    # CLIP's other half and its projections, which Stable Diffusion 1 does not use; a copy of the text encoder
    # that the official training of textual inversion saved; the filter of finished pictures.
    r"|cond_stage_model\.(transformer\.)?(text_projection(\.weight)?|vision_model\..*|visual_projection\..*)"
    r"|embedding_manager\..*|safety_checker\..*"
    r"|(cond_stage_model\.transformer\.)?to_logits\..*"  # BERT's head, for another task
)
