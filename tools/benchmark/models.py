"""What is timed: checkpoints of public shape, with random weights, which take as long as real ones."""

import itertools
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from minti.formats import configs
from minti.model.clip import CLIPTextModel
from minti.model.tokenizer import byte_symbols
from minti.model.unet import UNet
from minti.model.vae import VAE
from tools.make_tiny import bpe
from tools.make_tiny import models as tiny
from tools.make_tiny.export import MODEL_INDEX, WEIGHTS

LEVELS = 4
SD15 = {
    "text_encoder": tiny.TEXT
    | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    | {"projection_dim": 768, "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407},
    "unet": tiny.UNET
    | {"block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "norm_num_groups": 32}
    | {"down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]}
    | {"up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}
    | {"attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64},
    "vae": tiny.VAE
    | {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32}
    | {"down_block_types": ["DownEncoderBlock2D"] * LEVELS, "up_block_types": ["UpDecoderBlock2D"] * LEVELS}
    | {"sample_size": 512, "scaling_factor": 0.18215},
    "scheduler": tiny.SCHEDULER | {"prediction_type": "epsilon"},
}
TINY = {
    "text_encoder": tiny.text_config(2604),
    "unet": tiny.UNET,
    "vae": tiny.VAE,
    "scheduler": tiny.SCHEDULER,
}
MODELS = {"sd-1.5": SD15, "tiny": TINY}
"""The `config.json` of every part, by name of the model; "tiny" is `weights/tiny`."""

MODULES = {
    "text_encoder": (CLIPTextModel, configs.text_config),
    "unet": (UNet, configs.unet_config),
    "vae": (VAE, configs.vae_config),
}
PLACEHOLDER, INIT_WORD, PROMPT, GUIDANCE_SCALE = "<toy>", "toy", "a photo of a toy", 7.5
PHOTOS, PHOTO_SIZE = 4, 512


def build(model: str, part: str) -> torch.nn.Module:
    """A module of minti, frozen, with whatever weights it starts with on the device in use."""
    kind, config = MODULES[part]
    return kind(config(MODELS[model][part], part)).requires_grad_(False).eval()


def native_size(model: str) -> int:
    """Pixels of the pictures the model was trained on."""
    return MODELS[model]["vae"]["sample_size"]


def write_checkpoint(model: str, folder: Path) -> None:
    """A folder in the layout of diffusers, in float32 as the published ones, that either side can load."""
    torch.manual_seed(0)
    for part, config in MODELS[model].items():
        (folder / part).mkdir(parents=True)
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / name).write_text(json.dumps(config))
        if part in MODULES:
            save_file(build(model, part).state_dict(), folder / part / WEIGHTS[part], {"format": "pt"})
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX))
    write_tokenizer(model, folder / "tokenizer")


def write_tokenizer(model: str, folder: Path) -> None:
    """A vocabulary of the right length, which knows one word."""
    symbols = list(byte_symbols().values())
    merges = [("t", "o"), ("to", "y</w>"), *itertools.product(symbols, symbols)]
    count = MODELS[model]["text_encoder"]["vocab_size"] - 2 * len(symbols) - 2
    bpe.write(folder, list(dict.fromkeys(merges))[:count])


def write_photos(folder: Path) -> None:
    """Photos so small that it costs little to read them again for every sample; real ones are larger."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(PHOTOS):
        blotches = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        blotches.resize((PHOTO_SIZE, PHOTO_SIZE), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")
