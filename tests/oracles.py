"""Small Stable Diffusions with random weights, made by the reference libraries, to compare minti with."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    LDMTextToImagePipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    StableUnCLIPImg2ImgPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

import minti
from minti.formats import keymap
from minti.model.sdxl import TwoTextEncoders
from minti.model.tokenizer import byte_symbols

# transformers 5 resizes with torchvision where that is installed, which rounds otherwise than Pillow.
Processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
"""Public key manifests, configs and vocabulary: at hand where minti is developed, not part of the project."""


def shared(path: str) -> Path:
    """A file of public test data, or the test is skipped."""
    if not (SHARED / path).exists():
        pytest.skip(f"needs the public test data at {SHARED / path}")
    return SHARED / path


def write_tokenizer(folder: Path, pad: str = "<|endoftext|>") -> Path:
    """A tiny CLIP tokenizer in the usual files: the 256 bytes, and merges that build a few words."""
    folder.mkdir(parents=True, exist_ok=True)
    symbols = list(byte_symbols().values())
    merges = []
    for word in ("photo", "cat", "the", "on", "grass", "toy", "of", "dog", "and", "red"):
        left = word[0]
        for i, letter in enumerate(word[1:], 2):
            right = letter + ("</w>" if i == len(word) else "")
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
    vocab = [*symbols, *(s + "</w>" for s in symbols), *("".join(m) for m in merges)]
    vocab = [*dict.fromkeys(vocab), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(vocab)}), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8"
    )
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special | {"pad_token": pad}))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


UNET = {
    "block_out_channels": [32, 64, 64, 64],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "attention_head_dim": 8,
    "cross_attention_dim": 64,
    "sample_size": 8,
}
UNETS = {
    "sd1": UNET,
    # The level of 32 channels has one head, since public linear models have 64 channels a head.
    "sd2": UNET | {"attention_head_dim": [1, 1, 1, 1], "use_linear_projection": True},
    "inpainting": UNET | {"in_channels": 9},
    "sdxl": {
        "block_out_channels": [32, 64, 64],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 3],
        "attention_head_dim": [1, 2, 4],
        "use_linear_projection": True,
        "cross_attention_dim": 96,  # 64 and 32 of the two text encoders
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 20 + 6 * 8,
        "sample_size": 16,
    },
}
UNETS |= {
    "sd1.5": UNET
    | {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768, "sample_size": 64},
    "sd2.1": UNETS["sd2"]
    | {
        "block_out_channels": [320, 640, 1280, 1280],
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "upcast_attention": True,
        "sample_size": 96,
    },
}
# Two levels, pictures of 16 pixels: a training step takes milliseconds.
UNETS["small"] = UNET | {
    "block_out_channels": [32, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 32,
    "norm_num_groups": 8,  # with one channel per group, GroupNorm would cancel the shift by the time step
}
UNETS["unclip"] = UNETS["small"] | {
    "block_out_channels": [64, 64],
    "attention_head_dim": 1,
    "use_linear_projection": True,
    "cross_attention_dim": 64,
    "norm_num_groups": 32,
    "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": 2 * 24,  # the embedding of a picture, and its noise level
}
VAE = {
    "block_out_channels": [32, 32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 64,
}
SMALL_VAE = {
    "block_out_channels": [32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "sample_size": 16,
}
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
# As SDXL publishes it, with keys that concern DDIM only.
EULER = SCHEDULE | {"timestep_spacing": "leading", "sample_max_value": 1.0, "skip_prk_steps": True}


TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 1,  # 64 channels a head, as in public models
    "hidden_act": "quick_gelu",
    "projection_dim": 32,
}
TEXTS = {
    "sd1": TEXT,
    "small": TEXT | {"hidden_size": 32, "num_hidden_layers": 1},
    "sd2": TEXT | {"hidden_act": "gelu"},
    "inpainting": TEXT,
    "sdxl": TEXT,
    "sdxl second": TEXT | {"hidden_act": "gelu", "hidden_size": 32, "projection_dim": 20},
    "sd1.5": TEXT
    | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "sd2.1": TEXT
    | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
    | {"hidden_act": "gelu"},
}


def text_config(family: str, vocab_size: int, **changes) -> CLIPTextConfig:
    special = {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1, "pad_token_id": 0}
    return CLIPTextConfig(vocab_size=vocab_size, **TEXTS[family] | special | changes)


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Fresh weights are too tame a test: make the norms and biases count, and nothing zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim == 1:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return module.eval().requires_grad_(False)


# One builder for each module of the reference. `changes` are to its config.


def unet(family: str = "sd1", **changes) -> UNet2DConditionModel:
    torch.manual_seed(1)
    return randomise(UNet2DConditionModel(**UNETS[family] | changes), 1)


def vae(**changes) -> AutoencoderKL:
    torch.manual_seed(2)
    return randomise(AutoencoderKL(**VAE | changes), 2)


def text_encoder(
    family: str = "sd1", vocab_size: int = 600, *, projected: bool = False, **changes
) -> CLIPTextModel | CLIPTextModelWithProjection:
    torch.manual_seed(3)
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return randomise(kind(text_config(family, vocab_size, **changes)), 3)


def image_encoder(**changes) -> CLIPVisionModelWithProjection:
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2}
    small |= {"image_size": 32, "patch_size": 8, "projection_dim": 24}
    torch.manual_seed(4)
    return randomise(CLIPVisionModelWithProjection(CLIPVisionConfig(**small | changes)), 4)


def clip(vocab_size: int = 600, **changes) -> CLIPModel:
    """A whole CLIP. `changes` are to the config of the image encoder."""
    text = TEXTS["small"] | {"vocab_size": vocab_size, "pad_token_id": 0}
    text |= {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1, "hidden_size": 64}
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1}
    vision |= {"image_size": 32, "patch_size": 8} | changes
    torch.manual_seed(5)
    return randomise(CLIPModel(CLIPConfig(projection_dim=24, text_config=text, vision_config=vision)), 5)


def save_clip(folder: Path, **changes) -> CLIPModel:
    """A transformers folder of a CLIP, and the model in it."""
    write_tokenizer(folder)
    model = clip(len(json.loads((folder / "vocab.json").read_text(encoding="utf-8"))), **changes)
    model.save_pretrained(folder)
    return model


def add_image_encoder(folder: Path) -> None:
    """Make a checkpoint of the family "small" judge its own pictures, as weights/tiny does."""
    image_encoder(projection_dim=TEXTS["small"]["hidden_size"]).save_pretrained(folder / "image_encoder")
    path = folder / "image_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shares_text_space": True}))


@functools.cache
def _modules(family: str, vocab_size: int) -> tuple:
    small = SMALL_VAE if family == "small" else {}
    return unet(family), vae(**small), text_encoder(family, vocab_size)


def pipeline(folder: Path, family: str = "sd1", prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    """A diffusers pipeline of the given family ("sd1", "sd2", "small"), whose tokenizer lies in `folder`."""
    words = write_tokenizer(folder / "words", pad="!" if family == "sd2" else "<|endoftext|>")
    tokenizer = CLIPTokenizer.from_pretrained(words, model_max_length=77)
    unet, vae, text = _modules(family, len(tokenizer))
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULE, prediction_type=prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl_pipeline(folder: Path, prediction_type: str = "epsilon") -> StableDiffusionXLPipeline:
    """An SDXL as published, but small; its tokenizers lie in `folder`, and it samples with DDIM."""
    words = (write_tokenizer(folder / "words"), write_tokenizer(folder / "words_2", pad="!"))
    tokenizers = [CLIPTokenizer.from_pretrained(path, model_max_length=77) for path in words]
    pipe = StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025),
        text_encoder=text_encoder("sdxl", len(tokenizers[0])),
        text_encoder_2=text_encoder("sdxl second", len(tokenizers[0]), projected=True),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet("sdxl", attention_head_dim=[1, 1, 1]),  # 64 channels a head, as in public models
        scheduler=EulerDiscreteScheduler.from_config(EULER | {"prediction_type": prediction_type}),
        add_watermarker=False,
    )
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_sdxl(folder: Path, prediction_type: str = "epsilon", **options) -> Path:
    """The folder of an SDXL as published: its scheduler is Euler's."""
    pipe = sdxl_pipeline(folder.parent / f"{folder.name}-words", prediction_type)
    pipe.scheduler = EulerDiscreteScheduler.from_config(EULER | {"prediction_type": prediction_type})
    pipe.save_pretrained(folder, **options)
    write_tokenizer(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer_2", pad="!")
    return folder


def unclip_pipeline(folder: Path) -> StableUnCLIPImg2ImgPipeline:
    """A Stable unCLIP as published, but small; its tokenizer lies in `folder`, and it samples with DDIM."""
    words = write_tokenizer(folder / "words", pad="!")
    tokenizer = CLIPTokenizer.from_pretrained(words, model_max_length=77)
    normalizer = StableUnCLIPImageNormalizer(24)
    generator = torch.Generator().manual_seed(7)
    normalizer.mean.data = torch.randn(1, 24, generator=generator)
    normalizer.std.data = 0.3 + torch.rand(1, 24, generator=generator)
    pipe = StableUnCLIPImg2ImgPipeline(
        feature_extractor=Processor(size={"shortest_edge": 40}, crop_size=32),
        image_encoder=image_encoder(num_attention_heads=1),  # 64 channels a head, as in OpenAI's ViT-L/14
        image_normalizer=normalizer,
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=tokenizer,
        text_encoder=text_encoder("sd2", len(tokenizer)),
        unet=unet("unclip"),
        scheduler=DDIMScheduler(**SCHEDULE, prediction_type="v_prediction"),
        vae=vae(**SMALL_VAE),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_folder(folder: Path, family: str = "sd1", prediction_type: str = "epsilon", **options) -> Path:
    """A checkpoint folder as published: written by diffusers, with the slow tokenizer's files."""
    pipe = pipeline(folder.parent / f"{folder.name}-words", family, prediction_type)
    pipe.save_pretrained(folder, **options)
    write_tokenizer(folder / "tokenizer", pad="!" if family == "sd2" else "<|endoftext|>")
    return folder


def to_single_file(
    ours: Mapping[str, torch.Tensor], origins: Mapping[str, keymap.Origin]
) -> dict[str, torch.Tensor]:
    """The inverse of `keymap.to_ours`: our tensors under the names and in the forms of the single file."""
    thirds: dict[str, dict[str, torch.Tensor]] = {}
    theirs = {}
    for name, origin in origins.items():
        key, form, tensor = origin.key, origin.form, ours[name]
        if form in keymap.THIRDS:
            thirds.setdefault(key, {})[form] = tensor
        elif form == "transposed":
            theirs[key] = tensor.T
        else:
            theirs[key] = tensor[..., None, None] if form == "conv" else tensor
    return theirs | {key: torch.cat([parts[form] for form in keymap.THIRDS]) for key, parts in thirds.items()}


def single_file(sd: minti.StableDiffusion) -> dict[str, torch.Tensor]:
    """The weights of a loaded model under the names of a single file (`test_keymap.py` proves the names)."""
    if isinstance(sd.text_encoder, TwoTextEncoders):
        first, second = sd.text_encoder.text_encoder, sd.text_encoder.text_encoder_2
        blocks = keymap.openai_text_blocks(second.config)
        texts = [
            (first, {"text_model.": ""}, {}, "conditioner.embedders.0.transformer.text_model."),
            (second, blocks, keymap.OPENAI_LAYERS, "conditioner.embedders.1.model."),
        ]
    elif sd.text_encoder.config.hidden_act == "gelu":
        blocks = keymap.openclip_blocks(sd.text_encoder.config)
        texts = [(sd.text_encoder, blocks, keymap.OPENCLIP_LAYERS, "cond_stage_model.model.")]
    else:
        texts = [(sd.text_encoder, {"text_model.": ""}, {}, "cond_stage_model.transformer.text_model.")]
    prompter, images = sd.image_prompter, []
    if prompter:
        blocks = keymap.openai_image_blocks(prompter.image_encoder.config)
        images = [(prompter.image_encoder, blocks, keymap.OPENAI_LAYERS, "embedder.model.")]
    weights = {}
    for module, *names in (
        (sd.unet, keymap.unet_blocks(sd.unet.config), keymap.UNET_LAYERS, "model.diffusion_model."),
        (sd.vae, keymap.vae_blocks(sd.vae.config), keymap.VAE_LAYERS, "first_stage_model."),
        *texts,
        *images,
    ):
        state = module.state_dict()
        weights |= to_single_file(state, keymap.find_origins(state, *names))
    if (prefix := texts[0][-1]) == "cond_stage_model.model.":
        # Files hold a last block and a head, which Stable Diffusion 2 does not use.
        first, n = f"{prefix}transformer.resblocks.0.", sd.text_encoder.config.num_hidden_layers
        for key in [key for key in weights if key.startswith(first)]:
            weights[key.replace(".0.", f".{n}.", 1)] = torch.full_like(weights[key], 9.0)
        width = sd.text_encoder.config.hidden_size
        weights[f"{prefix}text_projection"] = torch.ones(width, width)
        weights[f"{prefix}logit_scale"] = torch.tensor(4.6)
    return {key: tensor.clone().contiguous() for key, tensor in weights.items()}


# The first latent diffusion model ---

BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"*<>.,abcdefghijklmnopqrstuvwxyz"]
BERT_WORDS += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
BERT_WORDS += ["photo", "of", "the", "cat", "on", "grass", "toy", "dog", "red"]
BERT = {"vocab_size": len(BERT_WORDS), "d_model": 64, "encoder_ffn_dim": 80, "encoder_layers": 3}
BERT |= {"encoder_attention_heads": 8, "head_dim": 4, "init_std": 0.2}
# As published, although the model was trained with "scaled_linear".
WRONG_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear", "clip_sample": False}


def ldm_pipeline(folder: Path) -> LDMTextToImagePipeline:
    """A small LDM with its BERT; the vocabulary lies in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(BERT_WORDS), encoding="utf-8")
    torch.manual_seed(6)
    pipe = LDMTextToImagePipeline(
        vqvae=vae(),
        bert=randomise(LDMBertModel(LDMBertConfig(**BERT)), 6),
        tokenizer=BertTokenizer(vocab=str(folder / "vocab.txt")),
        unet=unet("sd1"),
        scheduler=DDIMScheduler(**WRONG_SCHEDULE),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
