"""Photos as people have them."""

import io
import logging
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageCms, ImageDraw
from PIL.PngImagePlugin import PngInfo

from minti.errors import InputError
from minti.formats import photos as module
from minti.formats.photos import load_photos, open_image


def picture(width: int = 24, height: int = 16, seed: int = 0) -> Image.Image:
    """Noise, in which every pixel is different."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def quadrants() -> Image.Image:
    """Red, green above blue, white: any turn or mirror image of it is another picture."""
    image = Image.new("RGB", (40, 24))
    draw = ImageDraw.Draw(image)
    for x, y, colour in ((0, 0, "red"), (20, 0, "lime"), (0, 12, "blue"), (20, 12, "white")):
        draw.rectangle((x, y, x + 19, y + 11), fill=colour)
    return image


def read_folder(path: Path) -> Image.Image:
    """What the first photo of a path's folder shows."""
    return load_photos(path.parent)[0].open()


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


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "webp"])
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
        assert image.mode in ("I;16", "I")  # the latter before Pillow 11
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
    for read in (open_image, read_folder):
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
    for read in (open_image, read_folder):
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
    monkeypatch.setattr(module, "MAX_PIXELS", 24 * 16 - 2)
    with pytest.raises(InputError, match=r"bomb\.png: cannot be read as a picture .*; make it smaller"):
        open_image(tmp_path / "bomb.png")
    monkeypatch.setattr(module, "MAX_PIXELS", 24 * 16)
    open_image(tmp_path / "bomb.png")


@pytest.mark.filterwarnings("error")
def test_pillows_limits_are_widened_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For photos of more than 179 megapixels, and PNG files with long texts or profiles."""
    info = PngInfo()
    info.add_text("workflow", "x" * 2**22, zip=True)
    picture().save(tmp_path / "text.png", pnginfo=info)
    picture().save(tmp_path / "icc.png", icc_profile=b"\0" * 2**22)
    picture().save(tmp_path / "large.jpg")
    for name in ("text.png", "icc.png"):
        with pytest.raises(ValueError, match=r"(?i)decompressed data too large"):
            Image.open(tmp_path / name).load()
        assert np.array_equal(array(open_image(tmp_path / name)), array(picture()))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 16 // 2 - 1)
    for _ in range(2):
        with pytest.raises(Image.DecompressionBombError):
            Image.open(tmp_path / "large.jpg")
        assert open_image(tmp_path / "large.jpg").size == (24, 16)
    assert module.MAX_PIXELS >= 16320 * 12240  # the largest of phones


# Values of more than 8 bits
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "white"),
    [
        *(("float32", white) for white in (1, 255, 65535)),
        *(("int32", white) for white in (255, 4095, 65535)),
        *(("uint16", white) for white in (255, 4095, 65535)),
        (">u2", 65535),
    ],
)
def test_values_of_more_than_8_bits(dtype: str, white: int, tmp_path: Path) -> None:
    """Within a rounding of what they are in units of white."""
    shares = np.linspace(0, 1, 24 * 16).reshape(16, 24)
    values = (shares * white).astype(dtype)
    image = Image.fromarray(values.astype("uint16" if dtype == ">u2" else dtype))
    image.save(tmp_path / "a.tif", **({"big_endian": True} if dtype == ">u2" else {}))
    result = array(open_image(tmp_path / "a.tif"))
    assert np.abs(result - values[..., None].astype(float) / white * 255).max() <= 0.5
    with Image.open(tmp_path / "a.tif") as stored:
        assert stored.mode[0] in "IF"


@pytest.mark.parametrize(
    "values",
    [[0, np.nan], [0, np.inf], [0.0, 3.7], [-1.0, 1.0], [0, 1e6], [0, 0.01]]
    + [np.array(v, "int32") for v in ([0, 15], [-3, 255], [0, 70000], [-(2**31), 2**31 - 1])],
    ids=str,
)
def test_values_in_no_usual_range(values: list | np.ndarray, tmp_path: Path) -> None:
    values = values if isinstance(values, np.ndarray) else np.array(values, "float32")
    Image.fromarray(values[None]).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"a\.tif: its values, .* go up to none of \d.*; save 8 bits"):
        open_image(tmp_path / "a.tif")


def test_black_and_a_little_outside_the_range(tmp_path: Path) -> None:
    for values, expected in (([0.0, 0.0], [0, 0]), ([-0.05, 1.05], [0, 255])):
        Image.fromarray(np.array([values], "float32")).save(tmp_path / "a.tif")
        assert array(open_image(tmp_path / "a.tif"))[0, :, 0].tolist() == expected


# Colour profiles
# ----------------------------------------------------------------------------------------------------------


def fixed(*values: float) -> bytes:
    """Fractions of 65536, as ICC profiles have them."""
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def icc(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile (version 2, ICC.1:2001) of a screen."""
    tags |= {b"desc": b"desc" + bytes(4) + struct.pack(">I", 9) + b"a screen\0" + bytes(78)}
    tags |= {b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249)}
    table, data = struct.pack(">I", len(tags)), b""
    for tag, content in tags.items():
        table += tag + struct.pack(">II", 132 + 12 * len(tags) + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    header = bytes(8) + struct.pack(">I", 0x02400000) + b"mntr" + space + b"XYZ " + bytes(12) + b"acsp"
    whole = (header.ljust(68, b"\0") + fixed(0.9642, 1, 0.8249)).ljust(128, b"\0") + table + data
    return struct.pack(">I", len(whole)) + whole[4:]


CURVE = b"curv" + bytes(4) + struct.pack(">IH", 1, 563) + bytes(2)  # the power 563 / 256


def profile(*primaries: tuple[float, float]) -> bytes:
    """The profile of a screen with these primaries and sRGB's white, adapted to D50 by Bradford's method."""
    xyz = np.array([(x / y, 1, (1 - x - y) / y) for x, y in primaries]).T
    white = np.array([0.95047, 1, 1.08883])
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    gain = (bradford @ [0.9642, 1, 0.8249]) / (bradford @ white)
    matrix = np.linalg.inv(bradford) @ np.diag(gain) @ bradford @ (xyz * np.linalg.solve(xyz, white))
    tags = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), CURVE)
    for i, tag in enumerate((b"rXYZ", b"gXYZ", b"bXYZ")):
        tags[tag] = b"XYZ " + bytes(4) + fixed(*matrix[:, i])
    return icc(b"RGB ", tags)


WIDE = profile((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))  # the primaries of Display P3


def wide(colour: tuple[int, int, int]) -> np.ndarray:
    """A colour of WIDE in sRGB, by the definitions of both (IEC 61966-2-1)."""

    def matrix(*primaries: tuple[float, float]) -> np.ndarray:
        xyz = np.array([(x / y, 1, (1 - x - y) / y) for x, y in primaries]).T
        return xyz * np.linalg.solve(xyz, [0.95047, 1, 1.08883])

    linear = matrix((0.68, 0.32), (0.265, 0.69), (0.15, 0.06)) @ (np.array(colour) / 255) ** (563 / 256)
    linear = np.linalg.solve(matrix((0.64, 0.33), (0.3, 0.6), (0.15, 0.06)), linear).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


COLOURS = [(234, 51, 35), (117, 251, 76), (10, 20, 200), (128, 128, 128), (200, 180, 150), (255, 255, 255)]


@pytest.mark.parametrize("kind", ["png", "tiff", "webp", "palette", "alpha", "turned"])
def test_colour_profiles(kind: str, tmp_path: Path) -> None:
    """One level: half of it for rounding, and what lcms's own fractions of 16 bits lack."""
    image = Image.fromarray(np.array([COLOURS], np.uint8))
    options: dict = {"icc_profile": WIDE}
    if kind == "webp":
        options |= {"lossless": True}
    if kind == "palette":
        image = image.quantize(6, dither=Image.Dither.NONE)
    if kind == "alpha":
        image.putalpha(255)
    if kind == "turned":
        image, options["exif"] = image.transpose(Image.Transpose.ROTATE_90), Image.Exif()
        options["exif"][0x0112] = 6
    path = tmp_path / f"a.{kind if kind in ('tiff', 'webp') else 'png'}"
    image.save(path, **options)
    expected = np.array([wide(colour) for colour in COLOURS])
    assert np.abs(array(open_image(path))[0] - expected).max() <= 1
    assert np.abs(expected - COLOURS).max() > 30
    image.save(path, **(options | {"icc_profile": b"damaged"}))
    assert np.array_equal(array(open_image(path))[0], COLOURS)
    image.save(path, **(options | {"icc_profile": ImageCms.ImageCmsProfile(SRGB).tobytes()}))
    assert np.array_equal(array(open_image(path))[0], COLOURS)


SRGB = ImageCms.createProfile("sRGB")


@pytest.mark.parametrize("space", ["RGB ", "GRAY"])
@pytest.mark.parametrize("kind", ["L.jpg", "LA.png", "I;16.png"])
def test_grey_pictures_with_profiles(kind: str, space: str, tmp_path: Path) -> None:
    """Also with one of colours, as many programs write it. Greys of another curve are other greys."""
    grey, content = picture().convert("L"), WIDE if space == "RGB " else icc(b"GRAY", {b"kTRC": CURVE})
    if kind.startswith("I"):
        grey = Image.fromarray(array(grey).astype(np.uint16) * 257)
    elif kind.startswith("LA"):
        grey.putalpha(255)
    path = tmp_path / f"a{kind[-4:]}"
    grey.save(path, icc_profile=content, quality=100)
    with Image.open(path) as image:
        greys = array(image) // 257 if kind.startswith("I") else array(image.convert("L"))
    expected = np.array([[wide((grey,) * 3) for grey in row] for row in greys])
    assert np.abs(array(open_image(path)) - expected).max() <= 1
    assert np.abs(expected[..., 0] - greys).max() > 5


# Formats
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.eps", "a.ps", "a.png", "a", "a.pdf", "a.gbr", "a.wmf"])
def test_programs_are_not_started(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""

    def started(*_: object, **__: object) -> None:
        pytest.fail("a program was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(subprocess, "check_call", started)
    buffer = io.BytesIO()
    picture().save(buffer, "EPS")
    (tmp_path / name).write_bytes(buffer.getvalue())
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    with pytest.raises(pytest.fail.Exception), Image.open(tmp_path / name) as image:
        image.load()
    with pytest.raises(InputError, match="cannot be read as a picture"):
        open_image(tmp_path / name)
    with pytest.raises(InputError, match="no pictures in it" if name != "a.png" else "cannot be read"):
        read_folder(tmp_path / name)


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)


@pytest.mark.parametrize("name", ["IMG_0001.HEIC", "a.heif", "a.jpg"])
def test_heic(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(HEIC)
    picture().save(tmp_path / "b.png")
    with pytest.raises(InputError, match=r"it is HEIC.*; pip install pillow-heif, or export it as JPEG"):
        read_folder(tmp_path / name)


def test_heic_is_read_by_pillow_heif(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the library, which registers a decoder as the real one does."""

    def register_heif_opener() -> None:
        Image.register_open("HEIF", lambda *_: picture(), lambda head: head[4:12] == b"ftypheic")

    monkeypatch.setitem(
        sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register_heif_opener)
    )
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    module._decoders.cache_clear()
    try:
        (tmp_path / "a.heic").write_bytes(HEIC)
        assert np.array_equal(array(read_folder(tmp_path / "a.heic")), array(picture()))
    finally:
        module._decoders.cache_clear()


@pytest.mark.parametrize("name", ["a.DNG", "a.nef"])
def test_raw_files_of_cameras(name: str, tmp_path: Path) -> None:
    """They are TIFF files, of which Pillow would read the thumbnail."""
    picture().save(tmp_path / name, "TIFF")
    with pytest.raises(InputError, match=r"is a raw file of a camera; export it as JPEG"):
        read_folder(tmp_path / name)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_damaged_exif(suffix: str, tmp_path: Path) -> None:
    """Only the tag Orientation counts, whatever the others hold: a text, zero divided by zero, no data."""
    broken = [
        (0x011A, 2, 12, b"seventy-two\0"),  # XResolution as text
        (0x011A, 5, 1, struct.pack("<II", 72, 0)),
        (0x011A, 10, 1, struct.pack("<ii", -1, 0)),
        (0x010F, 5, 1, struct.pack("<II", 1, 1)),  # Make as a fraction
        (0x8769, 4, 1, struct.pack("<I", 10**9)),  # the place of more tags, far outside of the file
    ]
    for tag, kind, count, data in broken:
        entries = sorted([(0x0112, 3, 1, struct.pack("<HH", 6, 0)), (tag, kind, count, data)])
        tiff, tail = b"II*\0" + struct.pack("<IH", 8, len(entries)), b""
        for number, type_, n, value in entries:
            if len(value) > 4:
                offset = 14 + 12 * len(entries) + len(tail)
                tail, value = tail + value, struct.pack("<I", offset)
            tiff += struct.pack("<HHI", number, type_, n) + value
        picture().save(tmp_path / f"a.{suffix}", exif=b"Exif\0\0" + tiff + bytes(4) + tail)
        assert open_image(tmp_path / f"a.{suffix}").size == (16, 24)


def test_random_damage(tmp_path: Path) -> None:
    """A mutated file is a picture or one line, whatever its format."""
    rng = np.random.default_rng(0)
    for suffix in ("jpg", "png", "webp", "tiff", "gif", "bmp", "ppm", "jp2", "tga", "avif"):
        path = tmp_path / f"a.{suffix}"
        if Image.registered_extensions().get(path.suffix) not in Image.SAVE:
            continue
        picture().save(path, **({"icc_profile": WIDE} if suffix in ("jpg", "png", "webp", "tiff") else {}))
        content = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(15):
            mutated = content.copy()
            mutated[rng.integers(0, min(len(content), 600), 3)] = rng.integers(0, 256, 3)
            path.write_bytes(mutated.tobytes())
            try:
                assert open_image(path).mode == "RGB"
            except InputError as error:
                assert str(path) in str(error)


# Folders
# ----------------------------------------------------------------------------------------------------------


def test_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Photos by name; stray files are passed over, each with a notice; what belongs to photos, without."""
    for i, name in enumerate(("b.png", "a.PNG", "c d.é.webp", "no suffix")):
        picture(seed=i).save(tmp_path / name, "WEBP" if name.endswith("webp") else "PNG", lossless=True)
    (tmp_path / "b.txt").write_text(" {} on a table\n", encoding="utf-8-sig")  # as Windows' editor does
    Image.new("L", (24, 16), 200).save(tmp_path / "c d.é.mask.png")
    (tmp_path / "notes.md").write_text("bought in 1998")
    (tmp_path / "b.png.txt").write_text("{} on a chair")
    (tmp_path / "a.PNG.mask.png").write_bytes((tmp_path / "c d.é.mask.png").read_bytes())
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (tmp_path / "sub").mkdir()
    picture().save(tmp_path / "sub" / "z.png")
    os.mkfifo(tmp_path / "pipe.png")
    with caplog.at_level(logging.INFO):
        photos = load_photos(str(tmp_path))
    assert [p.path.name for p in photos] == ["a.PNG", "b.png", "c d.é.webp", "no suffix"]
    assert [p.caption for p in photos] == [None, "{} on a table", None, None]
    for p, seed in zip(photos, (1, 0, 2, 3), strict=True):
        assert np.array_equal(array(p.open()), array(picture(seed=seed)))
    assert [p.mask_path is not None for p in photos] == [False, False, True, False]
    masks = [p.open_mask((24, 16)) for p in photos]
    assert [(mask.mode, mask.size, mask.getextrema()[0]) for mask in masks] == [
        ("L", (24, 16), value) for value in (255, 255, 200, 255)
    ]
    notices = {record.getMessage() for record in caplog.records}
    assert notices == {
        f"{tmp_path / 'notes.md'}: not a picture, skipped",
        f"{tmp_path / 'gone.png'}: is a link to a file that is not there, skipped",
        *(
            f"{tmp_path / name}: skipped, no photo needs it; for a.jpg it would be a.txt, a.mask.png"
            for name in ("a.PNG.mask.png", "b.png.txt")
        ),
    }


@pytest.mark.parametrize("kind", ["empty", "stray", "missing", "file", "below", "links"])
def test_no_photos(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    if kind == "file":
        folder.write_text("")
    elif kind != "missing":
        folder.mkdir()
    if kind == "stray":
        (folder / "readme.md").write_text("nothing here")
    if kind == "below":
        (folder / "img" / "10_toy").mkdir(parents=True)
        picture().save(folder / "img" / "10_toy" / "a.JPG")
    if kind == "links":
        (folder / "a.png").symlink_to("nowhere.png")
    message = {
        "missing": "is not a folder",
        "file": "is not a folder",
        "below": rf"no pictures in it, but in {folder / 'img' / '10_toy'}; give that folder",
        "links": "no pictures in it, only links to files that are not there",
    }.get(kind, "no pictures in it; three to five photos of one concept are best")
    with pytest.raises(InputError, match=message) as error:
        load_photos(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("name", ["empty.jpg", "a.TIF", "b.webp"])
def test_what_should_be_a_picture_by_its_name(name: str, tmp_path: Path) -> None:
    """It is not passed over: the user counts on it."""
    (tmp_path / name).write_text("" if name == "empty.jpg" else "something else")
    with pytest.raises(InputError, match="cannot be read as a picture"):
        read_folder(tmp_path / name)


@pytest.mark.parametrize(
    ("photo", "mask"),
    [
        ("a.jpg", "a.mask.png"),
        ("a.jpg", "a.mask.jpg"),
        ("a.jpg", "a-masklabel.png"),
        ("a.jpg", "a-masklabel3.png"),
        ("a.jpg", "a_mask.webp"),
        ("a.jpg", "a-mask.PNG"),
        ("IMG_1.JPG", "IMG_1.MASK.PNG"),
        ("IMG_1.JPG", "img_1-MaskLabel.Png"),
        ("1.png", "1.mask2.png"),
        ("a.mask-like.png", "a.mask-like.mask.png"),
    ],
)
def test_names_of_masks(photo: str, mask: str, tmp_path: Path) -> None:
    picture().save(tmp_path / photo)
    Image.new("L", (24, 16), 128).save(tmp_path / mask)
    (found,) = load_photos(tmp_path)
    assert (found.path.name, found.mask_path.name) == (photo, mask)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB"])
def test_a_mask_of_zeros_and_ones(mode: str, tmp_path: Path) -> None:
    """As programs write labels of pixels: 1 of 255 would be as good as nothing."""
    Image.new("RGB", (4, 2), "red").save(tmp_path / "a.png")
    pixels = np.array([[0, 1, 0, 1], [1, 0, 0, 0]], np.uint8)
    mask = Image.fromarray(pixels)
    if mode == "P":
        mask.putpalette([0, 0, 0, 1, 1, 1])
    elif mode == "1":
        mask = Image.fromarray(pixels.astype(bool))
    else:
        mask = mask.convert(mode)
    mask.save(tmp_path / "a.mask.png")
    (photo,) = load_photos(tmp_path)
    assert np.array_equal(np.asarray(photo.open_mask((4, 2))), pixels * 255)


def test_of_several_masks_the_first_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["a-masklabel.png", "a-masklabel1.png", "a-masklabel2.png", "a-condlabel.png"]
    for name in ("a.jpg", *reversed(names)):
        picture().save(tmp_path / name)
    with caplog.at_level(logging.INFO):
        (found,) = load_photos(tmp_path)
    assert found.mask_path.name == names[0]
    assert {message.partition(": skipped")[0] for message in caplog.messages} == {
        str(tmp_path / name) for name in names[1:]
    }


def test_photos_of_masks(tmp_path: Path) -> None:
    """Only `.mask` and `-masklabel` are never photos."""
    for name in ("venetian_mask.jpg", "tribal-mask.png", "gone.mask.png", "gone-masklabel.png"):
        picture().save(tmp_path / name)
    assert [p.path.name for p in load_photos(tmp_path)] == ["tribal-mask.png", "venetian_mask.jpg"]


@pytest.mark.parametrize("mode", ["I", "F", "I;16", "1", "P", "RGB", "LA"])
def test_masks_of_any_mode(mode: str, tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    half = np.zeros((16, 24), np.uint8)
    half[:, 12:] = 255
    mask = Image.fromarray(half)
    if mode == "I;16":
        mask = Image.fromarray(half.astype(np.uint16) * 257)
    elif mode == "F":
        mask = Image.fromarray(half.astype(np.float32) / 255)
    else:
        mask = mask.convert(mode)
    mask.save(tmp_path / "a.mask.tif")
    (found,) = load_photos(tmp_path)
    assert np.array_equal(array(found.open_mask((24, 16))), half)


def test_a_mask_of_another_size(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    Image.new("L", (16, 24)).save(tmp_path / "a.mask.png")
    with pytest.raises(InputError, match=r"a\.mask\.png: has size \(16, 24\), the photo \(24, 16\)"):
        load_photos(tmp_path)[0].open_mask((24, 16))


def test_a_mask_of_a_turned_photo(tmp_path: Path) -> None:
    """A mask is as large as the photo is upright, which is how everybody sees the photo."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(24, 16).save(tmp_path / "a.jpg", exif=exif)
    Image.new("L", (16, 24)).save(tmp_path / "a.mask.png")
    (turned,) = load_photos(tmp_path)
    assert turned.open().size == turned.open_mask((16, 24)).size == (16, 24)


def test_what_is_erased_in_a_mask_does_not_count(tmp_path: Path) -> None:
    image = picture()
    image.save(tmp_path / "a.png")
    alpha = np.zeros((16, 24), np.uint8)
    alpha[4:8, 6:9] = 255
    Image.merge("LA", (Image.new("L", (24, 16), 255), Image.fromarray(alpha))).save(tmp_path / "a.mask.png")
    (found,) = load_photos(tmp_path)
    assert np.array_equal(array(found.open_mask((24, 16))), alpha)


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.caption", "A.Caption"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_captions(name: str, encoding: str, tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    bom = "\N{BYTE ORDER MARK}" if encoding == "utf-16-be" else ""
    (tmp_path / name).write_text(f"{bom}{{}} im Grünen\n", encoding=encoding)
    assert [p.caption for p in load_photos(tmp_path)] == ["{} im Grünen"]


def test_which_caption_is_whose(tmp_path: Path) -> None:
    """The photo's case first, and `.txt`, as before there were others."""
    for name in ("a.png", "A.png"):
        picture().save(tmp_path / name)
    for name in ("a.txt", "A.txt", "a.caption"):
        (tmp_path / name).write_text(f"{{}} {name}")
    assert [p.caption for p in load_photos(tmp_path)] == ["{} A.txt", "{} a.txt"]


@pytest.mark.parametrize("caption", ["a toy on a table", "{} and {}", "  "])
def test_a_caption_without_place_for_the_word(caption: str, tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(caption)
    with pytest.raises(InputError, match=r"a\.txt: should be text with exactly one {}"):
        load_photos(tmp_path)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le", "utf-32"])
def test_a_caption_that_is_not_utf8(encoding: str, tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("{} im Grünen".encode(encoding))
    with pytest.raises(InputError, match=r"a\.txt: is not text in UTF-8; save it as UTF-8"):
        load_photos(tmp_path)
