"""weights/tiny, the small Stable Diffusion that is shipped: that it works, and learns words."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

import minti
from minti.data import encode_views, load_photos, make_views
from minti.draws import Settings, Word
from minti.initial import initial_rows
from minti.inversion import Inversion
from minti.scoring import Scorer
from tools.make_tiny.concepts import held_out, pictures
from tools.make_tiny.world import COLORS

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "weights" / "tiny"


@pytest.fixture(scope="module")
def sd() -> minti.StableDiffusion:
    return minti.load(TINY, device="cpu", dtype="float32")


def test_what_is_shipped() -> None:
    """Small enough to be cloned, and the concepts are those that the renderer draws."""
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) < 20e6
    for name, concept in held_out().items():
        photos = load_photos(TINY / "concepts" / name)
        for photo, picture in zip(photos, pictures(concept), strict=True):
            # Another version of the libraries that draw may round differently.
            assert np.abs(np.asarray(photo.image, int) - picture).mean() < 1


def test_the_same_picture_as_diffusers(sd: minti.StableDiffusion) -> None:
    """From the very files; no pixel is off by more than one level."""
    pipeline = StableDiffusionPipeline.from_pretrained(TINY, safety_checker=None, torch_dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    prompt, generator = "a photo of a red cup on the grass", torch.Generator().manual_seed(3)
    (theirs,) = pipeline(prompt, num_inference_steps=20, guidance_scale=5.0, generator=generator).images
    (ours,) = sd.sample(prompt, steps=20, guidance_scale=5.0, seed=3)
    difference = np.abs(np.asarray(ours, int) - np.asarray(theirs, int))
    assert np.asarray(theirs).std() > 20
    assert difference.max() <= 1


def test_pictures_show_what_was_asked_for(sd: minti.StableDiffusion) -> None:
    """Of balls in ten colours the middle is nearest to the right one, nearly always."""
    prompts = [f"a photo of a {color} ball on a gray background" for color in COLORS]
    images = sd.sample(prompts, steps=20, guidance_scale=5.0, batch_size=10)
    names, palette = list(COLORS), np.array(list(COLORS.values()), dtype=float)
    found = []
    for image in images:
        middle = np.median(np.asarray(image, float)[27:38, 27:38].reshape(-1, 3), axis=0)
        found.append(names[int(np.abs(palette - middle).sum(axis=1).argmin())])
    assert sum(a == b for a, b in zip(found, COLORS, strict=True)) >= 8


def test_a_word_is_learned(sd: minti.StableDiffusion) -> None:
    """In 100 steps: the loss on fixed samples falls, and pictures come closer to the photos than those of the
    init word, in the eyes of the CLIP that comes with the model."""
    sd = minti.load(TINY, device="cpu", dtype="float32")
    photos = load_photos(TINY / "concepts" / "mushroom")
    views = make_views(photos, 64, flip=True)
    word = Word("<mushroom>", initial_rows(sd, "word", "toy"), encode_views(sd, views), lr=5e-3)
    inversion = Inversion(sd, [word], Settings(steps=100, eval_size=32))
    before = inversion.evaluate().item()
    for _ in range(100):
        inversion.step()
    assert inversion.evaluate().item() < 0.97 * before

    scorer = Scorer.load(TINY)
    targets = scorer.embed_images([photo.image for photo in photos])
    options = {"steps": 20, "guidance_scale": 5.0, "num_images": 8, "batch_size": 8}
    learned, init = (
        (scorer.embed_images(sd.sample(f"a photo of a {name}", **options)) @ targets.T).mean().item()
        for name in ("<mushroom>", "toy")
    )
    assert learned > init + 0.1


@pytest.mark.slow
def test_the_command_without_arguments(tmp_path: Path) -> None:
    """Everything a reader of the README does first, in a folder of its own."""
    shutil.copytree(TINY, tmp_path / "weights" / "tiny")
    train = [sys.executable, "-m", "minti.train"]
    subprocess.run(train, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=True)
    run = tmp_path / "runs" / "mushroom"
    names = ("config.yaml", "inputs.png", "learned_embeds.safetensors", "log.csv", "report.html", "samples")
    assert all((run / name).exists() for name in names)
    again = subprocess.run(train, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert again.returncode == 2 and "exists already" in again.stderr
