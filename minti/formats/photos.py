"""The photos of a concept: found in a folder with their masks and captions, and decoded one at a time."""

import codecs
import functools
import io
import itertools
import logging
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin
from PIL.Image import Transpose

from ..errors import InputError
from .reading import check_regular, read_bytes

log = logging.getLogger(__name__)

# What is decoded; Pillow hands other formats, such as EPS, to programs. HEIF needs pillow-heif.
FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
HEIC_SUFFIXES = (".heic", ".heif", ".hif")
RAW_SUFFIXES = (".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2")
MAX_PIXELS = 2**28  # a phone's camera has up to 200 megapixels
MAX_CAPTION = 2**16  # bytes; a prompt has room for 75 tokens
MAX_CHUNK = 2**26  # bytes of a text or colour profile in a PNG, uncompressed

# What turns a picture upright for each value of EXIF's tag Orientation (EXIF 2.3, 4.6.4).
TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}

# Names of captions and masks, those of other trainers included; `maybe`, as it could be a photo of a mask.
BESIDE = re.compile(
    r"(?P<photo>.+?)((?P<caption>\.txt|\.caption)|-condlabel\d*\.\w+"
    r"|(?P<mask>(?P<maybe>[_-])mask|\.mask|-masklabel)\d*\.\w+)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Photo:
    """One picture of the concept, as files; its pixels are in memory only while they are used.

    Attributes:
        mask_path: a picture of the same size, white where the photo counts. None: it counts everywhere.
        caption: a prompt for this photo with {} in the place of the word, or None.
    """

    path: Path
    mask_path: Path | None = None
    caption: str | None = None

    def open(self) -> Image.Image:
        """Decode the photo, see `open_image`."""
        return open_image(self.path)

    def open_mask(self, size: tuple[int, int]) -> Image.Image:
        """Decode the mask as mode L; what is black or transparent does not count. Of 0 and 1, 1 is white.

        Raises:
            InputError: the mask cannot be read or has not the photo's `size`, (width, height).
        """
        if self.mask_path is None:
            return Image.new("L", size, 255)
        mask = open_image(self.mask_path, "black").convert("L")
        if mask.size != size:
            raise InputError(f"{self.mask_path}: has size {mask.size}, the photo {size}; make them equal")
        return mask.point(lambda value: 255 * value) if mask.getextrema()[1] == 1 else mask


def open_image(path: Path, background: str = "white") -> Image.Image:
    """Decode a picture as upright 8-bit RGB in the colour space sRGB.

    Args:
        background: the colour that shows where the picture is transparent.

    Raises:
        InputError: the file is damaged, has more than MAX_PIXELS, or is of none of FORMATS.
    """
    if path.suffix.lower() in RAW_SUFFIXES:  # Pillow would decode the thumbnail
        raise InputError(f"{path}: is a raw file of a camera; export it as JPEG")
    with reading_picture(path), Image.open(path, formats=_decoders()) as image:
        return upright_rgb(image, path, background)


def upright_rgb(image: Image.Image, path: Path, background: str = "white") -> Image.Image:
    """A picture of any mode as `open_image` gives it. Raises InputError, which begins with `path`."""
    image.load()
    turn = None
    with suppress(Exception):  # whatever else is damaged in the EXIF block does not matter
        turn = TURNS.get(image.getexif().get(0x0112))
    profile = image.info.get("icc_profile")
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image, path)
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("L" if image.mode == "LA" else "RGB")
    image = (_to_srgb(image, profile, path) if profile else image).convert("RGB")
    if alpha:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
    return image if turn is None else image.transpose(turn)


@contextmanager
def reading_picture(path: Path) -> Iterator[None]:
    """Within the block, Pillow has the limits above and gives no warnings; all it raises is InputError."""
    limits = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    try:
        check_regular(path)
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns above it and refuses twice as much
        PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = MAX_CHUNK
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except Exception as error:  # a damaged picture can fail in any way
        reason, remedy = str(error) or type(error).__name__, "remove or repair it"
        if isinstance(error, Image.DecompressionBombError):
            remedy = "make it smaller"
        elif "HEIF" not in Image.OPEN and _is_heic(path):
            reason, remedy = "it is HEIC", "pip install pillow-heif, or export it as JPEG"
        raise InputError(f"{path}: cannot be read as a picture ({reason}); {remedy}") from None
    finally:
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = limits


@functools.cache
def _decoders() -> list[str]:
    """Those of FORMATS that can be decoded here."""
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _is_heic(path: Path) -> bool:
    """Whether the content begins as HEIC does (ISO 23008-12), whatever the file's name."""
    with suppress(OSError), path.open("rb") as file:
        return bool(re.match(rb".{4}ftyp(he[ivs][cfmsx]|mif1|msf1)", file.read(12), re.DOTALL))
    return False


def _to_8_bits(image: Image.Image, path: Path) -> Image.Image:
    """Scale grey values of 16 or 32 bits, or floats, to mode L.

    The files do not say which value is white, so it is the lowest usual one that no pixel exceeds.

    Raises:
        InputError: the values fit none of the usual ranges.
    """
    values = np.asarray(image).astype(np.float32)
    whites, slack = ((1, 255, 65535), 1.1) if image.mode[0] == "F" else ((255, 4095, 65535), 1)
    low, peak = float(values.min()), float(values.max())
    white = next((white for white in whites if peak <= slack * white), math.inf)
    # If all were below a 16th of white, the guess would be wrong. Comparisons with NaN are false.
    if not (low >= (1 - slack) * white and (peak == 0 or peak > white / 16)):
        usual = ", ".join(map(str, whites))
        raise InputError(f"{path}: its values, {low:g} to {peak:g}, go up to none of {usual}; save 8 bits")
    if image.mode in ("I", "F") or white != 65535:
        log.info("%s: its values go up to %g; %d is taken for white", path, peak, white)
    return Image.fromarray((values * 255 / white).round().clip(0, 255).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes, path: Path) -> Image.Image:
    """Convert a picture (L, RGB or CMYK) from the colours of its ICC profile to RGB in sRGB."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if ImageCms.getProfileDescription(source).startswith("sRGB"):
            return image
        if source.profile.xcolor_space == "RGB ":
            image = image.convert("RGB")
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except Exception as error:  # ImageCms raises almost anything for a damaged profile
        log.info("%s: its colour profile cannot be used (%s); taken for sRGB", path, error)
        return image


def load_photos(folder: str | Path) -> list[Photo]:
    """Find the photos of a folder, ordered by name, and what lies beside them.

    Beside `a.jpg` may be `a.txt` (or `a.caption`), a prompt in UTF-8 or UTF-16 with {} in the place of the
    word, and the mask `a.mask.png` (or `a-masklabel.png`, `a_mask.jpg`; of several the first by name). Case
    does not matter. Other files are passed over with a notice.

    Raises:
        InputError: the folder does not exist or has no photos, or a caption cannot be used.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: is not a folder; put the photos of one concept into a folder")
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    stems = {path.stem.casefold() for path in entries if path.is_file()}
    paths, beside = [], []
    for path in entries:
        match = BESIDE.fullmatch(path.name)
        if not path.exists():
            log.warning("%s: is a link to a file that is not there, skipped", path)
        elif not path.is_file():
            continue
        elif match and (not match["maybe"] or match["photo"].casefold() in stems):
            beside.append((path, match))
        elif _is_picture(path):
            paths.append(path)
        else:
            log.info("%s: not a picture, skipped", path)
    if not paths:
        raise InputError(f"{folder}: no pictures in it{_why_none(folder, entries)}")
    captions, masks = ([_find(beside, path, kind) for path in paths] for kind in ("caption", "mask"))
    for path, _ in beside:
        if path not in captions and path not in masks:
            log.info("%s: skipped, no photo needs it; for a.jpg it would be a.txt, a.mask.png", path)
    return [Photo(p, m, c and read_caption(c)) for p, m, c in zip(paths, masks, captions, strict=True)]


def _is_picture(path: Path) -> bool:
    """Whether a file is a picture by its name, or by how it begins."""
    with suppress(InputError), reading_picture(path), Image.open(path, formats=_decoders()):
        return True
    suffix = path.suffix.lower()
    return Image.EXTENSION.get(suffix) in FORMATS or suffix in (*HEIC_SUFFIXES, *RAW_SUFFIXES)


def _find(beside: Sequence[tuple[Path, re.Match[str]]], photo: Path, kind: str) -> Path | None:
    """The caption or mask of a photo. The same case goes before another, `.txt` before `.caption`."""
    found = [(p, m) for p, m in beside if m[kind] and m["photo"].casefold() == photo.stem.casefold()]
    found.sort(key=lambda pm: (pm[1]["photo"] != photo.stem, pm[0].suffix.lower() != ".txt", pm[0].name))
    return found[0][0] if found else None


def _why_none(folder: Path, entries: Sequence[Path]) -> str:
    """What may be the reason that a folder has no photos."""
    for path in itertools.islice(folder.rglob("*.*"), 10_000):
        if Image.EXTENSION.get(path.suffix.lower()) in FORMATS and path.parent != folder:
            return f", but in {path.parent}; give that folder"
    if any(not path.exists() for path in entries):
        return ", only links to files that are not there; repair the links"
    return "; three to five photos of one concept are best"


def read_caption(path: Path) -> str:
    """Read a caption. Raises InputError unless it is text with exactly one {}."""
    content = read_bytes(path, MAX_CAPTION)
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    caption = content.decode("utf-16" if is_utf16 else "utf-8-sig", errors="replace").strip()
    if "\N{REPLACEMENT CHARACTER}" in caption or "\0" in caption:
        raise InputError(f"{path}: is not text in UTF-8; save it as UTF-8")
    if caption.count("{}") != 1:
        raise InputError(f"{path}: should be text with exactly one {{}} where the word goes")
    return caption
