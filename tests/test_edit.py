"""`python -m minti.edit`: equal to the reference, and careful with the photo."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, StableDiffusionInpaintPipeline
from PIL import Image

import minti
from minti import Concept, InputError
from minti.edit.__main__ import main
from minti.edit.blending import paint
from minti.edit.inverting import invert, invert_photo
from minti.edit.region import Region, around, as_tensor, opacity, prepare_mask, whole
from minti.formats.configs import schedule_config
from minti.model.diffusion import Schedule

from . import oracles
from .compare import assert_parity


def noise_photo(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def box_mask(size: tuple[int, int], box: tuple[int, int, int, int], value: int = 255) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(value, box)
    return mask


# Painting inside a mask ---


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    """Family -> minti's model, and the inpainting pipeline of diffusers with the same weights."""

    def get(family: str):
        folder = tmp_path_factory.mktemp("models") / family
        oracles.save_folder(folder, family)
        pipe = StableDiffusionInpaintPipeline(
            **oracles.pipeline(folder.parent, family).components, requires_safety_checker=False
        )
        pipe.set_progress_bar_config(disable=True)
        return minti.load(folder, device="cpu", dtype="float32"), pipe

    return {family: get(family) for family in ("sd1", "inpainting")}


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("family", ["sd1", "inpainting"])
def test_painting_equals_the_reference(models, family: str, strength: float) -> None:
    """Four and nine channels, seed for seed. The tolerance is that of whole pictures elsewhere: 2e-4 of the
    scale of the latents, since guidance multiplies the rounding of the UNet.
    """
    sd, pipe = models[family]
    photo, mask = noise_photo(64, 64), box_mask((64, 64), (16, 8, 48, 40))
    how = {"guidance_scale": 7.5, "negative_prompt": "red grass", "strength": strength}
    for seed in (3, 4):
        seen = []

        def keep(_, i, t, kwargs, seen=seen):
            seen.append(kwargs["latents"])
            return kwargs

        pipe(
            "a photo of the cat",
            image=photo,
            mask_image=mask,
            height=64,
            width=64,
            num_inference_steps=5,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=keep,
            output_type="latent",
            **how,
        )
        region = around(mask, sd.image_size, 8)
        args = region.cut(photo), region.cut_mask(mask), "a photo of the cat", [seed]
        ours = list(paint(sd, *args, steps=5, fixed_noise=True, **how))
        assert len(ours) == len(seen) == 5 * strength
        assert_parity(
            {f"x after step {i}": pair for i, pair in enumerate(zip(ours, seen, strict=True))}, 2e-4
        )


@pytest.mark.parametrize("fixed_noise", [False, True])
@pytest.mark.parametrize("dilate", [0, 2])
def test_outside_is_the_photo_at_the_right_level(models, fixed_noise: bool, dilate: int) -> None:
    """At every step what lies outside is z0 at that level: its noise has unit variance; the last is z0."""
    sd, _ = models["sd1"]
    photo = as_tensor(noise_photo(128, 128))
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., 60:63, 60:63] = 1  # thin: within one cell
    way = list(paint(sd, photo, mask, "the cat", [0, 1], steps=6, fixed_noise=fixed_noise, dilate=dilate))
    z0, path = way[-1], sd.schedule.timesteps(6)
    outside = torch.ones(16, 16, dtype=torch.bool)
    outside[4:11, 4:11] = False
    noises = []
    for x, (t, _) in zip(way[:-1], path[1:], strict=True):
        signal, noise = sd.schedule.signal_and_noise(t)
        noises.append(((x - signal * z0) / noise)[..., outside])
        assert abs(noises[-1].std() - 1) < 0.1
    same = torch.allclose(noises[0], noises[1], atol=1e-3)
    assert same == fixed_noise
    mean = sd.vae.encode(photo).mean * sd.vae.config.scaling_factor
    std = sd.vae.encode(photo).std * sd.vae.config.scaling_factor
    assert ((z0 - mean).abs() < 5 * std)[..., outside].all()
    assert ((z0 - mean).abs() > 5 * std)[..., 7, 7].any()


def test_a_grey_mask_is_painted_late_and_candidates_do_not_depend_on_the_batch(models) -> None:
    sd, _ = models["sd1"]
    photo = as_tensor(noise_photo(64, 64))
    white, grey = torch.ones(1, 1, 64, 64), torch.full((1, 1, 64, 64), 0.3)
    *_, z = paint(sd, photo, white, "the cat", [0, 1], steps=10)
    *_, alone = paint(sd, photo, white, "the cat", [1], steps=10)
    assert_parity({"latents": (z[1:], alone)}, 2e-4)
    *_, little = paint(sd, photo, grey, "the cat", [0], steps=10)
    z0 = sd.vae.encode(photo).mean * sd.vae.config.scaling_factor
    assert 0 < (little - z0).std() < 0.7 * (z[:1] - z0).std()
    with pytest.raises(InputError, match=r"strength 0.05: none of 10 steps"):
        list(paint(sd, photo, white, "the cat", [0], steps=10, strength=0.05))


# Pixels ---


def test_masks() -> None:
    mask = box_mask((40, 30), (10, 10, 20, 20), 200)
    mask.putpixel((39, 0), 5)  # as JPEG leaves it
    used = np.asarray(prepare_mask(mask))
    assert used.sum() == 200 * 100
    grown = np.asarray(prepare_mask(mask, 3))
    assert (grown[7:23, 7:23] == 200).all() and grown.sum() == 200 * 16 * 16
    alpha = np.asarray(opacity(prepare_mask(mask), 4))
    assert alpha[used == 0].max() == 0 and alpha[15, 15] > 240 and 0 < alpha[15, 10] < 128
    assert set(np.unique(opacity(prepare_mask(mask), 0))) == {0, 255}
    with pytest.raises(InputError, match="the mask is empty"):
        prepare_mask(Image.new("L", (40, 30), 7))
    with pytest.raises(InputError, match="thinner"):
        opacity(prepare_mask(box_mask((40, 30), (10, 10, 12, 30))), 20)


@pytest.mark.parametrize("size", [(64, 64), (65, 200), (1000, 37), (30, 20), (640, 480), (2000, 1500)])
@pytest.mark.parametrize("place", [(0, 0), (0.5, 0.5), (0.9, 0.9)])
def test_the_region_around_a_mask(size: tuple[int, int], place: tuple[float, float]) -> None:
    """It holds the mask, is inside the photo, and is seen with the model's number of pixels."""
    left, top = (int(p * side) for p, side in zip(place, size, strict=True))
    mask = box_mask(size, (left, top, left + 3, top + 2))
    region, box = around(mask, (64, 64), 8), mask.getbbox()
    assert 0 <= region.box[0] <= box[0] < box[2] <= region.box[2] <= size[0]
    assert 0 <= region.box[1] <= box[1] < box[3] <= region.box[3] <= size[1]
    assert all(side % 8 == 0 for side in region.size)
    assert 0.7 < region.size[0] * region.size[1] / 64**2 < 1.4
    if min(size) >= 64:
        assert region == Region(region.box, (64, 64))
        assert region.box[2] - region.box[0] == region.box[3] - region.box[1] == 64
    assert region.cut_mask(mask).max() == 1 and region.cut(Image.new("RGB", size)).shape[2] % 8 == 0
    wide = box_mask(size, (0, 0, *size))
    assert around(wide, (64, 64), 8) == whole(size, (64, 64), 8)


# Inversion ---


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("to_one", [False, True])
def test_inversion_equals_the_reference(kind: str, spacing: str, to_one: bool) -> None:
    """Step by step, each from the same x, with a smooth function in place of the UNet."""
    config = oracles.SCHEDULE | {"prediction_type": kind, "timestep_spacing": spacing}
    config["set_alpha_to_one"] = to_one
    schedule = Schedule(schedule_config(config, "test"))
    reference = DDIMInverseScheduler(**config)
    reference.set_timesteps(10)

    def predict(x, t):
        return torch.sin(2 * x + t / 300).roll(1, dims=-1)

    x = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    ours = list(invert(schedule, predict, x, 10))
    for i, t in enumerate(reference.timesteps):
        expected = reference.step(predict(x, t), t, x).prev_sample
        assert_parity({f"x after step {i}": (ours[i], expected)})
        x = ours[i]


def test_the_authors_inversion() -> None:
    """Their formula, in float64; the UNet is asked at the time where x is, and x0 is at the first time."""
    schedule = Schedule(schedule_config(oracles.SCHEDULE, "test"))
    times = [t for t, _ in schedule.timesteps(250)][::-1]
    assert times[:3] == [1, 5, 9]
    x = x0 = torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    asked = []

    def predict(x, t):
        asked.append(t)
        return torch.sin(2 * x + t / 300)

    ours = list(invert(schedule, predict, x0, 250, at_current=True))
    assert asked == times[:-1]
    alphas = schedule.alphas_cumprod.double()
    for t, later in pairwise(times):
        a, b = alphas[t], alphas[later]
        eps = torch.sin(2 * x + t / 300).float()
        x = x + b.sqrt() * (
            ((1 / a).sqrt() - (1 / b).sqrt()) * x + ((1 / b - 1).sqrt() - (1 / a - 1).sqrt()) * eps
        )
    assert len(ours) == 249
    assert_parity({"x_T": (ours[-1], x)}, 1e-5)


def test_there_and_back() -> None:
    """Where the UNet's output depends on t alone, the way back is exact but for rounding."""
    schedule = Schedule(schedule_config(oracles.SCHEDULE, "test"))
    pattern = torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(1))

    def predict(x, t):
        return pattern * (1 + t / 1000)

    x0 = torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    *_, x_T = invert(schedule, predict, x0, 50)
    *_, back = schedule.ddim_sample(predict, x_T, 50)
    # What float32 rounds off on the way to noise grows by 1 / sqrt(alphas_cumprod), about 15.
    assert_parity({"x0": (back, x0)}, 1e-4)
    sample = Schedule(schedule_config(oracles.SCHEDULE | {"prediction_type": "sample"}, "test"))
    with pytest.raises(InputError, match="no DDIM inversion"):
        next(invert(sample, predict, x0, 50))


def test_inversion_of_a_model(models) -> None:
    """The UNet, the prompt and the guidance are those of the reference, whose scheduler takes the steps."""
    sd, pipe = models["sd1"]
    z0 = sd.vae.encode(as_tensor(noise_photo(64, 64))).mean * sd.vae.config.scaling_factor
    ours = list(invert_photo(sd, z0, "a photo of the cat", steps=4, guidance_scale=3.0))
    scheduler = DDIMInverseScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(4)
    context = torch.cat(pipe.encode_prompt("a photo of the cat", "cpu", 1, True)[::-1])
    x = z0
    for i, t in enumerate(scheduler.timesteps):
        without, given = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=context).sample.chunk(2)
        x = scheduler.step(without + 3.0 * (given - without), t, x).prev_sample
        assert_parity({f"x after step {i}": (ours[i], x)}, 2e-4)


# The command ---


@pytest.fixture
def word(tmp_path: Path) -> Path:
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    Concept("<toy>", vectors).save(tmp_path / "word.safetensors")
    return tmp_path / "word.safetensors"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    noise_photo(50, 30).save(tmp_path / "photo.png")
    box_mask((50, 30), (20, 10, 27, 21)).save(tmp_path / "mask.png")
    return tmp_path / "photo.png"


def edit(folder: Path, photo: Path, *argv: str) -> Path:
    out = photo.parent / "out"
    given = ["--checkpoint", str(folder), "--image", str(photo), "--out", str(out), "--device", "cpu"]
    main([*given, "--steps", "2", *argv])
    return out


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_only_what_is_masked_changes(small_checkpoint: Path, photo: Path, word: Path, caplog) -> None:
    mask = photo.with_name("mask.png")
    argv = ["--mask", str(mask), "--prompt", "a <toy> on grass", "--concept", str(word), "--num-images", "3"]
    caplog.set_level("INFO")
    out = edit(small_checkpoint, photo, *argv, "--batch-size", "2", "--clip", str(small_checkpoint))
    names = ["config.yaml", *(f"edit-{i}.png" for i in range(3)), "grid.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    before, inside = pixels(photo), np.asarray(Image.open(mask)) > 0
    for name in names[1:4]:
        after = pixels(out / name)
        assert (after[~inside] == before[~inside]).all() and (after[inside] != before[inside]).mean() > 0.9
        assert Image.open(out / name).text["prompt"] == "a <toy> on grass"
    assert len([line for line in caplog.messages if line.startswith("edit-")]) == 3
    scores = [float(line.split()[1]) for line in caplog.messages if line.startswith("edit-")]
    assert scores == sorted(scores, reverse=True)
    first, second = (out / "edit-1.png").read_bytes(), (out / "edit-2.png").read_bytes()
    (out / "edit-2.png").unlink()  # a candidate that an interruption left out is made again, alone
    edit(small_checkpoint, photo, *argv, "--batch-size", "2", "--clip", str(small_checkpoint))
    assert (out / "edit-1.png").read_bytes() == first and (out / "edit-2.png").read_bytes() == second
    for path in (photo, mask, word):  # another file in its place is not taken for it
        old = path.read_bytes()
        if path == word:
            Concept("<toy>", torch.ones(2, 32)).save(word)
        else:
            Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
        with pytest.raises(InputError, match=r": has changed since this was begun"):
            edit(small_checkpoint, photo, *argv, "--batch-size", "2", "--clip", str(small_checkpoint))
        path.write_bytes(old)
    raw = edit(small_checkpoint, photo, *argv, "--no-paste", "--overwrite")
    left, top, right, bottom = around(Image.open(mask), (16, 16), 2).box
    after = pixels(raw / "edit-0.png")
    assert (after != before)[top:bottom, left:right][~inside[top:bottom, left:right]].mean() > 0.9
    after[top:bottom, left:right] = before[top:bottom, left:right]
    assert (after == before).all()


def test_without_a_mask(small_checkpoint: Path, photo: Path, caplog) -> None:
    caplog.set_level("INFO")
    argv = ["--source-prompt", "a photo of the cat", "--prompt", "a photo of the dog"]
    out = edit(small_checkpoint, photo, *argv, "--guidance-scale", "3")
    names = ["config.yaml", "edit.png", "grid.png", "reconstruction-guided.png", "reconstruction.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    there = [line for line in caplog.messages if line.startswith("there and back")]
    assert ["guidance 1:" in there[0], "guidance 3:" in there[1]] == [True, True]
    assert Image.open(out / "edit.png").size == (20, 12)  # as the model sees 50 x 30
    edit(small_checkpoint, photo, *argv, "--overwrite", "--inversion", "authors", "--inverse-guidance", "5")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mask", "{mask}"], r"--prompt must be given"),
        (["--prompt", "cat"], r"neither is given: --mask paints"),
        (["--prompt", "cat", "--mask", "{mask}", "--source-prompt", "dog"], r"both are given"),
        (["--prompt", "cat", "--source-prompt", "dog", "--strength", "0.5"], r"--strength has no effect"),
        (["--prompt", "cat", "--mask", "{mask}", "--inversion", "authors"], r"--inversion has no effect"),
        (["--prompt", "cat", "--mask", "{black}"], r"black.png: the mask is empty"),
        (["--prompt", "cat", "--mask", "{small}"], r"small.png: has size \(9, 9\), the photo \(50, 30\)"),
        (["--prompt", "cat", "--mask", "{text}"], r"text.png: cannot be read as a picture"),
        (["--prompt", "cat", "--mask", "{none}"], r"none.png: cannot be read"),
        (["--prompt", "cat", "--mask", "{mask}", "--image", "{text}"], r"text.png: cannot be read"),
        (["--prompt", "cat", "--mask", "{mask}", "--blur", "90"], r"mask.png: --blur 90: the mask is thin"),
        (["--prompt", "cat", "--mask", "{mask}", "--strength", "0.1"], r"strength 0.1: none of 2 steps"),
        (["--prompt", "<toy>", "--mask", "{mask}", "--concept", "{text}"], r"text.png"),
    ],
)
def test_bad_input(small_checkpoint: Path, photo: Path, argv: list[str], message: str) -> None:
    files = {name: str(photo.with_name(f"{name}.png")) for name in ("mask", "black", "small", "text", "none")}
    Image.new("L", (50, 30), 0).save(files["black"])
    Image.new("L", (9, 9), 255).save(files["small"])
    Path(files["text"]).write_text("no picture")
    with pytest.raises(InputError, match=message):
        edit(small_checkpoint, photo, *(word.format(**files) for word in argv))
    assert not (photo.parent / "out").exists()
