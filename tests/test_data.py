"""Photos as people have them, and what the model gets to see of them."""

from __future__ import annotations

import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw

import minti
from minti.errors import InputError
from minti.formats.photos import Photo, load_photos, open_image
from minti.inversion.views import CROPS, View, encode_views, make_views
from minti.runs.words import contact_sheet

from .oracles import pipeline, save_folder, shared


def picture(width: int = 24, height: int = 16, seed: int = 0) -> Image.Image:
    """Noise, in which every pixel is different."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def photo(image: Image.Image, **changes) -> Photo:
    return Photo(Path("a.png"), image, **changes)


def quadrants() -> Image.Image:
    """Red, green above blue, white: any turn or mirror image of it is another picture."""
    image = Image.new("RGB", (40, 24))
    draw = ImageDraw.Draw(image)
    for x, y, colour in ((0, 0, "red"), (20, 0, "lime"), (0, 12, "blue"), (20, 12, "white")):
        draw.rectangle((x, y, x + 19, y + 11), fill=colour)
    return image


# Reading
# ----------------------------------------------------------------------------------------------------------

# How a camera's sensor, turned or mirrored, would have stored the upright picture (EXIF 2.3, tag 0x0112).
STORED = {
    1: [],
    2: [Image.Transpose.FLIP_LEFT_RIGHT],
    3: [Image.Transpose.ROTATE_180],
    4: [Image.Transpose.FLIP_TOP_BOTTOM],
    5: [Image.Transpose.TRANSPOSE],
    6: [Image.Transpose.ROTATE_90],
    7: [Image.Transpose.TRANSVERSE],
    8: [Image.Transpose.ROTATE_270],
}


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(orientation: int, suffix: str, tmp_path: Path) -> None:
    image = quadrants()
    for transposition in STORED[orientation]:
        image = image.transpose(transposition)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    image.save(path, exif=exif, quality=100, subsampling=0)
    upright = open_image(path)
    assert upright.size == (40, 24)
    for x, y in ((8, 5), (31, 5), (8, 18), (31, 18)):  # well inside, away from what JPEG blurs
        assert np.abs(array(upright)[y, x] - array(quadrants())[y, x]).max() <= 8


def test_transparency_becomes_white(tmp_path: Path) -> None:
    """alpha * colour + (1 - alpha) * white, up to rounding, in each of the ways to be transparent."""
    rgb = picture()
    alpha = np.linspace(0, 255, 24 * 16).reshape(16, 24).astype(np.uint8)
    rgba = rgb.copy()
    rgba.putalpha(Image.fromarray(alpha))
    rgba.save(tmp_path / "rgba.png")
    share = alpha[..., None] / 255
    expected = share * array(rgb) + (1 - share) * 255
    result = open_image(tmp_path / "rgba.png")
    assert result.mode == "RGB"
    assert np.abs(array(result) - expected).max() <= 1

    la = Image.merge("LA", (rgb.getchannel("R"), Image.fromarray(alpha)))
    la.save(tmp_path / "la.png")
    grey = share[..., 0] * array(rgb)[..., 0] + (1 - share[..., 0]) * 255
    assert np.abs(array(open_image(tmp_path / "la.png")) - grey[..., None]).max() <= 1

    rgb.save(tmp_path / "key.png", transparency=rgb.getpixel((3, 2)))
    expected = array(rgb)
    expected[2, 3] = 255
    assert np.array_equal(array(open_image(tmp_path / "key.png")), expected)


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_transparent_palette(suffix: str, tmp_path: Path) -> None:
    image = Image.new("P", (4, 4))
    image.putpalette([255, 0, 0, 0, 0, 255, 0, 255, 0])
    pixels = np.zeros((4, 4), np.uint8)
    pixels[0, 1], pixels[2, 3] = 1, 2
    image.putdata(pixels.flatten().tolist())
    image.save(tmp_path / f"a.{suffix}", transparency=0)
    expected = np.full((4, 4, 3), 255)
    expected[0, 1], expected[2, 3] = (0, 0, 255), (0, 255, 0)
    assert np.array_equal(array(open_image(tmp_path / f"a.{suffix}")), expected)


def test_greyscale_and_one_bit(tmp_path: Path) -> None:
    grey = picture().convert("L")
    grey.save(tmp_path / "l.png")
    assert np.array_equal(array(open_image(tmp_path / "l.png")), np.repeat(array(grey)[..., None], 3, 2))
    bits = grey.convert("1")
    bits.save(tmp_path / "1.png")
    assert np.array_equal(
        array(open_image(tmp_path / "1.png")), np.repeat(array(bits)[..., None] * 255, 3, 2)
    )


def test_sixteen_bit_greyscale(tmp_path: Path) -> None:
    """0 to 65535 becomes 0 to 255 everywhere, rather than all above 255 white."""
    values = np.linspace(0, 65535, 24 * 16).reshape(16, 24).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "16.png")
    with Image.open(tmp_path / "16.png") as image:
        assert image.mode == "I;16"
    result = array(open_image(tmp_path / "16.png"))
    assert np.abs(result - values[..., None] / 257).max() <= 1
    assert result.min() == 0
    assert result.max() == 255


def test_sixteen_bit_colour(tmp_path: Path) -> None:
    """A PNG written by hand, since Pillow does not write these."""
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "48.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    assert np.abs(array(open_image(tmp_path / "48.png")) - values.astype(int) / 257).max() <= 1


def test_cmyk(tmp_path: Path) -> None:
    image = quadrants().convert("CMYK")
    image.save(tmp_path / "print.jpg", quality=100, subsampling=0)
    with Image.open(tmp_path / "print.jpg") as stored:
        assert stored.mode == "CMYK"
    result = open_image(tmp_path / "print.jpg")
    assert result.mode == "RGB"
    for x, y in ((8, 5), (31, 5), (8, 18), (31, 18)):
        assert np.abs(array(result)[y, x] - array(quadrants())[y, x]).max() <= 8


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_the_first_picture_of_an_animation(suffix: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(array(open_image(tmp_path / f"a.{suffix}")), array(frames[0]))


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "tiff", "ppm"])
def test_formats_without_loss(suffix: str, tmp_path: Path) -> None:
    options = {"lossless": True} if suffix == "webp" else {}
    picture().save(tmp_path / f"a.{suffix}", **options)
    assert np.array_equal(array(open_image(tmp_path / f"a.{suffix}")), array(picture()))


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff"])
def test_truncated(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"half.{suffix}"
    picture(200, 200).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    for read in (open_image, lambda path: load_photos(path.parent)):
        with pytest.raises(InputError, match=r"cannot be read as a picture .*; remove or repair it") as error:
            read(path)
        assert str(path) in str(error.value)


def test_a_damaged_header(tmp_path: Path) -> None:
    """Pillow raises a ValueError here. The same in a file that is no picture by its name: a stray one."""
    path = tmp_path / "a.png"
    picture().save(path)
    header = b"IHDR" + struct.pack(">I", 24)  # instead of 13 bytes
    chunk = struct.pack(">I", 4) + header + struct.pack(">I", zlib.crc32(header))
    path.write_bytes(path.read_bytes()[:8] + chunk + path.read_bytes()[33:])
    for read in (open_image, lambda path: load_photos(path.parent)):
        with pytest.raises(InputError, match=r"a\.png: cannot be read as a picture .*; remove or repair it"):
            read(path)


def test_a_text_that_begins_like_a_picture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture().save(tmp_path / "a.png")
    (tmp_path / "notes.md").write_text("P1 first photo")
    with caplog.at_level(logging.INFO):
        assert len(load_photos(tmp_path)) == 1
    assert [r.getMessage() for r in caplog.records] == [f"{tmp_path / 'notes.md'}: not a picture, skipped"]


def test_a_picture_that_would_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture().save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(InputError, match=r"bomb\.png: cannot be read as a picture"):
        load_photos(tmp_path)


# Folders
# ----------------------------------------------------------------------------------------------------------


def test_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Photos by name; stray files are passed over, each with a notice; what belongs to photos, without."""
    for i, name in enumerate(("b.png", "a.PNG", "c d.é.webp")):
        picture(seed=i).save(tmp_path / name, lossless=True)
    (tmp_path / "b.txt").write_text(" {} on a table\n", encoding="utf-8-sig")  # as Windows' editor does
    Image.new("L", (24, 16), 200).save(tmp_path / "c d.é.mask.png")
    (tmp_path / "notes.md").write_text("bought in 1998")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "b.png.txt").write_text("{} on a chair")
    (tmp_path / "a.PNG.mask.png").write_bytes((tmp_path / "c d.é.mask.png").read_bytes())
    (tmp_path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (tmp_path / "sub").mkdir()
    picture().save(tmp_path / "sub" / "z.png")
    with caplog.at_level(logging.INFO):
        photos = load_photos(str(tmp_path))
    assert [p.path.name for p in photos] == ["a.PNG", "b.png", "c d.é.webp"]
    assert [p.caption for p in photos] == [None, "{} on a table", None]
    for p, seed in zip(photos, (1, 0, 2), strict=True):
        assert np.array_equal(array(p.image), array(picture(seed=seed)))
    assert [p.mask is not None for p in photos] == [False, False, True]
    assert photos[2].mask.mode == "L"
    assert photos[2].mask.size == (24, 16)
    assert photos[2].mask.getextrema() == (200, 200)
    notices = [record.getMessage() for record in caplog.records]
    skipped = [f"{tmp_path / name}: not a picture, skipped" for name in ("empty.jpg", "notes.md")]
    assert notices[:2] == skipped
    for notice, name in zip(notices[2:], ("a.PNG.mask.png", "b.png.txt"), strict=True):
        assert notice.startswith(f"{tmp_path / name}: no photo has this name, skipped")


@pytest.mark.parametrize("kind", ["empty", "stray", "missing", "file"])
def test_no_photos(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    if kind == "file":
        folder.write_text("")
    elif kind != "missing":
        folder.mkdir()
    if kind == "stray":
        (folder / "readme.md").write_text("nothing here")
    message = "no pictures in it" if kind in ("empty", "stray") else "is not a folder"
    with pytest.raises(InputError, match=message) as error:
        load_photos(folder)
    assert str(folder) in str(error.value)


def test_a_mask_of_another_size(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    Image.new("L", (16, 24)).save(tmp_path / "a.mask.png")
    with pytest.raises(InputError, match=r"a\.mask\.png: has size \(16, 24\), the photo \(24, 16\)"):
        load_photos(tmp_path)


def test_a_mask_of_a_turned_photo(tmp_path: Path) -> None:
    """A mask is as large as the photo is upright, which is how everybody sees the photo."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(24, 16).save(tmp_path / "a.jpg", exif=exif)
    Image.new("L", (16, 24)).save(tmp_path / "a.mask.png")
    (turned,) = load_photos(tmp_path)
    assert turned.image.size == turned.mask.size == (16, 24)


@pytest.mark.parametrize("caption", ["a toy on a table", "{} and {}", "  "])
def test_a_caption_without_place_for_the_word(caption: str, tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(caption)
    with pytest.raises(InputError, match=r"a\.txt: should be text with exactly one {}"):
        load_photos(tmp_path)


def test_a_caption_that_is_not_utf8(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("{} im Grünen".encode("latin-1"))
    with pytest.raises(InputError, match=r"a\.txt"):
        load_photos(tmp_path)


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
def test_round_stays_round(crop: str, shape: tuple[int, int]) -> None:
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


def test_the_centre(tmp_path: Path) -> None:
    """No resampling where the photo has the right height: the very pixels of its middle."""
    image = picture(32, 16)
    (view,) = make_views([photo(image)], 16, crop="center", flip=False)
    expected = array(image)[:, 8:24] / 127.5 - 1
    torch.testing.assert_close(view.pixels, torch.tensor(expected).float().permute(2, 0, 1))
    assert torch.equal(view.weight, torch.ones(1, 16, 16))


def test_the_whole_photo_has_margins_that_do_not_count() -> None:
    image = picture(32, 16)
    (view,) = make_views([photo(image)], 32, crop="none", flip=False)
    inside = torch.zeros(1, 32, 32)
    inside[:, 8:24] = 1
    assert torch.equal(view.weight, inside)
    expected = torch.tensor(array(image) / 127.5 - 1).float().permute(2, 0, 1)
    torch.testing.assert_close(view.pixels[:, 8:24], expected)


@pytest.mark.parametrize(("width", "height"), [(240, 120), (100, 250), (120, 120)])
def test_random_squares(width: int, height: int) -> None:
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


def test_mirror_images() -> None:
    mask = Image.new("L", (24, 16))
    mask.paste(255, (0, 0, 12, 16))
    views = make_views([photo(picture(), mask=mask), photo(picture(seed=1))], 16, flip=True)
    assert [view.photo for view in views] == [0, 0, 1, 1]
    for view, mirrored in zip(views[::2], views[1::2], strict=True):
        assert torch.equal(mirrored.pixels, view.pixels.flip(-1))
        assert torch.equal(mirrored.weight, view.weight.flip(-1))
    assert len(make_views([photo(picture())], 16, flip=False)) == 1


def test_masks_are_cut_like_their_photos() -> None:
    """A mask that is the photo itself remains so through any cut."""
    grey = picture(48, 20).convert("L")
    for crop in CROPS:
        for view in make_views([photo(grey.convert("RGB"), mask=grey)], 16, crop=crop, flip=True):
            expected = (view.pixels[:1] + 1) / 2  # 0 also in the margins
            torch.testing.assert_close(view.weight, expected, rtol=0, atol=1e-5)


def test_what_is_erased_in_a_mask_does_not_count(tmp_path: Path) -> None:
    image = picture()
    image.save(tmp_path / "a.png")
    alpha = np.zeros((16, 24), np.uint8)
    alpha[4:8, 6:9] = 255
    Image.merge("LA", (Image.new("L", (24, 16), 255), Image.fromarray(alpha))).save(tmp_path / "a.mask.png")
    (found,) = load_photos(tmp_path)
    assert np.array_equal(array(found.mask), alpha)


def test_a_mask_that_leaves_nothing() -> None:
    """Random squares in which nothing counts are left out; if none is left, it is a mistake."""
    mask = Image.new("L", (64, 16))
    message = r"a\.png: its mask is black in all that is cut out of it"
    for crop in CROPS:
        with pytest.raises(InputError, match=message):
            make_views([photo(picture(64, 16), mask=mask)], 16, crop=crop, flip=True)
    mask.paste(255, (0, 0, 8, 16))  # at the left edge, outside of the central square
    with pytest.raises(InputError, match=message):
        make_views([photo(picture(64, 16), mask=mask)], 16, flip=False)
    views = make_views([photo(picture(64, 16), mask=mask)], 16, crop="random", flip=False)
    assert 0 < len(views) < 8
    assert all(view.weight.any() for view in views)


def test_an_unknown_crop() -> None:
    with pytest.raises(InputError, match="crop 'middle': choose from center, random, none, squash"):
        make_views([photo(picture())], 16, crop="middle", flip=False)


# Latents, and what people get to see
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("data") / "small", "small")


def test_latents(folder: Path, tmp_path: Path) -> None:
    """The reference's moments times the scaling factor; 1e-5 for sums in another order."""
    sd = minti.load(folder, device="cpu")
    reference: AutoencoderKL = pipeline(tmp_path, "small").vae
    mask = Image.new("L", (16, 16))
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


def test_latents_of_a_model_in_half_precision_are_float32(folder: Path) -> None:
    sd = minti.load(folder, device="cpu", dtype="bfloat16")
    latents = encode_views(sd, make_views([photo(picture())], 16, flip=False))
    assert latents.mean.dtype == latents.std.dtype == latents.weight.dtype == torch.float32
    whole = encode_views(minti.load(folder, device="cpu"), make_views([photo(picture())], 16, flip=False))
    torch.testing.assert_close(latents.mean, whole.mean, rtol=0, atol=0.05)  # 8 bits of mantissa


def test_the_contact_sheet_shows_the_pictures() -> None:
    mask = Image.new("L", (16, 16), 255)
    mask.paste(0, (0, 0, 16, 4))
    views = make_views([photo(picture(16, 16)), photo(picture(16, 16, seed=1), mask=mask)], 16, flip=True)
    sheet = contact_sheet(views, columns=3)
    assert sheet.size == (48, 32)
    pixels = array(sheet)
    first, masked = array(picture(16, 16)), array(picture(16, 16, seed=1))
    masked[:4] = 128
    for i, expected in enumerate((first, first[:, ::-1], masked, masked[:, ::-1])):
        y, x = 16 * (i // 3), 16 * (i % 3)
        assert np.abs(pixels[y : y + 16, x : x + 16] - expected).max() <= 1


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
