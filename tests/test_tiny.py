"""weights/tiny, the small Stable Diffusion that is shipped: that it works, and learns words."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

import minti
from minti.cli.yaml_files import RECIPES, read_yaml
from minti.formats.photos import load_photos
from minti.formats.views import make_views
from minti.inversion.batches import Settings, Word
from minti.inversion.inversion import Inversion
from minti.inversion.latents import encode_views
from minti.inversion.start import initial_rows
from minti.judge.scorer import Scorer
from minti.study.classifier import Judge
from minti.study.concepts import read_concepts
from tools.make_tiny.concepts import held_out, pictures
from tools.make_tiny.world import COLORS

from .processes import ENVIRONMENT, ROOT

TINY = ROOT / "weights" / "tiny"


@pytest.fixture(scope="module")
def sd() -> minti.StableDiffusion:
    return minti.load(TINY, device="cpu", dtype="float32")


def test_what_is_shipped() -> None:
    """Small enough to be cloned, and the concepts are those that the renderer draws."""
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) < 25e6
    for name, concept in held_out().items():
        photos = load_photos(TINY / "concepts" / name)
        for photo, picture in zip(photos, pictures(concept), strict=True):
            # Another version of the libraries that draw may round differently.
            assert np.abs(np.asarray(photo.open(), int) - picture).mean() < 1


def test_the_recipe_for_all_concepts_knows_them() -> None:
    entries = read_yaml(RECIPES / "tiny-all.yaml")["concepts"]
    assert {e["name"]: e["init_word"] for e in entries} == {c.name: c.init for c in held_out().values()}
    assert all((ROOT / e["images"]).is_dir() and e["placeholder"] == f"<{e['name']}>" for e in entries)


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
    """In 50 steps: the loss on fixed samples falls, and pictures come closer to the photos than those of the
    init word, in the eyes of the CLIP that comes with the model."""
    sd = minti.load(TINY, device="cpu", dtype="float32")
    photos = load_photos(TINY / "concepts" / "mushroom")
    views = make_views(photos, 64, flip=True)
    word = Word("<mushroom>", initial_rows(sd, "word", "toy"), encode_views(sd, views), lr=1e-2)
    inversion = Inversion(sd, [word], Settings(steps=50, lr_schedule="cosine", eval_size=32))
    before = inversion.evaluate().item()
    for _ in range(50):
        inversion.step()
    assert inversion.evaluate().item() < 0.97 * before

    scorer = Scorer.load(TINY)
    targets = scorer.embed_images([photo.open() for photo in photos])
    options = {"steps": 10, "guidance_scale": 5.0, "num_images": 4}
    learned, init = (
        (scorer.embed_images(sd.sample(f"a photo of a {name}", **options)) @ targets.T).mean().item()
        for name in ("<mushroom>", "toy")
    )
    assert learned > init + 0.1


def test_the_judge_reads_what_the_concepts_show() -> None:
    """Shape, colours and pattern of their photos, nine times of ten; and knows all that is said of them."""
    judge, right = Judge.load(TINY), []
    for name, target in read_concepts(str(TINY / "concepts" / "concepts.yaml")).items():
        judge.check(target.facts, name)
        for reading in judge.read([photo.open() for photo in load_photos(target.images)]):
            right += [reading[fact] == value for fact, value in target.facts.items()]
    assert len(right) > 100 and np.mean(right) >= 0.9


def command(name: str, out: Path, *more: str) -> list[str]:
    """Learn one of the concepts under its own name."""
    argv = ["--checkpoint", TINY, "--images", TINY / "concepts" / name, "--placeholder", f"<{name}>"]
    argv += [
        "--init-word",
        held_out()[name].init,
        "--out",
        out,
        "--device",
        "cpu",
        "--sample-every",
        0,
        *more,
    ]
    return [sys.executable, "-m", "minti.train", *map(str, argv)]


def learn(name: str, out: Path, *more: str) -> minti.Concept:
    subprocess.run(command(name, out, *more), env=ENVIRONMENT, check=True)
    return minti.Concept.load(out / "learned_embeds.safetensors")


@pytest.mark.slow
def test_a_style_and_two_things_at_once(tmp_path: Path) -> None:
    """The style word brings the style, paper and all, to other things; and two words in one prompt show the
    colours of both."""
    sd, judge, scorer = minti.load(TINY, device="cpu", dtype="float32"), Judge.load(TINY), Scorer.load(TINY)
    riso = learn("riso", tmp_path / "riso", "--config", "style", "--num-vectors", "3", "--steps", "600")
    sd.add_concept(riso)
    targets = scorer.embed_images([photo.open() for photo in load_photos(TINY / "concepts" / "riso")])
    options = {"steps": 25, "guidance_scale": 5.0, "num_images": 8, "batch_size": 8}
    styled, init = (
        sd.sample(
            [f"a rendering of a {noun} in the style of {word}" for noun in ("ball", "bunny")], **options
        )
        for word in ("<riso>", "drawing")
    )
    likeness = [(scorer.embed_images(images) @ targets.T).mean() for images in (styled, init)]
    assert likeness[0] > likeness[1] + 0.08
    assert np.mean([reading["background"] == "white" for reading in judge.read(styled)]) > 0.6

    for name in ("mushroom", "teapot"):
        sd.add_concept(learn(name, tmp_path / name, "--steps", "500"))

    def red_and_blue(subject: str) -> list[float]:
        images = sd.sample(f"a photo of {subject} in the snow", **options)
        red, green, blue = np.moveaxis(np.stack([np.asarray(image, float) for image in images]), -1, 0)
        pairs = ((red, blue), (blue, red))
        return [(p > 1.5 * np.maximum(green, other)).mean() for p, other in pairs]

    mushroom, teapot = red_and_blue("a <mushroom>"), red_and_blue("a <teapot>")
    both = red_and_blue("a <mushroom> and a <teapot>")
    assert mushroom[0] > 2 * teapot[0] and teapot[1] > 2 * mushroom[1]
    assert both[0] > 2 * teapot[0] and both[1] > 2 * mushroom[1]


@pytest.mark.slow
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    steps = ("--steps", "40", "--save-every", "5")
    subprocess.run(command("imp", tmp_path / "whole", *steps), env=ENVIRONMENT, check=True)
    process = subprocess.Popen(command("imp", tmp_path / "killed", *steps), env=ENVIRONMENT)
    while not (tmp_path / "killed" / "state.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    resume = [sys.executable, "-m", "minti.train", "--resume", "--out", str(tmp_path / "killed")]
    subprocess.run(resume, env=ENVIRONMENT, check=True)
    files = [tmp_path / name / "learned_embeds.safetensors" for name in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_the_command_without_arguments(tmp_path: Path) -> None:
    """Everything a reader of the README does first, in a folder of its own."""
    shutil.copytree(TINY, tmp_path / "weights" / "tiny")
    train = [sys.executable, "-m", "minti.train"]
    subprocess.run(train, cwd=tmp_path, env=ENVIRONMENT, check=True)
    run = tmp_path / "runs" / "imp"
    names = ("config.yaml", "inputs.png", "learned_embeds.safetensors", "log.csv", "report.html", "samples")
    assert all((run / name).exists() for name in names)
    again = subprocess.run(train, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert again.returncode == 2 and "exists already" in again.stderr


@pytest.mark.slow
def test_a_shipped_study(tmp_path: Path) -> None:
    """From the clone, as its recipe has it: the word looks more like the photos than the init word does."""
    argv = [sys.executable, "-m", "minti.study", "table1", "--quick", "--out", str(tmp_path / "study")]
    subprocess.run(argv, cwd=ROOT, env=ENVIRONMENT, check=True)
    found = json.loads((tmp_path / "study" / "study.json").read_text())
    verdicts = {claim["says"]: claim["verdict"] for claim in found["claims"]}
    assert verdicts["A learned word raises reconstruction."] == "holds"
    assert all(row["truth"]["kept"] is not None for row in found["outcomes"])
    assert found["sets"] == {"rocket": "final"}
