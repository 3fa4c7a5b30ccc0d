"""The bottleneck tool: what each freedom tells the UNet, and that loss and pictures are those of minti."""

from pathlib import Path

import numpy as np
import pytest
import torch

import minti
from minti.errors import InputError
from minti.formats.photos import load_photos
from minti.formats.views import make_views
from minti.inversion.batches import Settings, Word, sample_batch
from minti.inversion.latents import encode_views
from minti.inversion.learn import diffusion_loss
from minti.inversion.shares import loss_inputs
from minti.inversion.start import word_rows
from minti.model.stable_diffusion import StableDiffusion
from tools import bottleneck

TINY = Path(__file__).parents[1] / "weights" / "tiny"
CONCEPTS = ["--checkpoint", str(TINY), "--concepts", str(TINY / "concepts" / "concepts.yaml")]


@pytest.fixture
def sd() -> StableDiffusion:
    return minti.load(TINY, device="cpu", dtype="float32")


def test_every_freedom_begins_with_the_init_word(sd: StableDiffusion) -> None:
    expected = sd.unet.embed_context(sd.encode_prompt(["a photo of a creature"]))
    for name, free, told in bottleneck.freedoms(sd, "creature"):
        assert all(tensor.requires_grad for tensor in free), name
        # Two vectors repeat the init word, so that what follows them moves by one token.
        if name != "2 vectors":
            # One batched product for all layers, or one for each, differ in rounding only.
            torch.testing.assert_close(
                told(), expected, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
        told().square().sum().backward()
        assert all(tensor.grad.abs().max() > 0 for tensor in free), name


def test_a_row_of_one_layer_reaches_that_layer_only(sd: StableDiffusion) -> None:
    (free, told) = next(
        (free, told) for name, free, told in bottleneck.freedoms(sd, "plant") if name == "per layer"
    )
    before = told().detach()
    with torch.no_grad():
        free[2] += torch.linspace(-1, 1, free[2].shape[1])  # a constant would be lost in the layer norm
    changed = (told() - before).abs().amax(dim=(0, 1)) > 1e-4
    transformers = [t for block in sd.unet.blocks for t in block.attentions]
    widths = [2 * block.attn2.to_k.out_features for t in transformers for block in t.transformer_blocks]
    assert [bool(part.any()) for part in changed.split(widths)] == [i == 2 for i in range(len(widths))]


def test_loss_and_pictures_are_those_of_minti(sd: StableDiffusion) -> None:
    views = make_views(load_photos(TINY / "concepts" / "imp"), 64, flip=True)
    word = Word("creature", word_rows(sd, "creature", 1), encode_views(sd, views), ["a photo of a {}"])
    batch = sample_batch(word, Settings(), 1000, 4, 0)
    told = sd.unet.embed_context(sd.encode_prompt(["a photo of a creature"]))
    with torch.no_grad():
        expected = diffusion_loss(sd, *loss_inputs(sd, [word], [batch])).mean()
        torch.testing.assert_close(bottleneck.loss_of(sd, told, word, batch), expected, atol=1e-5, rtol=1e-5)
    options = ["--num-images", "2", "--sample-steps", "3", "--guidance-scale", "4"]
    images = bottleneck.paint(sd, told, bottleneck.arguments([*CONCEPTS, *options]))
    theirs = sd.sample("a photo of a creature", num_images=2, steps=3, guidance_scale=4.0)
    for ours, image in zip(images, theirs, strict=True):
        # The prompts are encoded one by one here, so the last bit of a value may differ, and with it a level.
        assert abs(np.asarray(ours, np.int16) - np.asarray(image, np.int16)).max() <= 1


def test_command(tmp_path: Path) -> None:
    few = ["--steps", "2", "--eval-size", "8", "--num-images", "2", "--sample-steps", "2", "--device", "cpu"]
    bottleneck.main([*CONCEPTS, *few, "--out", str(tmp_path / "out")])
    rows = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert len(rows) == 8 and "keys and values" in rows[-1]
    assert (tmp_path / "out" / "sheet.png").is_file()
    with pytest.raises(InputError, match="--concept imps"):
        bottleneck.main([*CONCEPTS, "--concept", "imps"])
