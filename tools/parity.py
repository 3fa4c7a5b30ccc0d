"""Print, as a markdown table, how far minti is from the reference libraries: `python tools/parity.py`.

Every row is one output of one module, or of the whole way from prompts to pictures, for random weights shared
by both sides. The error is the largest absolute difference, divided by the largest value of the reference.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import diffusers
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import minti
from tests import compare, oracles

NO_MIDDLE = {"mid_block_type": None, "layers_per_block": 1}


@torch.no_grad()
def small() -> Iterator[tuple[str, str, compare.Pairs]]:
    """(module, config, outputs) of models of all families, with few channels."""
    for family in ("sd1", "sd2"):
        text = oracles.text_encoder(family, num_attention_heads=4)
        yield "text encoder", f"{family}, 3 x 64", compare.compare_text(text, compare.prompt_ids(600))
    text = oracles.text_encoder("sd2", projected=True)
    yield "text encoder", "projected, 3 x 64", compare.compare_text(text, compare.prompt_ids(600))
    yield "image encoder", "3 x 64", compare.compare_image_encoder(oracles.image_encoder())
    for family, changes in (("sd1", {}), ("sd2", {}), ("inpainting", {}), ("sdxl", {}), ("sd1", NO_MIDDLE)):
        unet = oracles.unet(family, **changes)
        config = f"{family}, {'-'.join(map(str, unet.config.block_out_channels))}"
        config += ", no middle" if changes else ""
        for height, width in ((16, 16), (13, 9)):
            yield "UNet", f"{config}, {height}x{width}", compare.compare_unet(unet, height, width)
    yield "autoencoder", "32-32-64-64, 32x48 pixels", compare.compare_vae(oracles.vae(), 32, 48)


def pictures(folder: Path) -> Iterator[tuple[str, str, compare.Pairs]]:
    """Prompts to pictures, for checkpoints written by diffusers and loaded from their folders."""
    for family in ("sd1", "sd2"):
        for kind in ("epsilon", "v_prediction"):
            path = oracles.save_folder(folder / f"{family}-{kind}", family, kind)
            sd, pipe = minti.load(path, device="cpu", dtype="float32"), oracles.pipeline(folder, family, kind)
            for guidance_scale, eta in ((1.0, 0.0), (7.5, 0.0), (7.5, 0.7)):
                how = {"steps": 20, "guidance_scale": guidance_scale, "eta": eta}
                config = f"{family}, {kind}, 20 steps, guidance {guidance_scale}, eta {eta}"
                yield "whole picture", config, compare.compare_pictures(sd, pipe, **how)


def full_size() -> Iterator[tuple[str, str, compare.Pairs]]:
    """SD 1.5 as it is published, but for the weights."""
    text = oracles.text_encoder("sd1.5", 49408)
    yield "text encoder", "SD 1.5", compare.compare_text(text, compare.prompt_ids(49408))
    vae = oracles.vae(block_out_channels=[128, 256, 512, 512])
    yield "autoencoder", "SD 1.5, 256x256 pixels", compare.compare_vae(vae, 256, 256)
    yield "UNet", "SD 1.5, 64x64", compare.compare_unet(oracles.unet("sd1.5"), 64, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full-size", action="store_true", help="SD 1.5 in its true size too; takes 6 GB")
    args = parser.parse_args()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    print(
        f"minti {minti.__version__} against diffusers {diffusers.__version__} and transformers "
        f"{transformers.__version__}; torch {torch.__version__}, CPU, float32.\n\n"
        "| module | config | output | max abs error / scale |\n| --- | --- | --- | --- |"
    )
    with tempfile.TemporaryDirectory() as folder:
        groups = [small(), pictures(Path(folder)), full_size() if args.full_size else ()]
        for module, config, pairs in (row for group in groups for row in group):
            for name, (ours, reference) in pairs.items():
                # Pictures are rounded to 256 levels, which on its own is an error of half a level.
                error = compare.relative_error(ours, reference)
                note = " (1/255 is 3.9e-3)" if name == "pixels" else ""
                print(f"| {module} | {config} | {name} | {error:.1e}{note} |", flush=True)


if __name__ == "__main__":
    main()
