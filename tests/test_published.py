"""`tools/parity.py --published` gives minti the inputs that diffusers' own slow tests give its pipelines."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import minti
from minti.errors import InputError
from tools import parity

from . import oracles
from .compare import assert_parity


@pytest.mark.parametrize("index", [0, 1, 2], ids=["SD 1.4", "SD 2 v", "LDM"])
def test_the_inputs_are_those_of_the_reference(index: int, tmp_path: Path) -> None:
    """On random weights and small pictures, with each test's own call of the pipeline."""
    case = replace(parity.PUBLISHED[index], side=64)
    numpy_noise = torch.from_numpy(np.random.RandomState(0).standard_normal((1, 4, 8, 8))).float()
    if index == 2:
        pipe, folder = oracles.ldm_pipeline(tmp_path / "words"), tmp_path / "ldm"
        pipe.save_pretrained(folder)
    else:
        family, kind = (("sd1", "epsilon"), ("sd2", "v_prediction"))[index]
        folder = oracles.save_folder(tmp_path / family, family, kind)
        pipe = oracles.pipeline(tmp_path, family, kind)
    inputs = {"generator": torch.manual_seed(0)} if index == 1 else {"latents": numpy_noise}
    (theirs,) = pipe(
        [case.prompt],
        num_inference_steps=case.steps,
        guidance_scale=case.guidance_scale,
        height=64,
        width=64,
        output_type="np",
        **inputs,
    ).images
    sd = minti.load(folder, device="cpu", dtype="float32", schedule="as-published")
    ours = parity.published_picture(sd, case)
    assert_parity({"pixels": (ours, torch.from_numpy(theirs).permute(2, 0, 1))}, 2e-4)


def test_checkpoints_of_which_nothing_is_published(tmp_path: Path) -> None:
    folder = oracles.save_folder(tmp_path / "sd1")
    with pytest.raises(InputError, match="no numbers are published for Stable Diffusion, own size"):
        parity.compare_published(folder)
