"""From the checkpoints of all stages to the folder that is shipped, in the layout of diffusers."""

import json
from pathlib import Path

import torch
import yaml
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from minti.formats.atomic import write_atomically

from . import models
from .captions import phrases
from .concepts import describe, held_out, pictures
from .decoder import load_vae
from .latents import scaling_factor, stored_latents
from .probe import ACCURACY, READS
from .training import Run, ema_of

WEIGHTS = {
    "text_encoder": "model.safetensors",
    "image_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "safety_checker": [None, None],
    "requires_safety_checker": False,
}
# What an image encoder's input looks like, for whoever loads ours with other tools.
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "crop_size": {"height": 64, "width": 64},
    "size": {"shortest_edge": 64},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
}


def _write_json(path: Path, value: dict) -> None:
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def stage(run: Run) -> None:
    out = run.folder
    scale = scaling_factor(stored_latents(run.work))
    states: dict[str, dict[str, Tensor]] = {
        "text_encoder": ema_of(run.work, "text")["text_encoder"],
        "image_encoder": ema_of(run.work, "clip")["image_encoder"],
        "unet": ema_of(run.work, "unet")["unet"],
        "vae": load_vae(run.work).state_dict(),
    }
    for name, state in states.items():
        half = {key: value.to(torch.float16).contiguous() for key, value in state.items()}
        write_atomically(out / name / WEIGHTS[name], save(half, {"format": "pt"}))
    tokenizer = run.work / "world" / "tokenizer"
    for path in sorted(tokenizer.iterdir()):
        write_atomically(out / "tokenizer" / path.name, path.read_bytes())
    vocab_size = len(json.loads((tokenizer / "vocab.json").read_text(encoding="utf-8")))
    _write_json(out / "text_encoder" / "config.json", models.text_config(vocab_size))
    _write_json(out / "image_encoder" / "config.json", models.VISION)
    _write_json(out / "image_encoder" / "preprocessor_config.json", PREPROCESSOR)
    _write_json(out / "unet" / "config.json", models.UNET)
    _write_json(out / "vae" / "config.json", {**models.VAE, "scaling_factor": scale})
    _write_json(out / "scheduler" / "scheduler_config.json", models.SCHEDULER)
    _write_json(out / "model_index.json", MODEL_INDEX)
    for concept in held_out().values():
        for i, picture in enumerate(pictures(concept)):
            path = out / "concepts" / concept.name / f"{i + 1}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path, optimize=True)
    about = yaml.safe_dump(describe(), sort_keys=False, width=100)
    write_atomically(out / "concepts" / "concepts.yaml", about.encode())
    if (run.work / "probe" / "state.pt").is_file():  # only `minti.study` has a use for it
        probe = ema_of(run.work, "probe")["probe"].items()
        half = {key: value.to(torch.float16).contiguous() for key, value in probe}
        write_atomically(out / "probe" / "model.safetensors", save(half, {"format": "pt"}))
        accuracy = run.work / "probe" / ACCURACY
        known = json.loads(accuracy.read_text()) if accuracy.is_file() else {}
        config = {"facts": READS, "phrases": phrases(), "accuracy": known}
        _write_json(out / "probe" / "config.json", config)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"export: {out}, {size / 1e6:.1f} MB", flush=True)
