"""What a file or folder that minti cannot load seems to be, so that messages can say it."""

import re
from collections.abc import Iterable
from pathlib import Path

# From a telling key of a file of tensors: the first row that fits any key counts.
KEYS = (
    (r"lora[_.](up|down|A|B|unet|te|linear)", "a LoRA: small changes, to be added to a model"),
    (r"hada_w1|lokr_w1|oft_blocks", "a LyCORIS file: small changes, to be added to a model"),
    (r"^control_model\.|controlnet_cond_embedding", "a ControlNet, which steers a model"),
    (r"motion_modules\.", "AnimateDiff's layers for moving pictures, to be added to a model"),
    (r"^(ip_adapter|image_proj)\.", "an IP-Adapter, which steers a model by a picture"),
    (r"joint_blocks|double_blocks|^transformer_blocks\.", "a diffusion transformer (SD 3, Flux), no UNet"),
    (r"^(module|_orig_mod)\.", "a model that torch has wrapped; save its `.module` without that prefix"),
    (r"^conditioner\.embedders\.1\.", "SDXL: two text encoders and a larger UNet, in one file"),
    (r"^conditioner\.", "a Stable Diffusion 2 in the layout of its successor's code"),
    (r"^cond_stage_model\.transformer\.token_emb\.", "the first latent diffusion model (LDM), with BERT"),
    (r"^cond_stage_model\.", "a Stable Diffusion in one file (CompVis layout), or most of one"),
    (r"^model\.diffusion_model\.", "a UNet in the CompVis layout, without a text encoder"),
    (r"^vision_model\.|^visual\.", "CLIP with its image encoder"),
    (r"^add_embedding\.", "the UNet of SDXL alone"),
    (r"^(down_blocks\.0\.resnets|input_blocks\.0)\.", "a UNet alone"),
    (r"(^|\.)decoder\.(mid|up|mid_block|up_blocks)\.", "an autoencoder (VAE) alone"),
    (r"(^|\.)token_embedding\.weight$", "a CLIP text encoder alone"),
    (r"^(string_to_param|emb_params|(emp_params|clip_[lg])(_out)?)$", "a learned word, for --concept"),
)
# From the first bytes of a file.
HEADS = (
    (b"version https://git-lfs", "a git-LFS pointer, no weights; run `git lfs pull` or download the file"),
    (b"GGUF", "a gguf file, of weights in other number formats; get the model as safetensors"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it"),
    (b"Rar!", "a rar archive; unpack it"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"\x89HDF", "an HDF5 file of Keras or TensorFlow; get the model as safetensors"),
    (b"\x89PNG", "a PNG picture, not weights"),
    (b"\xff\xd8\xff", "a JPEG picture, not weights"),
)
# From its name, for formats that have no mark of their own.
NAMES = (
    (r"\.onnx$", "an ONNX file, of a program; get the model as safetensors"),
    (r"\.msgpack$", "a file of Flax; get the model as safetensors"),
    (r"\.(aria2|part|crdownload|incomplete)$", "an unfinished download; finish it"),
    (r"\.index\.json$", "the list of a model's pieces; give the folder that holds them"),
)
# From what a folder holds instead of weights that minti reads.
FOLDERS = {
    "openvino_model.xml": "OpenVINO's programs",
    "*.onnx": "ONNX programs",
    "*.msgpack": "weights of Flax",
    "*.h5": "weights of TensorFlow",
    "*.gguf": "gguf files",
}


def kind_of_keys(keys: Iterable[str]) -> str:
    """What a file of these tensors seems to be, as a noun phrase; "" if nothing is known."""
    keys = list(keys)
    return next((kind for pattern, kind in KEYS if any(re.search(pattern, key) for key in keys)), "")


def kind_of_head(path: Path, head: bytes) -> str:
    """What a file that is neither safetensors nor of torch seems to be, as the rest of a message."""
    start = head.lstrip().lower()
    kinds = [kind for magic, kind in HEADS if head.startswith(magic)]
    kinds += [kind for pattern, kind in NAMES if re.search(pattern, path.name.lower())]
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        kinds.append("a web page, not the weights; use the site's download link")
    if start.startswith((b"{", b"[")):
        kinds.append("JSON, not weights (an answer of the site, or a config); give the folder it describes")
    unknown = "neither safetensors nor a PyTorch file, or is damaged; download it again"
    return f"is {[*kinds, unknown][0] if head else 'empty; download it again'}"


def kind_of_folder(path: Path) -> str:
    """What a folder without weights that minti reads holds instead, as the rest of a message."""
    places = [path, *path.glob("*/")]
    kinds = [kind for pattern, kind in FOLDERS.items() if any(next(p.glob(pattern), None) for p in places)]
    return f"it holds {kinds[0]}; get the model as safetensors" if kinds else "download the whole folder"
