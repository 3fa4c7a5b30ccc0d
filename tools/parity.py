"""Print, as a markdown table, how far minti is from the reference libraries: `python tools/parity.py`.

Every row is one output of one module, or of the whole way from prompts to pictures, for random weights shared
by both sides. The error is the largest absolute difference, divided by the largest value of the reference.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import minti
from minti.errors import InputError
from minti.formats.checkpoint import make_plan
from minti.model.stable_diffusion import Predict
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
    plain = [(family, {}) for family in ("sd1", "sd2", "inpainting", "sdxl", "unclip")]
    for family, changes in (*plain, ("sd1", NO_MIDDLE)):
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


@dataclass(frozen=True)
class Published:
    """Nine numbers of a picture, in [0, 1], that diffusers' own slow tests expect of a public checkpoint.

    Attributes:
        place: the first row and column of the 3 x 3 numbers, of the blue channel.
        numpy_noise: the noise is numpy's, of seed 0; otherwise that of torch.
    """

    name: str
    prompt: str
    steps: int
    guidance_scale: float
    side: int
    place: int
    values: str
    tolerance: float
    numpy_noise: bool = True


PUBLISHED = (
    Published(
        *("CompVis/stable-diffusion-v1-4", "a photograph of an astronaut riding a horse", 3, 7.5, 512, -3),
        ".38019 .28647 .27321 .40377 .38290 .35446 .39218 .38165 .42239",
        1e-4,
    ),
    Published(
        *("stabilityai/stable-diffusion-2", "A painting of a squirrel eating a burger", 20, 7.5, 768, 253),
        ".1868 .1922 .1527 .1921 .1908 .1624 .1779 .1652 .1734",
        1e-2,
        numpy_noise=False,
    ),
    Published(
        *("CompVis/ldm-text2im-large-256", "A painting of a squirrel eating a burger", 3, 6.0, 256, -3),
        ".51825 .52850 .52543 .54258 .52304 .52569 .54363 .55276 .56878",
        1e-3,
    ),
)


@torch.no_grad()
def published_picture(sd: minti.StableDiffusion, case: Published) -> torch.Tensor:
    """The picture of a case, (3, H, W) in [0, 1], not rounded."""
    h = case.side // sd.vae.config.downscale

    def sampler(predict: Predict, x_T: torch.Tensor) -> Iterator[torch.Tensor]:
        if case.numpy_noise:
            noise = np.random.RandomState(0).standard_normal((1, sd.vae.config.latent_channels, h, h))
            x_T = torch.from_numpy(noise).float().to(sd.device)
        return sd.schedule.ddim_sample(predict, x_T, case.steps)

    how = {"steps": case.steps, "guidance_scale": case.guidance_scale, "size": case.side, "sampler": sampler}
    *_, latents = sd.denoise([case.prompt], [0], **how)
    pixels = sd.vae.decode(latents.to(sd.vae.dtype) / sd.vae.config.scaling_factor)
    return (pixels[0].float() / 2 + 0.5).clamp(0, 1)


def compare_published(path: Path) -> bool:
    """Print our numbers beside the published ones; False if they differ by more than the tolerance."""
    plan = make_plan(path)
    v = plan.schedule.prediction_type == "v_prediction"
    index = {("SD 1.x", False): 0, ("SD 2.x", True): 1, ("LDM", False): 2}.get((plan.family, v))
    if index is None:
        raise InputError(
            f"{path}: no numbers are published for {plan.family}; there are of SD 1.4, 2 (v), LDM"
        )
    case = PUBLISHED[index]
    picture = published_picture(minti.load(path, dtype="float32", schedule="as-published"), case)
    at = slice(case.place, case.place + 3 or None)
    ours, theirs = picture[2, at, at].flatten().tolist(), [float(value) for value in case.values.split()]
    error = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"{case.name}: {case.prompt!r}, {case.steps} steps, guidance {case.guidance_scale}, {case.side} px")
    print("published " + " ".join(f"{value:.5f}" for value in theirs))
    print("minti     " + " ".join(f"{value:.5f}" for value in ours))
    print(f"largest difference {error:.1e}, tolerance of the reference's own tests {case.tolerance:.0e}")
    return error <= case.tolerance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full-size", action="store_true", help="SD 1.5 in its true size too; takes 6 GB")
    text = "instead: your copy of SD 1.4, SD 2 (768, v) or the LDM, against numbers that diffusers publishes"
    parser.add_argument("--published", metavar="PATH", type=Path, help=text)
    args = parser.parse_args()
    if args.published:
        try:
            sys.exit(0 if compare_published(args.published) else 1)
        except InputError as error:
            parser.error(str(error))
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
