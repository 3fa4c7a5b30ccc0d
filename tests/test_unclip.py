"""Stable unCLIP: prompts that are pictures. The oracle is diffusers' pipeline."""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableUnCLIPImg2ImgPipeline
from PIL import Image
from safetensors.torch import save_file

import minti
from minti import Concept, InputError, sample, train
from minti.formats import configs
from minti.formats.checkpoint import make_plan, trained_size
from minti.judge.picture_jobs import PictureJob, Protocol
from minti.model.config import ScheduleConfig
from minti.model.diffusion import Schedule
from minti.model.unclip import ImagePrompt
from minti.study.concepts import ConceptSpec
from minti.study.recipe import Request
from minti.study.rivals import Rivals
from minti.study.ways import Way

from . import oracles
from .compare import Pairs, assert_parity, assert_same_picture, relative_error
from .test_keymap import fake_file, manifest, shapes

PROMPT = "a photo of the cat"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> StableUnCLIPImg2ImgPipeline:
    return oracles.unclip_pipeline(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def folder(pipe: StableUnCLIPImg2ImgPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unclip") / "model"
    pipe.save_pretrained(folder)
    oracles.write_tokenizer(folder / "tokenizer", pad="!")
    return folder


@pytest.fixture(scope="module")
def sd(folder: Path) -> minti.StableDiffusion:
    return minti.load(folder, device="cpu", dtype="float32")


def photo(seed: int = 0, size: tuple[int, int] = (70, 50)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (7, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)


def compare_latents(
    sd: minti.StableDiffusion,
    pipe: StableUnCLIPImg2ImgPipeline,
    seeds: Sequence[int] = (3,),
    prompt: str = PROMPT,
    noise_level: int = 0,
    guidance_scale: float = 4.0,
    **inputs,
) -> Pairs:
    """Finished latents, of each seed; `inputs` goes to the reference alone."""
    shown = sd.image_prompter.prompt([photo()], noise_level)
    how = {"steps": 3, "guidance_scale": guidance_scale, "image_prompt": shown}
    *_, latents = sd.denoise([prompt] * len(seeds), seeds, **how)
    how = {"num_inference_steps": 3, "guidance_scale": guidance_scale, "noise_level": noise_level}
    how |= {"output_type": "latent", "image": photo()} | inputs
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return {
        "latents": (latents, torch.cat([pipe(prompt=prompt, generator=g, **how).images for g in generators]))
    }


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"noise_level": 1, "guidance_scale": 1.0},
        {"noise_level": 400, "seeds": (3, 8)},
        {"noise_level": 999, "prompt": ""},
    ],
    ids=str,
)
def test_latents(how: dict, sd: minti.StableDiffusion, pipe: StableUnCLIPImg2ImgPipeline) -> None:
    """Also in a batch, where each picture has noise of its own; drawn before the latents, as in diffusers."""
    assert_parity(compare_latents(sd, pipe, **how), 2e-4)


def test_what_the_unet_is_shown_matters(sd: minti.StableDiffusion) -> None:
    """The picture, the noise in it and its absence, which is zeros: far above the tolerance."""

    def latents(shown: ImagePrompt | None) -> torch.Tensor:
        return [*sd.denoise([PROMPT], [3], steps=3, guidance_scale=4, image_prompt=shown)][-1]

    prompter, photos = sd.image_prompter, [photo()]
    one, none = latents(prompter.prompt(photos)), latents(None)
    for prompt in (prompter.prompt([photo(1)]), prompter.prompt(photos, 500), None):
        assert relative_error(latents(prompt), one) > 1e-2
    assert relative_error(latents(lambda generators: torch.zeros(1, 48)), none) < 1e-5


def test_several_pictures(sd: minti.StableDiffusion, pipe: StableUnCLIPImg2ImgPipeline) -> None:
    """The UNet is shown the mean of their embeddings."""
    photos = [photo(), photo(1, (40, 90))]
    pixels = pipe.feature_extractor(images=photos, return_tensors="pt").pixel_values
    theirs = pipe.image_encoder(pixels).image_embeds.mean(0, keepdim=True)
    assert_parity({"embedding": (sd.image_prompter.embed(photos), theirs)})
    shown = sd.image_prompter.prompt(photos, 20)
    *_, ours = sd.denoise([PROMPT], [3], steps=2, guidance_scale=4, image_prompt=shown)
    how = {"num_inference_steps": 2, "guidance_scale": 4.0, "noise_level": 20, "output_type": "latent"}
    theirs = pipe(
        prompt=PROMPT, image_embeds=theirs, generator=torch.Generator().manual_seed(3), **how
    ).images
    assert_parity({"latents": (ours, theirs)}, 2e-4)


def test_a_learned_word_beside_a_picture(folder: Path, pipe: StableUnCLIPImg2ImgPipeline) -> None:
    """A word of SD 2, whose text encoder it is."""
    vectors = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    sd = minti.load(folder, device="cpu")
    sd.add_concept(Concept("<toy>", vectors))
    pipe.load_textual_inversion({"<toy>": vectors[0]})
    assert_parity(compare_latents(sd, pipe, prompt="a <toy> on the grass"), 2e-4)


def test_the_schedule_of_the_noise() -> None:
    theirs = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    ours = Schedule(ScheduleConfig(beta_schedule="squaredcos_cap_v2")).alphas_cumprod
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)


# Files ---


def single_file(sd: minti.StableDiffusion) -> dict[str, torch.Tensor]:
    """With what published files hold besides: the text half of the CLIP, and the schedule of the noise."""
    more = {"embedder.model.transformer.resblocks.0.ln_1.bias": 64, "embedder.model.logit_scale": 1}
    more |= {"embedder.model.token_embedding.weight": 600, "noise_augmentor.betas": 1000}
    return oracles.single_file(sd) | {key: torch.ones(n) for key, n in more.items()}


def test_single_file(
    sd: minti.StableDiffusion, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file(single_file(sd), tmp_path / "unclip.safetensors")
    with caplog.at_level(logging.INFO):
        again = minti.load(tmp_path / "unclip.safetensors", device="cpu", tokenizer=folder / "tokenizer")
    assert "v_prediction, as all unCLIP models do" in caplog.text
    assert "mean 0 and std 1, since the file does not hold those of unCLIP-l" in caplog.text
    parts = [[m.text_encoder, m.unet, m.vae, m.image_prompter.image_encoder] for m in (again, sd)]
    for ours, theirs in zip(*parts, strict=True):
        ours, theirs = ours.state_dict(), theirs.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert again.schedule.config.prediction_type == "v_prediction"
    encoders = [model.image_prompter.image_encoder.config for model in (again, sd)]
    assert encoders[0] == encoders[1]
    normalizer = again.image_prompter.normalizer
    assert (normalizer.mean == 0).all() and (normalizer.std == 1).all() and normalizer.mean.shape == (1, 24)


def vision_keys(layers: int, width: int, projection: int) -> dict[str, tuple[int, ...]]:
    """CLIP's image encoder with patches of 14 pixels, as OpenAI and OpenCLIP name and shape its weights."""
    keys = {"conv1.weight": (width, 3, 14, 14), "class_embedding": (width,), "proj": (width, projection)}
    keys["positional_embedding"] = (1 + 16 * 16, width)
    norms = [
        "ln_pre",
        "ln_post",
        *(f"transformer.resblocks.{i}.{n}" for i in range(layers) for n in ("ln_1", "ln_2")),
    ]
    keys |= {f"{norm}.{kind}": (width,) for norm in norms for kind in ("weight", "bias")}
    for i in range(layers):
        for name, out, into in (
            ("attn.in_proj_", 3 * width, width),
            ("attn.out_proj.", width, width),
            ("mlp.c_fc.", 4 * width, width),
            ("mlp.c_proj.", width, 4 * width),
        ):
            at = f"transformer.resblocks.{i}.{name}"
            keys |= {f"{at}weight": (out, into), f"{at}bias": (out,)}
    return {f"embedder.model.visual.{key}": shape for key, shape in keys.items()}


@pytest.mark.parametrize("kind", ["h", "l"])
def test_full_size(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stable Diffusion 2.1's keys, those of an image encoder, and a perceptron beside that of the time."""
    layers, width, projection = {"h": (32, 1280, 1024), "l": (24, 1024, 768)}[kind]
    told = 2 * projection
    label = {"0.weight": (1280, told), "0.bias": (1280,), "2.weight": (1280, 1280), "2.bias": (1280,)}
    tensors = manifest("sd21-compvis.json") | vision_keys(layers, width, projection)
    tensors |= {f"model.diffusion_model.label_emb.0.{key}": shape for key, shape in label.items()}
    fake_file(monkeypatch, tensors)
    path = tmp_path / "model.safetensors"
    path.touch()
    plan = make_plan(path)
    assert plan.problems() == [] and plan.family == "SD 2.x unCLIP"
    assert plan.schedule.prediction_type == "v_prediction" and not plan.ask_prediction_type
    assert trained_size(plan) == (96, 96)
    assert any("mean 0 and std 1" in note for note in plan.notes) == (kind == "l")
    image, act = plan.parts["image_encoder"].module.config, {"h": "gelu", "l": "quick_gelu"}[kind]
    assert (image.hidden_act, image.num_attention_heads, image.num_hidden_layers) == (act, 16, layers)
    assert (image.patch_size, image.image_size, image.intermediate_size) == (14, 224, 4 * width)
    raw = json.loads(oracles.shared("configs/sd21/unet/config.json").read_text())
    raw |= {"class_embed_type": "projection", "projection_class_embeddings_input_dim": told}
    config, unet = configs.unet_config(raw, "config"), plan.parts["unet"].module
    assert vars(unet.config) | {"sample_size": 0} == vars(config) | {"sample_size": 0}
    named = {"0.weight": "linear_1.weight", "0.bias": "linear_1.bias"}
    named |= {"2.weight": "linear_2.weight", "2.bias": "linear_2.bias"}
    expected = {f"class_embedding.{named[key]}": shape for key, shape in label.items()}
    assert shapes(unet.state_dict()) == manifest("sd21-diffusers.unet.json") | expected


def edited(folder: Path, path: Path, config: str, **changes: object) -> Path:
    """A copy of a checkpoint with another config."""
    shutil.copytree(folder, path)
    file = path / config
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return path


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ("model_index.json", {"_class_name": "StableUnCLIPPipeline"}, r"a StableUnCLIPPipeline"),
        (
            "image_noising_scheduler/scheduler_config.json",
            {"beta_schedule": "linear"},
            "beta_schedule = 'linear'",
        ),
        ("image_normalizer/config.json", {"embedding_dim": 32}, "image_normalizer: is 32 wide, .* are 24"),
        ("image_normalizer/config.json", {"embedding_dim": "24"}, "embedding_dim = '24' is not supported"),
        (
            "unet/config.json",
            {"class_embed_type": "timestep"},
            "class_embed_type = 'timestep' is not supported",
        ),
        (
            "unet/config.json",
            {"projection_class_embeddings_input_dim": 40},
            r"\(40 numbers, .* parts give 48\)",
        ),
    ],
)
def test_folders_that_do_not_fit(
    config: str, changes: dict, message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        minti.load(edited(folder, tmp_path / "model", config, **changes), device="cpu")


def test_incomplete_folders(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(folder, path)
    shutil.rmtree(path / "image_noising_scheduler")
    with pytest.raises(InputError, match=r"image_noising_scheduler.*the folder complete"):
        minti.load(path, device="cpu")
    shutil.rmtree(path / "image_encoder")
    with pytest.raises(InputError, match="no image_encoder folder"):
        minti.load(path, device="cpu")


# The commands ---


def test_the_commands(folder: Path, sd: minti.StableDiffusion, tmp_path: Path) -> None:
    """A word learned without pictures beside the prompt; two pictures without a prompt, and with the word."""
    (tmp_path / "photos").mkdir()
    paths = [tmp_path / "photos" / f"{i}.png" for i in range(2)]
    for i, path in enumerate(paths):
        photo(i).save(path)
    model = ["--checkpoint", str(folder), "--device", "cpu"]
    learning = ["--images", str(tmp_path / "photos"), "--placeholder", "<toy>", "--init-word", "toy"]
    learning += ["--steps", "1", "--batch-size", "2", "--eval-every", "0", "--sample-every", "0"]
    train.main([*model, *learning, "--out", str(tmp_path / "run")])
    learned = ["--concept", str(tmp_path / "run" / "learned_embeds.safetensors"), "--prompt", "a <toy>"]
    how = ["--num-images", "1", "--steps", "2", "--guidance-scale", "30", "--noise-level", "999"]
    how += [argument for path in paths for argument in ("--image-prompt", str(path))]
    for name, extra in (("alone", []), ("with", learned)):
        sample.main([*model, *how, *extra, "--out", str(tmp_path / name)])
    with Image.open(tmp_path / "alone" / "picture-0.png") as image:
        settings = json.loads(image.text["settings"])
        prompt = sd.image_prompter.prompt([photo(0), photo(1)], 999)
        assert_same_picture(image, sd.sample("", steps=2, guidance_scale=30, image_prompt=prompt)[0])
        with Image.open(tmp_path / "with" / "a-toy-0.png") as other:
            assert image.tobytes() != other.tobytes()
    assert settings["image_prompt"] == [str(path) for path in paths] and settings["noise_level"] == 999


def test_a_setup_of_a_study(sd: minti.StableDiffusion, tmp_path: Path) -> None:
    """It shows all photos of the concept beside its prompt."""
    for i in range(2):
        photo(i).save(tmp_path / f"{i}.png")
    concept = ConceptSpec("toy", tmp_path, "toy")
    request = Request(concept, "shown", "shown", "caption", text="toy", way=Way(show_photos=True))
    job, protocol = (
        PictureJob("shown", {}, lambda on_step: []),
        Protocol(2, steps=2, guidance_scale=30, seed=7),
    )
    images = Rivals(sd, None, tmp_path).job(job, request, "a toy", protocol).make(lambda: None)
    prompt = sd.image_prompter.prompt([photo(0), photo(1)])
    expected = sd.sample("a toy", steps=2, guidance_scale=30, seed=7, num_images=2, image_prompt=prompt)
    for ours, theirs in zip(images, expected, strict=True):
        assert_same_picture(ours, theirs)


def test_what_the_commands_refuse(
    folder: Path, sd: minti.StableDiffusion, small_checkpoint: Path, tmp_path: Path
) -> None:
    photo().save(tmp_path / "photo.png")
    how = ["--image-prompt", str(tmp_path / "photo.png"), "--out", str(tmp_path / "out")]
    with pytest.raises(InputError, match=r"--image-prompt: .* is no unCLIP, so it sees no pictures"):
        sample.main(["--checkpoint", str(small_checkpoint), "--device", "cpu", *how])
    with pytest.raises(InputError, match=r"--prompt must be given"):
        sample.main(["--checkpoint", str(folder), "--out", str(tmp_path / "out")])
    with pytest.raises(InputError, match=r"--noise-level: 1000 should be .* at most 999"):
        sample.main(["--checkpoint", str(folder), *how, "--noise-level", "1000"])
    with pytest.raises(InputError, match=r"noise_level = 1000"):
        sd.image_prompter.prompt([photo()], 1000)
    with pytest.raises(InputError, match=r"image_prompt: .* is no unCLIP and sees no pictures"):
        other = minti.load(small_checkpoint, device="cpu")
        other.sample("a toy", steps=1, image_prompt=sd.image_prompter.prompt([photo()]))
    assert not (tmp_path / "out").exists()
