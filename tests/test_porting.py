"""A checkpoint that nobody had in mind: BK-SDM (Kim et al. 2023, arXiv 2305.15798), SD with blocks removed.

`nota-ai/bk-sdm-base` has one residual block a level in place of two, `-small` moreover has no middle block,
and `-tiny` no coarsest level either; the `-v2` models are the same for SD 2.x. This is the last step of the
recipe "How to port a new checkpoint": compare with the library the checkpoint was made with.
"""

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

import minti
from minti.formats import configs
from minti.model.unet import UNet
from tests import compare, oracles


def unet_config(
    size: str, channels: tuple[int, ...] = (320, 640, 1280, 1280), family: str = "v1", context_dim: int = 768
) -> dict:
    """The published config, with other widths if need be."""
    levels = 3 if size == "tiny" else 4
    attended = [True] * 3 + [False] * (levels - 3)
    config = {
        "block_out_channels": list(channels[:levels]),
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attended],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)],
        "layers_per_block": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn" if size == "base" else None,
        "attention_head_dim": 8,
        "cross_attention_dim": context_dim,
        "sample_size": 64,
    }
    if family == "v2":
        heads = [max(1, c // 64) for c in config["block_out_channels"]]
        config |= {"attention_head_dim": heads, "use_linear_projection": True, "upcast_attention": True}
    return config


@pytest.mark.parametrize("family, context_dim", [("v1", 768), ("v2", 1024)])
@pytest.mark.parametrize("size, parameters", [("base", 0.58e9), ("small", 0.49e9), ("tiny", 0.33e9)])
def test_full_size_shapes(size, parameters, family, context_dim):
    """Every key and shape is that of the reference, and their sum what the authors state."""
    raw = unet_config(size, family=family, context_dim=context_dim)
    with torch.device("meta"):
        theirs = UNet2DConditionModel(**raw).state_dict()
        ours = UNet(configs.unet_config(raw, "BK-SDM")).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    # The authors give two digits; SD 2.x has 0.7% more, in keys and values of the wider context.
    assert sum(v.numel() for v in ours.values()) == pytest.approx(parameters, rel=0.025)


@pytest.mark.parametrize("size, family", [("base", "v1"), ("small", "v1"), ("tiny", "v1"), ("tiny", "v2")])
def test_folder_single_file_and_picture(size, family, tmp_path):
    """A small one of random weights: output and picture are those of diffusers, from either layout."""
    kind = "sd1" if family == "v1" else "sd2"
    raw = unet_config(size, (32, 64, 64, 64), family, context_dim=64) | {"sample_size": 8}
    torch.manual_seed(0)
    pipe = oracles.pipeline(tmp_path, kind)
    pipe.register_modules(unet=oracles.randomise(UNet2DConditionModel(**raw), 1))
    pipe.save_pretrained(tmp_path / "bk-sdm")
    words = oracles.write_tokenizer(
        tmp_path / "bk-sdm" / "tokenizer", "!" if family == "v2" else "<|endoftext|>"
    )
    sd = minti.load(tmp_path / "bk-sdm", device="cpu", dtype="float32")
    assert sd.unet.config.layers_per_block == 1
    assert (sd.unet.mid_block is None) == (size != "base")

    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 4, 8, 12, generator=generator), torch.tensor([801, 20])
    context = torch.randn(2, 77, 64, generator=generator)
    ours, theirs = sd.unet(x, t, context), pipe.unet(x, t, context).sample
    # Both sides are float32 and sum in different orders: 1e-6 of the scale is normal, 1e-5 the limit.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())
    pictures = compare.compare_pictures(sd, pipe, ["a photo of the cat"], steps=2)["pixels"]
    # Ours are rounded to 8 bits, by half a level at most.
    torch.testing.assert_close(*pictures, rtol=0, atol=0.51 / 255)

    file = tmp_path / "bk-sdm.safetensors"
    save_file(oracles.single_file(sd), file)
    again = minti.load(
        file,
        device="cpu",
        dtype="float32",
        tokenizer=words,
        prediction_type=sd.schedule.config.prediction_type,
    )
    # A single file does not say for which size it was trained.
    assert replace(again.unet.config, sample_size=(8, 8)) == sd.unet.config
    torch.testing.assert_close(again.unet(x, t, context), ours, rtol=0, atol=0)  # the same numbers
