"""What the model gets to see of photos: views, their latents, and the sheet that shows them."""

import itertools
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

import minti
from minti.errors import InputError
from minti.formats import photos as photos_module
from minti.formats import views as module
from minti.formats.photos import Photo, load_photos, open_image
from minti.formats.views import CROPS, View
from minti.inversion.latents import encode_views
from minti.runs import words
from minti.runs.words import view_picture

from .oracles import pipeline, save_folder, shared

Make = Callable[..., Photo]


def picture(width: int = 24, height: int = 16, seed: int = 0) -> Image.Image:
    """Noise, in which every pixel is different."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.fixture
def photo(tmp_path: Path) -> Make:
    """Writes pictures to files without loss, each with its mask."""
    count = itertools.count()

    def make(image: Image.Image, mask: Image.Image | None = None) -> Photo:
        path, mask_path = (tmp_path / f"{next(count)}.png" for _ in range(2))
        image.save(path)
        if mask:
            mask.save(mask_path)
        return Photo(path, mask_path if mask else None)

    return make


def make_views(photos: Sequence[Photo], size: int, **options) -> list[View]:
    return list(module.make_views(photos, size, **options))


# Views
# ----------------------------------------------------------------------------------------------------------


def disc(width: int, height: int, centre: tuple[int, int], radius: int) -> Image.Image:
    """A black disc on white."""
    y, x = np.mgrid[:height, :width]
    inside = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 <= radius**2
    return Image.fromarray(np.where(inside, 0, 255).astype(np.uint8)).convert("RGB")


def extent(view: View) -> tuple[int, int]:
    """Width and height of what is dark, margins aside."""
    dark = (view.pixels.mean(0) < 0) & (view.weight[0] > 0.5)
    return int(dark.any(0).sum()), int(dark.any(1).sum())


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (200, 200), (1000, 250)])
@pytest.mark.parametrize("crop", ["center", "none", "squash"])
def test_round_stays_round(crop: str, shape: tuple[int, int], photo: Make) -> None:
    width, height = shape
    radius = min(shape) // 4
    image = disc(width, height, (width // 2, height // 2), radius)
    view = make_views([photo(image)], 64, crop=crop, flip=False)[0]
    assert view.pixels.shape == (3, 64, 64)
    across, down = extent(view)
    if crop == "squash":
        expected = 2 * radius * 64 / width, 2 * radius * 64 / height
    elif crop == "none":
        expected = (2 * radius * 64 / max(shape),) * 2
    else:
        expected = (2 * radius * 64 / min(shape),) * 2
    assert abs(across - expected[0]) <= 2
    assert abs(down - expected[1]) <= 2


def test_the_centre(photo: Make) -> None:
    """No resampling where the photo has the right height: the very pixels of its middle."""
    image = picture(32, 16)
    (view,) = make_views([photo(image)], 16, crop="center", flip=False)
    expected = array(image)[:, 8:24] / 127.5 - 1
    torch.testing.assert_close(view.pixels, torch.tensor(expected).float().permute(2, 0, 1))
    assert torch.equal(view.weight, torch.ones(1, 16, 16))


def test_the_whole_photo_has_margins_that_do_not_count(photo: Make) -> None:
    image = picture(32, 16)
    (view,) = make_views([photo(image)], 32, crop="none", flip=False)
    inside = torch.zeros(1, 32, 32)
    inside[:, 8:24] = 1
    assert torch.equal(view.weight, inside)
    expected = torch.tensor(array(image) / 127.5 - 1).float().permute(2, 0, 1)
    torch.testing.assert_close(view.pixels[:, 8:24], expected)


@pytest.mark.parametrize(("width", "height"), [(240, 120), (100, 250), (120, 120)])
def test_random_squares(width: int, height: int, photo: Make) -> None:
    """Squares of 0.7 to 1 of the shorter side, from all over the photo, each another one.

    In the picture red is x and green is y, so that a cut says where it was made.
    """
    y, x = np.mgrid[:height, :width]
    ramps = np.stack([x, y, 0 * x], -1).astype(np.uint8)
    photos = [photo(picture()), photo(Image.fromarray(ramps))]
    views = make_views(photos, 64, crop="random", flip=False, seed=3)
    assert [view.photo for view in views] == [0] * 8 + [1] * 8
    lefts, tops, sides = [], [], []
    for view in views[8:]:
        x, y, _ = (view.pixels + 1) * 127.5
        across, down = ((v.max() - v.min()).item() * 64 / 63 for v in (x, y))
        assert abs(across - down) < 4  # not squashed; two roundings, and bicubic ends
        assert 0.7 * min(width, height) - 4 <= across <= min(width, height) + 4
        lefts.append(x.min().item())
        tops.append(y.min().item())
        sides.append(across)
    assert len(set(zip(lefts, tops, sides, strict=True))) == 8
    assert max(lefts) - min(lefts) > 0.4 * (width - min(sides))
    assert max(tops) - min(tops) > 0.4 * (height - min(sides))
    assert max(lefts) + min(sides) > 0.6 * width and max(tops) + min(sides) > 0.6 * height
    again = make_views(photos, 64, crop="random", flip=False, seed=3)
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(views, again, strict=True))
    other = make_views(photos, 64, crop="random", flip=False, seed=4)
    assert not any(torch.equal(a.pixels, b.pixels) for a, b in zip(views, other, strict=True))


def test_mirror_images(photo: Make) -> None:
    mask = Image.new("L", (24, 16))
    mask.paste(255, (0, 0, 12, 16))
    views = make_views([photo(picture(), mask=mask), photo(picture(seed=1))], 16, flip=True)
    assert [view.photo for view in views] == [0, 0, 1, 1]
    for view, mirrored in zip(views[::2], views[1::2], strict=True):
        assert torch.equal(mirrored.pixels, view.pixels.flip(-1))
        assert torch.equal(mirrored.weight, view.weight.flip(-1))
    assert len(make_views([photo(picture())], 16, flip=False)) == 1


def test_masks_are_cut_like_their_photos(photo: Make) -> None:
    """A mask that is the photo itself remains so through any cut."""
    grey = picture(48, 20).convert("L")
    for crop in CROPS:
        for view in make_views([photo(grey.convert("RGB"), mask=grey)], 16, crop=crop, flip=True):
            expected = (view.pixels[:1] + 1) / 2  # 0 also in the margins
            torch.testing.assert_close(view.weight, expected, rtol=0, atol=1e-5)


def test_a_mask_that_leaves_nothing(photo: Make) -> None:
    """Random squares in which nothing counts are left out; if none is left, it is a mistake."""
    mask = Image.new("L", (64, 16))
    message = r"\.png: its mask is black in all that is cut out of it"
    for crop in CROPS:
        with pytest.raises(InputError, match=message):
            make_views([photo(picture(64, 16), mask=mask)], 16, crop=crop, flip=True)
    mask.paste(255, (0, 0, 8, 16))  # at the left edge, outside of the central square
    with pytest.raises(InputError, match=message):
        make_views([photo(picture(64, 16), mask=mask)], 16, flip=False)
    views = make_views([photo(picture(64, 16), mask=mask)], 16, crop="random", flip=False)
    assert 0 < len(views) < 8
    assert all(view.weight.any() for view in views)


@pytest.mark.parametrize("shape", [(2000, 5), (5, 2000)])
def test_a_strip(shape: tuple[int, int], photo: Make) -> None:
    """Shown whole in 64 pixels it would be thinner than one; every other cut is possible."""
    with pytest.raises(InputError, match=rf"\.png: {shape[0]}x{shape[1]} is too narrow to be shown whole"):
        make_views([photo(picture(*shape))], 64, crop="none", flip=False)
    for crop in ("center", "random", "squash"):
        assert all(v.weight.all() for v in make_views([photo(picture(*shape))], 64, crop=crop, flip=False))
    (view,) = make_views([photo(picture(*shape))], 400, crop="none", flip=False)
    assert view.weight.mean() == 1 / 400


def test_one_photo_is_in_memory_at_a_time(photo: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def open_weakly(path: Path) -> Image.Image:
        image = open_image(path)
        opened.append(weakref.ref(image))
        return image

    monkeypatch.setattr(photos_module, "open_image", open_weakly)
    for view in module.make_views([photo(picture(seed=i)) for i in range(4)], 16, flip=True):
        assert len(opened) == view.photo + 1
        assert sum(image() is not None for image in opened) == 1


def test_an_unknown_crop(photo: Make) -> None:
    with pytest.raises(InputError, match="crop 'middle': choose from center, random, none, squash"):
        make_views([photo(picture())], 16, crop="middle", flip=False)


# Latents, and what people get to see
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("data") / "small", "small")


def test_latents(folder: Path, photo: Make, tmp_path: Path) -> None:
    """The reference's moments times the scaling factor; 1e-5 for sums in another order."""
    sd = minti.load(folder, device="cpu")
    reference: AutoencoderKL = pipeline(tmp_path, "small").vae
    mask = Image.new("L", (24, 16))
    mask.paste(255, (0, 0, 5, 16))
    views = make_views([photo(picture(), mask=mask), photo(picture(seed=1))], 16, flip=True)
    views[0].weight[0, 0, :2] = torch.tensor([1.0, 0.5])
    latents = encode_views(sd, views)
    moments = reference.encode(torch.stack([view.pixels for view in views])).latent_dist
    scale = reference.config.scaling_factor
    assert scale == sd.vae.config.scaling_factor == 0.18215
    torch.testing.assert_close(latents.mean, moments.mean * scale, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(latents.std, moments.std * scale, rtol=1e-5, atol=1e-5)
    assert latents.photo.tolist() == [0, 0, 1, 1]
    assert latents.weight.shape == (4, 1, 8, 8)
    weight = torch.stack([view.weight for view in views])
    blocks = weight.view(4, 1, 8, 2, 8, 2).mean(dim=(3, 5))  # each latent covers 2 x 2 pixels
    torch.testing.assert_close(latents.weight, blocks)
    assert 0 < latents.weight.mean() < 1


def test_latents_of_a_model_in_half_precision_are_float32(folder: Path, photo: Make) -> None:
    sd = minti.load(folder, device="cpu", dtype="bfloat16")
    latents = encode_views(sd, make_views([photo(picture())], 16, flip=False))
    assert latents.mean.dtype == latents.std.dtype == latents.weight.dtype == torch.float32
    whole = encode_views(minti.load(folder, device="cpu"), make_views([photo(picture())], 16, flip=False))
    torch.testing.assert_close(latents.mean, whole.mean, rtol=0, atol=0.05)  # 8 bits of mantissa


@pytest.mark.parametrize("side", [16, 7])
def test_pictures_of_views(side: int, photo: Make) -> None:
    """What does not count is grey; shrunk where the sheet would be too large."""
    mask = Image.new("L", (16, 16), 255)
    mask.paste(0, (0, 0, 16, 4))
    views = make_views([photo(picture(16, 16)), photo(picture(16, 16, seed=1), mask=mask)], 16, flip=True)
    first, masked = array(picture(16, 16)), array(picture(16, 16, seed=1))
    masked[:4] = 128
    for view, expected in zip(views, (first, first[:, ::-1], masked, masked[:, ::-1]), strict=True):
        shrunk = Image.fromarray(expected.astype(np.uint8)).resize((side, side))
        assert np.abs(array(view_picture(view, side)) - array(shrunk)).max() <= 1


def test_the_sheet_of_many_photos_stays_small(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(5):
        picture(seed=i).save(tmp_path / f"{i}.png")
    monkeypatch.setattr(words, "SHEET_PIXELS", 10 * 7**2)
    spec = {"images": tmp_path, "init_word": "toy", "init": "random", "num_vectors": 1, "seed": 0, "name": ""}
    spec |= {"templates": "object", "learning_name": "<toy>", "placeholder": "<toy>", "lr": 0.1}
    sd = minti.load(folder, device="cpu")
    run, sheet = words.load_word(sd, spec, tmp_path, size=16, crop="center", flip=True)
    assert len(run.word.latents.photo) == 10
    assert sheet.size == (8 * 7, 2 * 7)


@pytest.mark.parametrize("concept", ["cat", "duck_toy", "teapot"])
def test_real_photos(concept: str) -> None:
    photos = load_photos(shared(f"photos/{concept}"))
    assert 3 <= len(photos) <= 5
    views = make_views(photos, 128, flip=True)
    assert len(views) == 2 * len(photos)
    for view in views:
        assert view.pixels.shape == (3, 128, 128)
        assert view.pixels.abs().max() <= 1
        assert view.pixels.std() > 0.1  # something is to be seen
