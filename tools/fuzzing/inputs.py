"""What `fuzz.py` damages: small good files of every kind, from random numbers and `weights/tiny`."""

import gzip
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image, ImageCms
from safetensors.torch import save_file

from minti.formats import configs, keymap
from minti.formats.concept import Concept
from minti.model.clip import CLIPTextModel
from minti.model.image_encoder import CLIPVisionModel
from minti.model.unet import UNet
from minti.model.vae import VAE
from minti.study.classifier import Probe

TINY = Path(__file__).resolve().parents[2] / "weights" / "tiny"

# The model: the smallest that has every part ---

UNET = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "norm_num_groups": 4,
    "sample_size": 8,
}
VAE_CONFIG = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
}
CLIP = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = CLIP | {
    "model_type": "clip_text_model",
    "vocab_size": 2604,
    "eos_token_id": 2603,
    "projection_dim": 16,
}
VISION = CLIP | {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, "projection_dim": 16}
SCHEDULE = json.loads((TINY / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a module, random and the same every time."""
    generator = torch.Generator().manual_seed(0)
    return {key: 0.1 * torch.randn(t.shape, generator=generator) for key, t in module.state_dict().items()}


def save_old(content: Any, path: Path) -> None:
    """Write torch's older format, in which storages are called by their addresses; here by small numbers."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    found = buffer.getvalue()
    for i, address in enumerate(sorted(set(re.findall(rb"\d{14,16}", found)), key=found.index)):
        found = found.replace(address, str(i).zfill(len(address)).encode())
    path.write_bytes(found)


def make_model(folder: Path) -> None:
    """A folder in the layout of diffusers, with one part in each format of weights, and a CLIP as judge."""
    shutil.copytree(TINY / "tokenizer", folder / "tokenizer")
    shutil.copy(TINY / "model_index.json", folder)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULE)
    for name, raw, module in (
        ("unet", UNET, UNet(configs.unet_config(UNET, ""))),
        ("vae", VAE_CONFIG, VAE(configs.vae_config(VAE_CONFIG, ""))),
        ("text_encoder", TEXT, CLIPTextModel(configs.text_config(TEXT, ""))),
        ("image_encoder", VISION, CLIPVisionModel(configs.vision_config(VISION, ""))),
    ):
        extra = {"shares_text_space": True} if name == "image_encoder" else {}
        write_json(folder / name / "config.json", raw | extra)
        stem = "diffusion_pytorch_model" if name in ("unet", "vae") else "model"
        if name == "vae":
            save_old(weights(module), folder / name / f"{stem}.bin")
        elif name == "text_encoder":
            torch.save(weights(module), folder / name / "pytorch_model.bin")
        else:
            save_file(weights(module), folder / name / f"{stem}.safetensors", {"format": "pt"})
    settings = json.loads((TINY / "image_encoder" / "preprocessor_config.json").read_text(encoding="utf-8"))
    settings |= {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    write_json(folder / "image_encoder" / "preprocessor_config.json", settings)


def make_single(folder: Path) -> None:
    """The same model in single files: safetensors, a zip of torch, and torch's older format."""
    levels = {"block_out_channels": [32, 32], "norm_num_groups": 32}
    unet = UNet(configs.unet_config(UNET | levels | {"attention_head_dim": 8, "cross_attention_dim": 64}, ""))
    vae = VAE(configs.vae_config(VAE_CONFIG | levels, ""))
    text = CLIPTextModel(configs.text_config(TEXT | {"hidden_size": 64, "num_attention_heads": 1}, ""))
    tensors: dict[str, torch.Tensor] = {}
    for module, names in (
        (unet, (keymap.unet_blocks(unet.config), keymap.UNET_LAYERS, "model.diffusion_model.")),
        (vae, (keymap.vae_blocks(vae.config), keymap.VAE_LAYERS, "first_stage_model.")),
        (text, ({"text_model.": ""}, {}, "cond_stage_model.transformer.text_model.")),
    ):
        state = weights(module)
        for ours, origin in keymap.find_origins(state, *names).items():
            tensor = state[ours].half()
            tensors[origin.key] = tensor[..., None, None] if origin.form == "conv" else tensor
    shutil.copytree(TINY / "tokenizer", folder / "tokenizer")
    save_file(tensors, folder / "model.safetensors", {"modelspec.title": "small"})
    torch.save({"state_dict": tensors, "global_step": 1}, folder / "model.ckpt")
    save_old({"state_dict": tensors}, folder / "old.ckpt")


def make_judge(folder: Path) -> None:
    """A CLIP in the layout of transformers, and the classifier of a study."""
    shutil.copytree(TINY / "tokenizer", folder, dirs_exist_ok=True)
    raw = {"model_type": "clip", "projection_dim": 16, "text_config": TEXT, "vision_config": VISION}
    write_json(
        folder / "config.json", raw | {"logit_scale_init_value": 2.6592, "architectures": ["CLIPModel"]}
    )
    text = CLIPTextModel(configs.text_config(TEXT, "", projected=True))
    both = weights(text) | weights(CLIPVisionModel(configs.vision_config(VISION, "")))
    both = {k if "." in k else f"{k}.weight": t for k, t in both.items()}
    save_file(both, folder / "model.safetensors", {"format": "pt"})
    facts = {"color": ["red", "blue"], "shape": ["cup", "imp"]}
    config = {"facts": facts, "phrases": {"a red {}": {"color": "red"}}, "accuracy": {"color": 1.0}}
    write_json(folder / "probe" / "config.json", config)
    save_file(weights(Probe(facts)), folder / "probe" / "model.safetensors")


# What is beside a model ---


def make_tokenizers(folder: Path) -> None:
    """The layouts of tokenizers: slow and fast files of CLIP and BERT, and OpenAI's list."""
    shutil.copytree(TINY / "tokenizer", folder / "slow")
    write_json(folder / "slow" / "added_tokens.json", {"<cat>": 2604, "<cat>_1": 2605})
    vocab = json.loads((TINY / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    merges = (TINY / "tokenizer" / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    added = [{"id": 2604, "content": "<cat>", "special": False, "normalized": True}]
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    write_json(folder / "fast" / "tokenizer.json", {"added_tokens": added, "model": model})
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdefghijklmnopqrstuvwxyz",
        "photo",
        "##s",
        "red",
    ]
    (folder / "bert").mkdir()
    (folder / "bert" / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    vocab = {word: i for i, word in enumerate(words)}
    write_json(folder / "bert-fast" / "tokenizer.json", {"model": {"type": "WordPiece", "vocab": vocab}})
    pairs = [f"{chr(97 + i % 26)}{i:x} x" for i in range(48894)]
    content = gzip.compress("\n".join(["#version: 0.2", *pairs]).encode(), 1, mtime=0)
    (folder / "bpe_simple_vocab_16e6.txt.gz").write_bytes(content)


def make_words(folder: Path) -> None:
    """Learned words in the formats of other trainers."""
    folder.mkdir(exist_ok=True)
    rows = 0.1 * torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    Concept("<cat>", rows, {"init_word": "cat", "step": "2"}).save(folder / "own.safetensors")
    stars = {"string_to_token": {"*": 265}, "string_to_param": {"*": rows}}
    a1111 = stars | {"name": "cat", "step": 2, "sd_checkpoint": "abc", "sd_checkpoint_name": None}
    bundle = {"bundle_emb.cat.emb_params": rows, "lora_unet_x.lora_up.weight": rows}
    for name, content in {
        "diffusers.bin": {"<cat>": rows[0]},
        "official.pt": stars,
        "a1111.pt": a1111,
        "bare.pt": rows,
        "sdxl.pt": {"clip_l": rows, "clip_g": torch.cat([rows, rows], 1)},
        "kohya.safetensors": {"emb_params": rows},
        "onetrainer.safetensors": {"emp_params": rows, "emp_params_out": rows.clone()},
        "output.safetensors": {"clip_l_out": rows, "clip_g_out": torch.cat([rows, rows], 1)},
        "sdxl.safetensors": {"clip_l": rows, "clip_g": torch.cat([rows, rows], 1)},
        "pivotal.safetensors": {"text_encoders_0": rows, "text_encoders_1": rows.clone()},
        "bundle.safetensors": {key: rows.clone() for key in bundle},
    }.items():
        torch.save(content, folder / name) if name.endswith(("n", "t")) else save_file(content, folder / name)
    save_old(a1111, folder / "old.pt")


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).convert(mode)


def make_photos(folder: Path) -> None:
    """Photos in several formats, with EXIF and colour profiles, masks and captions."""
    folder.mkdir(exist_ok=True)
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x010F: "maker", 0x011A: 72.0, 0x9003: "2024:01:01 00:00:00"})
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture(24, 20).save(folder / "a.png", exif=exif, icc_profile=srgb)
    picture(24, 20, "RGBA").save(folder / "b.png")
    picture(24, 20, "P").save(folder / "c.png", transparency=3)
    picture(24, 20, "I;16").save(folder / "d.png")
    picture(24, 20).save(folder / "e.jpg", exif=exif, icc_profile=profile)
    picture(24, 20, "CMYK").save(folder / "f.jpg")
    picture(24, 20).save(folder / "g.webp", exif=exif, icc_profile=srgb)
    picture(24, 20).save(folder / "h.tif", exif=exif, compression="tiff_lzw")
    picture(24, 20, "F").save(folder / "i.tif")
    for suffix in ("gif", "bmp", "tga", "ppm", "jp2"):
        picture(24, 20).save(folder / f"j-{suffix}.{suffix}")
    picture(24, 20, "L").save(folder / "b.mask.png")
    picture(20, 24, "L").save(folder / "e-masklabel.png")
    (folder / "a.txt").write_text("a photo of {} in the snow", encoding="utf-8")
    (folder / "b.caption").write_text("a photo of {} on grass", encoding="utf-16")


def make_texts(folder: Path) -> None:
    """Lists of prompts, and pictures of other tools with theirs."""
    folder.mkdir(exist_ok=True)
    (folder / "templates.txt").write_text("a photo of a {}\na drawing of {}\n", encoding="utf-8")
    (folder / "prompts.txt").write_text("# reconstruction\na photo of {}\n# background\n{} on grass\n")
    picture(16, 16).save(folder / "1.png")
    (folder / "prompts.csv").write_text("file,prompt\n1.png,a photo of <cat>\n1.png,a drawing of <cat>\n")


WORD = {"images": "texts", "placeholder": "<cat>", "init_word": "cat"}


def make_recipes(folder: Path) -> None:
    """Config files of the commands, and the recipe of a study."""
    folder.mkdir(exist_ok=True)
    run = {"checkpoint": "model", "out": "out", "steps": 2, "lr": 5e-3, "size": 16, "crop": "center"}
    entries = [{"name": name, **WORD, "placeholder": f"<{name}>", "lr": 0.01} for name in ("cat", "dog")]
    setups = {"many": {"steps": 2}, "grid": {"lr": [0.01, 0.02], "num_vectors": 2}}
    claims = [{"says": "More.", "first": "many", "second": "model", "score": "clip_i", "expect": "above"}]
    of_cat = {"init_word": "cat", "images": "../texts", "set": "final", "captions": {"short": ["red cat"]}}
    for name, content in {
        "train": run
        | WORD
        | {"sample_prompt": ["a photo of {}"], "num_vectors": 2, "progressive": [1], "keep": "best"},
        "words": run | {"concepts": entries, "seed": 3},
        "sample": {"checkpoint": "model", "prompt": ["a cat"], "num_images": 1, "seed": 1, "eta": 0.5},
        "evaluate": {"checkpoint": "model", "concept": ["words/own.safetensors"], "images": "texts"},
        "concepts": {"cat": of_cat, "dog": of_cat | {"kind": "style", "facts": {"color": "red"}}},
        "study": {"title": "A study", "checkpoint": "model", "concepts": "recipes/concepts.yaml"}
        | {"prompts": {"final": ["a red {}"]}, "base": {"steps": 1, "batch_size": 1}, "setups": setups}
        | {"captions": {"model": "short"}, "claims": claims},
    }.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
