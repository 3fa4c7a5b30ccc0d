"""How a picture becomes the input of CLIP's image encoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import InputError
from .json_checks import each, read_json, real
from .reading import naming

# Of the pixels of CLIP's training pictures, in red, green and blue.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Where it is written how pictures were prepared, and in which section of the file.
SETTINGS = {
    "preprocessor_config.json": None,
    "processor_config.json": "image_processor",  # of transformers 5
    "open_clip_config.json": "preprocess_cfg",
}


@dataclass(frozen=True)
class Preprocess:
    """A picture as the image encoder takes it: the square in its middle, in fixed size and normalised.

    Attributes:
        resize: pixels of the shorter side before the square is cut out.
        crop: side of the square.
        mean, std: of the pixels' values, 0 to 1, in red, green and blue.
    """

    resize: int = 224
    crop: int = 224
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    @classmethod
    def read(cls, folder: Path, image_size: int) -> Preprocess:
        """From the config in a folder that describes it (`SETTINGS`); without one, as CLIP does it."""
        name = next((name for name in SETTINGS if (folder / name).is_file()), None)
        if name is None:
            return cls(image_size, image_size)
        raw = read_json(folder / name)
        with naming(folder / name, "the config of a CLIP's image processor"):
            raw = raw.get(SETTINGS[name], {}) if SETTINGS[name] else raw
            resize, crop = raw.get("size", image_size), raw.get("crop_size", image_size)
            resize = resize.get("shortest_edge") if isinstance(resize, dict) else resize
            crop = crop.get("height") if isinstance(crop, dict) else crop
            three = each(real(-1e3, 1e3), 3)
            mean = three(raw.get("image_mean", raw.get("mean", MEAN)))
            std = three(raw.get("image_std", raw.get("std", STD)))
            steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
            usual = (
                all(raw.get(step, True) is True for step in steps)
                and (raw.get("resample", 3), raw.get("interpolation", "bicubic")) == (3, "bicubic")
                and (raw.get("resize_mode", "shortest"), raw.get("mode", "RGB")) == ("shortest", "RGB")
                and abs(raw.get("rescale_factor", 1 / 255) - 1 / 255) < 1e-6
                and (type(resize), len(mean), len(std), 0 in std) == (int, 3, 3, False)
                and crop == image_size <= resize <= 16 * crop
            )
        if not usual:
            raise InputError(
                f"{folder / name}: asks for something else than a bicubic resize of the shorter side to at "
                f"least {image_size} pixels, the middle of them, and a mean and a std for each colour"
            )
        return cls(resize, crop, mean, std)

    def __call__(self, image: Image.Image) -> Tensor:
        """An RGB picture of any size -> (3, crop, crop) float32.

        Pillow's bicubic filter widens as the picture shrinks, so fine patterns do not alias. Of an odd number
        of surplus rows one more goes at the end, as in transformers; in OpenAI's code sometimes at the start.
        """
        size = [int(self.resize * side / min(image.size)) for side in image.size]
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = ((side - self.crop) // 2 for side in image.size)
        image = image.crop((left, top, left + self.crop, top + self.crop))
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255  # (3, H, W)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std
