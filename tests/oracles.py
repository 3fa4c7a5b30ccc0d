"""Small Stable Diffusions with random weights, made by the reference libraries, to compare minti with."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from minti.tokenizer import byte_symbols

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
        "cross_attention_dim": 64,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 20 + 6 * 8,
        "sample_size": 16,
    },
}
VAE = {
    "block_out_channels": [32, 32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 64,
}
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def text_config(family: str, vocab_size: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=1,  # 64 channels a head, as in public models
        hidden_act="gelu" if family == "sd2" else "quick_gelu",
        projection_dim=32,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=0,
    )


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Fresh weights are too tame a test: make the norms and biases count, and nothing zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim == 1:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return module.eval().requires_grad_(False)


@functools.cache
def _modules(family: str, vocab_size: int) -> tuple:
    torch.manual_seed(7)
    unet = randomise(UNet2DConditionModel(**UNETS[family]), 1)
    vae = randomise(AutoencoderKL(**VAE), 2)
    text = randomise(CLIPTextModel(text_config(family, vocab_size)), 3)
    return unet, vae, text


def pipeline(folder: Path, family: str = "sd1", prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    """A diffusers pipeline of the given family ("sd1", "sd2"), whose tokenizer lies in `folder`."""
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


def save_folder(folder: Path, family: str = "sd1", prediction_type: str = "epsilon", **options) -> Path:
    """A checkpoint folder as published: written by diffusers, with the slow tokenizer's files."""
    pipe = pipeline(folder.parent / f"{folder.name}-words", family, prediction_type)
    pipe.save_pretrained(folder, **options)
    write_tokenizer(folder / "tokenizer", pad="!" if family == "sd2" else "<|endoftext|>")
    return folder


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference, relative to the largest absolute value of the reference."""
    return ((ours.double() - reference.double()).abs().max() / reference.double().abs().max()).item()
