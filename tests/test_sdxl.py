"""SDXL: two text encoders, a summary of the prompt, sizes and crops. The oracle is diffusers' pipeline."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import minti
from minti import Concept, InputError, sample, train
from minti.formats.checkpoint import make_plan
from minti.formats.views import make_views
from minti.inversion.batches import Settings, Word, sample_batch
from minti.inversion.inversion import Inversion
from minti.inversion.latents import encode_views
from minti.inversion.start import initial_rows

from . import compare, oracles
from .compare import assert_parity, assert_same_picture, compare_pictures
from .test_keymap import fake_file, manifest, on_meta, shapes

KINDS = ("epsilon", "v_prediction")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sdxl")
    for kind in KINDS:
        oracles.save_sdxl(root / kind, kind)
    return root


def pair(root: Path, kind: str = "epsilon") -> tuple[minti.StableDiffusion, StableDiffusionXLPipeline]:
    """minti's model and diffusers' of the same folder."""
    return minti.load(root / kind, device="cpu", dtype="float32"), oracles.sdxl_pipeline(root, kind)


def assert_same_pictures(pairs: compare.Pairs) -> None:
    """Equal latents at every step, and pictures up to the rounding to 256 levels."""
    assert_parity({"latents": pairs["latents"]}, 2e-4)
    pixels, reference = pairs["pixels"]
    assert reference.std() > 0.05
    assert ((pixels * 255).round() - (reference * 255).round()).abs().max() <= 1


# Sampling ---


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("epsilon", {"guidance_scale": 1.0}),
        ("epsilon", {"guidance_scale": 5.0, "size": (64, 32)}),
        ("v_prediction", {"guidance_scale": 5.0, "negative_prompt": "", "size": (32, 64)}),
        (
            "epsilon",
            {"guidance_scale": 5.0, "negative_prompt": "red toy", "num_images": 2, "size": (32, 32)},
        ),
    ],
    ids=str,
)
def test_pictures(kind: str, how: dict, root: Path) -> None:
    assert_same_pictures(compare_pictures(*pair(root, kind), **{"negative_prompt": None} | how))


def test_conditioning(root: Path) -> None:
    """Prompts of all lengths: what the UNet attends to, where it sees each encoder's own padding; pooled."""
    sd, pipe = pair(root)
    prompts = ["", "a photo of the cat", "red dog " * 50]
    context, (pooled, _) = sd.condition(sd.tokenizer(prompts), torch.zeros(3, 6))
    theirs, _, their_pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    assert_parity({"context": (context, theirs), "pooled": (pooled, their_pooled)})


@pytest.mark.parametrize("layer", [2, 3])
def test_clip_skip(layer: int, root: Path) -> None:
    """diffusers counts the layers that are left out beside the last one. The pooled text stays as it is."""
    sd, (_, pipe) = minti.load(root / "epsilon", device="cpu", clip_skip=layer), pair(root)
    prompts = ["a photo of the cat", ""]
    context, (pooled, _) = sd.condition(sd.tokenizer(prompts), torch.zeros(2, 6))
    how = {"do_classifier_free_guidance": False, "clip_skip": layer - 2 or None}
    theirs, _, their_pooled, _ = pipe.encode_prompt(prompts, **how)
    assert_parity({"context": (context, theirs), "pooled": (pooled, their_pooled)})


def test_long_prompts(root: Path) -> None:
    """diffusers is given what its encoders make of each part, and the pooled text of the first."""
    sd, pipe = pair(root)
    texts = {"": ("the " * 60 + "cat , ", "red dog " * 20), "negative_": ("dog " * 75, "red")}
    how = {
        "num_inference_steps": 2,
        "guidance_scale": 5.0,
        "width": 64,
        "height": 64,
        "output_type": "latent",
    }
    for name, parts in texts.items():
        context, _, pooled, _ = pipe.encode_prompt(list(parts), do_classifier_free_guidance=False)
        how |= {
            f"{name}prompt_embeds": torch.cat(context.split(1), 1),
            f"{name}pooled_prompt_embeds": pooled[:1],
        }
    theirs = pipe(**how, generator=torch.Generator().manual_seed(3)).images
    ours = {"negative_prompt": "".join(texts["negative_"]), "steps": 2, "guidance_scale": 5.0, "size": 64}
    *_, latents = sd.denoise(["".join(texts[""])], [3], long_prompts=True, **ours)
    assert_parity({"latents": (latents, theirs)}, 2e-4)


def test_no_prompt_is_not_the_empty_prompt(root: Path) -> None:
    """No negative prompt means zeros, as the model was trained; an empty one is encoded."""
    sd, _ = pair(root)
    none, empty, red = (
        next(sd.denoise(["the cat"], [0], negative_prompt=text, steps=1, guidance_scale=5.0))
        for text in (None, "", "red")
    )
    assert compare.relative_error(none, empty) > 1e-3
    assert compare.relative_error(empty, red) > 2e-4  # what equal pictures may differ by


def test_zero_terminal_snr(root: Path, tmp_path: Path) -> None:
    """The first step begins where nothing is left of a picture."""
    shutil.copytree(root / "v_prediction", tmp_path / "zero")
    path, more = tmp_path / "zero" / "scheduler" / "scheduler_config.json", {"timestep_spacing": "trailing"}
    more |= {"rescale_betas_zero_snr": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    sd, pipe = minti.load(tmp_path / "zero", device="cpu"), pair(root, "v_prediction")[1]
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **more)
    how = {"guidance_scale": 5.0, "negative_prompt": None, "size": (64, 32)}
    assert_same_pictures(compare_pictures(sd, pipe, **how))
    assert pipe.scheduler.timesteps[0] == 999 and sd.schedule.alphas_cumprod[999] < 1e-7


def test_sizes_are_exact_in_half_precision(root: Path) -> None:
    """bfloat16 would make 1024 of 1023; only their sinusoids are rounded."""
    unet = minti.load(root / "epsilon", device="cpu", dtype="bfloat16").unet
    pooled = torch.zeros(2, 20, dtype=torch.bfloat16)
    sizes = torch.tensor([[1023.0, 1023, 0, 0, 1023, 1023], [1024, 1024, 0, 0, 1024, 1024]])
    with torch.no_grad():
        one, other = unet.embed_time(torch.tensor([500, 500]), (pooled, sizes))
    assert not torch.equal(one, other)


def test_size_condition(root: Path) -> None:
    sd, pipe = pair(root)
    sizes = (200, 300, 10, 50, 120, 140)
    latents = [*sd.denoise(["the cat"], [3], steps=2, guidance_scale=5.0, size=64, size_condition=sizes)][-1]
    how = {"original_size": sizes[:2], "crops_coords_top_left": sizes[2:4], "target_size": sizes[4:]}
    how |= {"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 5.0}
    theirs = pipe("the cat", **how, generator=torch.Generator().manual_seed(3), output_type="latent").images
    assert_parity({"latents": (latents, theirs)}, 2e-4)
    default = [*sd.denoise(["the cat"], [3], steps=2, guidance_scale=5.0, size=64)][-1]
    assert compare.relative_error(default, theirs) > 1e-3


def test_the_autoencoder_of_a_float16_model_is_float32(root: Path, tmp_path: Path) -> None:
    sd = minti.load(root / "epsilon", device="cpu", dtype="float16")
    assert (sd.dtype, sd.vae.dtype) == (torch.float16, torch.float32)
    image = sd.sample("the cat", steps=1, size=64)[0]
    assert np.asarray(image).std() > 5
    assert minti.load(root / "epsilon", device="cpu", dtype="bfloat16").vae.dtype == torch.bfloat16
    path = tmp_path / "fixed"
    path.mkdir()
    for file in (root / "epsilon" / "vae").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"force_upcast": False}))
    assert minti.load(root / "epsilon", device="cpu", dtype="float16", vae=path).vae.dtype == torch.float16


# Files ---


def test_single_file(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sd, _ = pair(root)
    weights = oracles.single_file(sd)
    save_file(weights, tmp_path / "xl.safetensors")
    words = root / "epsilon" / "tokenizer"
    again = minti.load(tmp_path / "xl.safetensors", device="cpu", tokenizer=words)
    for part in ("text_encoder", "unet", "vae"):
        ours, theirs = (getattr(model, part).state_dict() for model in (again, sd))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    how = {"steps": 2, "size": 64, "seed": 3, "guidance_scale": 5.0}
    assert_same_picture(again.sample("the cat", **how)[0], sd.sample("the cat", **how)[0])
    assert again.image_size == (1024, 1024)
    assert again.vae.config.scaling_factor == 0.13025
    assert again.text_encoder.pad_2 == sd.text_encoder.pad_2 == 0

    empty = torch.empty(0)
    save_file(weights | {"v_pred": empty, "ztsnr": empty}, tmp_path / "v.safetensors")
    with caplog.at_level(logging.INFO):
        config = minti.load(tmp_path / "v.safetensors", device="cpu", tokenizer=words).schedule.config
    assert (config.prediction_type, config.rescale_betas_zero_snr) == ("v_prediction", True)
    assert "prediction type: v_prediction, as its key v_pred says" in caplog.text


def test_the_published_file_is_covered_key_by_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tensors = manifest("sdxl-base-compvis.json")
    assert len(tensors) == 2515
    fake_file(monkeypatch, tensors)
    for name in ("xl", "refiner"):
        (tmp_path / f"{name}.safetensors").touch()
    plan = make_plan(tmp_path / "xl.safetensors")
    assert plan.problems() == []
    assert plan.family == "SDXL"
    for name, part in plan.parts.items():
        told = on_meta("sdxl-base", name)
        assert shapes(part.module.state_dict()) == shapes(told.state_dict())
        # The trained size is in no shape; the first encoder's projection is not used.
        free = {"sample_size": 0}
        assert vars(part.module.config) | free == vars(told.config) | free
    for marker in ("edm_mean", "edm_vpred.sigma_max"):
        fake_file(monkeypatch, tensors | {marker: (4,)})
        with pytest.raises(InputError, match=r"Playground v2\.5 and CosXL"):
            make_plan(tmp_path / "xl.safetensors")
    refiner = {
        k.replace("embedders.1", "embedders.0"): s for k, s in tensors.items() if "embedders.0" not in k
    }
    fake_file(monkeypatch, refiner)
    with pytest.raises(InputError, match="is the refiner of SDXL"):
        make_plan(tmp_path / "refiner.safetensors")


def test_folders_that_are_refused_by_name(root: Path, tmp_path: Path) -> None:
    refiner, playground = tmp_path / "refiner", tmp_path / "playground"
    for path in (refiner, playground):
        for file in (root / "epsilon").rglob("*.json"):
            target = path / file.relative_to(root / "epsilon")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    for file in (refiner / "text_encoder").iterdir():
        file.unlink()
    (refiner / "text_encoder").rmdir()
    with pytest.raises(InputError, match="is the refiner of SDXL"):
        minti.load(refiner)
    (playground / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "EDMDPMSolverMultistepScheduler"})
    )
    with pytest.raises(InputError, match=r"Playground v2\.5"):
        minti.load(playground)


# Learning ---


class Photos:
    """Photos of random colours, of different sizes, so that their crops differ."""

    def __init__(self, *sizes: tuple[int, int]) -> None:
        self.sizes, self.path, self.caption = sizes, Path("photo"), None

    def __iter__(self) -> Iterator[Photos]:
        for i, size in enumerate(self.sizes):
            photo = copy.copy(self)
            pixels = np.random.default_rng(i).integers(0, 255, (6, 6, 3), dtype=np.uint8)
            photo.image = Image.fromarray(pixels).resize(size)
            yield photo

    def open(self) -> Image.Image:
        return self.image

    def open_mask(self, size: tuple[int, int]) -> Image.Image:
        return Image.new("L", size, 255)


def test_sizes_of_views() -> None:
    views = [*make_views(Photos((200, 100), (60, 90)), 50, flip=True)]
    # 200x100 is halved, and the middle 50 of 100 columns are cut out; 60x90 becomes 50x75.
    assert [view.sizes for view in views] == [(100, 200, 0, 25, 50, 50)] * 2 + [(90, 60, 12, 0, 50, 50)] * 2
    views = [*make_views(Photos((200, 100)), 50, crop="random", flip=True)]
    for view, mirrored in zip(views[::2], views[1::2], strict=True):
        width = view.sizes[3] + 50 + mirrored.sizes[3]  # of the resized photo
        assert 100 - 1 <= width <= 100 / 0.7 + 1
        assert view.sizes[2] == mirrored.sizes[2]
    for crop in ("squash", "none"):
        (view,) = make_views(Photos((200, 100)), 50, crop=crop, flip=False)
        assert view.sizes == (100, 200, 0, 0, 50, 50)


def a_word(sd: minti.StableDiffusion, n: int = 2) -> Word:
    views = make_views(Photos((200, 100), (60, 90)), 64, flip=False)
    start = initial_rows(sd, "word", "toy", n) + 0.1 * torch.arange(n)[:, None]
    return Word("<toy>", start, encode_views(sd, views), lr=1e-2, seed=1)


def textbook_gradient(
    pipe: StableDiffusionXLPipeline, word: Word, samples
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss, and gradient of the word's rows in both tables side by side, as diffusers' users compute them."""
    tokens = [f"[token{i}]" for i in range(len(word.init))]
    tables = []
    parts = word.init.split([64, 32], dim=1)
    for name, part in zip(("", "_2"), parts, strict=True):
        tokenizer = copy.deepcopy(getattr(pipe, f"tokenizer{name}"))
        encoder = copy.deepcopy(getattr(pipe, f"text_encoder{name}")).requires_grad_(False)
        assert tokenizer.add_tokens(tokens) == len(tokens)
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        tables.append(encoder.get_input_embeddings().weight)
        with torch.no_grad():
            tables[-1][-len(tokens) :] = part
        tables[-1].requires_grad_(True)
        setattr(pipe, f"tokenizer{name}", tokenizer)
        setattr(pipe, f"text_encoder{name}", encoder)
    prompts = [prompt.replace(word.placeholder, " ".join(tokens)) for prompt in samples.prompts]
    context, _, pooled, _ = pipe.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
    latents = word.latents
    x0 = latents.mean[samples.view] + latents.std[samples.view] * samples.posterior_noise
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    added = {"text_embeds": pooled, "time_ids": latents.sizes[samples.view]}
    noisy = scheduler.add_noise(x0, samples.eps, samples.t)
    prediction = pipe.unet(noisy, samples.t, context, added_cond_kwargs=added).sample
    target = samples.eps
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(x0, samples.eps, samples.t)
    loss = F.mse_loss(prediction, target)
    loss.backward()
    return loss.detach(), torch.cat([table.grad[-len(tokens) :] for table in tables], dim=1)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_both_rows(kind: str, root: Path) -> None:
    sd, pipe = pair(root, kind)
    word, settings = a_word(sd), Settings(batch_size=3)
    samples = sample_batch(word, settings, 1000, settings.batch_size, 0)
    loss, expected = textbook_gradient(pipe, word, samples)
    inversion = Inversion(sd, [word], settings)
    ours = inversion.step()
    assert_parity({"loss": (ours[0], loss), "gradient": (inversion.rows[0].grad, expected)}, 1e-5)
    for columns in (slice(0, 64), slice(64, 96)):
        assert expected[:, columns].abs().max() > 0
    assert not torch.equal(inversion.rows[0].detach(), word.init)


def test_diffusers_loads_what_was_learned_and_makes_the_same_picture(root: Path, tmp_path: Path) -> None:
    sd, pipe = pair(root)
    inversion = Inversion(sd, [a_word(sd)], Settings(batch_size=2))
    for _ in range(2):
        inversion.step()
    inversion.concept(0).save(tmp_path / "toy.safetensors")
    state = load_file(tmp_path / "toy.safetensors")
    assert {key: tuple(rows.shape) for key, rows in state.items()} == {"clip_l": (2, 64), "clip_g": (2, 32)}
    for name, key in (("", "clip_l"), ("_2", "clip_g")):
        encoder = copy.deepcopy(getattr(pipe, f"text_encoder{name}"))
        setattr(pipe, f"text_encoder{name}", encoder)
        pipe.load_textual_inversion(
            state[key], token="<toy>", text_encoder=encoder, tokenizer=getattr(pipe, f"tokenizer{name}")
        )
    fresh, _ = pair(root)
    concept = Concept.load(tmp_path / "toy.safetensors")
    assert (concept.placeholder, concept.widths) == ("<toy>", {"clip_l": 64, "clip_g": 32})
    fresh.add_concept(concept)
    prompts = ["a photo of <toy> on the grass", "red <toy>"]
    assert_same_pictures(compare_pictures(fresh, pipe, prompts, negative_prompt=None, size=(64, 64)))


@pytest.mark.parametrize(
    ("width", "kind"), [(64, "64-wide encoder"), (768, r"768-wide encoder \(SD 1\.x\)"), (32, "32-wide")]
)
def test_a_word_of_another_model_is_refused(width: int, kind: str, root: Path) -> None:
    sd, _ = pair(root)
    with pytest.raises(
        InputError, match=rf"was learned on a {kind}.*a 96-wide encoder; use the model it was"
    ):
        sd.add_concept(Concept("<toy>", torch.zeros(1, width)))


# The commands ---


def test_the_commands(root: Path, tmp_path: Path) -> None:
    """A word learned, written as {clip_l, clip_g}, and used with sizes; SD 1 is told none."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, photo in enumerate(Photos((80, 64), (64, 64))):
        photo.open().save(photos / f"{i}.png")
    model = ["--checkpoint", str(root / "epsilon"), "--device", "cpu"]
    learning = ["--images", str(photos), "--placeholder", "<toy>", "--init-word", "toy", "--size", "64"]
    learning += ["--steps", "2", "--batch-size", "1", "--sample-every", "2", "--sample-steps", "1"]
    train.main([*model, *learning, "--eval-size", "1", "--keep", "best", "--out", str(tmp_path / "run")])
    path = tmp_path / "run" / "learned_embeds.safetensors"
    assert {key: tuple(rows.shape) for key, rows in load_file(path).items()} == {
        "clip_l": (1, 64),
        "clip_g": (1, 32),
    }
    assert Concept.load(path).placeholder == "<toy>"
    sampling = [
        "--concept",
        str(path),
        "--prompt",
        "a <toy>",
        "--num-images",
        "1",
        "--steps",
        "1",
        "--size",
        "64",
    ]
    sizes = ["--original-size", "200x300", "--crop-from", "10,20", "--target-size", "100"]
    pictures = []
    for name, extra in (("plain", []), ("sized", sizes), ("empty", ["--negative-prompt", ""])):
        sample.main([*model, *sampling, *extra, "--out", str(tmp_path / name)])
        pictures.append((tmp_path / name / "a-toy-0.png").read_bytes())
    sd = minti.load(root / "epsilon", device="cpu")
    sd.add_concept(Concept.load(path))
    latents = next(
        sd.denoise(["a <toy>"], [0], steps=1, size=64, size_condition=(300, 200, 20, 10, 100, 100))
    )
    with Image.open(tmp_path / "sized" / "a-toy-0.png") as image:
        assert_same_picture(image, sd.decode_latents(latents)[0])
    assert len(set(pictures)) == 3
    folder = oracles.save_folder(tmp_path / "sd1")
    with pytest.raises(InputError, match="are for SDXL only"):
        sample.main(["--checkpoint", str(folder), "--prompt", "a", "--out", str(tmp_path / "x"), *sizes])
