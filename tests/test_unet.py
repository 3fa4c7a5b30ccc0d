"""The UNet of every family against diffusers."""

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from minti.errors import InputError
from minti.model.attention import Attention
from minti.model.blocks import timestep_embedding

from . import compare, oracles
from .compare import assert_parity

NO_MIDDLE = {"mid_block_type": None, "layers_per_block": 1}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("sd1", {}),
        ("sd1", NO_MIDDLE),
        ("sd1", {"layers_per_block": 3, "norm_num_groups": 16, "norm_eps": 1e-4}),
        ("sd2", {}),
        ("sd2", {"attention_head_dim": [1, 2, 4, 8], "upcast_attention": True}),
        ("sd2", NO_MIDDLE),
        ("inpainting", {}),
        ("sdxl", {}),
        ("unclip", {}),
    ],
)
@pytest.mark.parametrize(("height", "width"), [(8, 16), (13, 9)])
def test_forward(family, changes, height, width):
    """Odd sizes shrink by rounding up, and must come back to what they were."""
    assert_parity(compare.compare_unet(oracles.unet(family, **changes), height, width))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_norm_eps(family):
    reference = oracles.unet(family)
    eps = compare.norm_eps(compare.ours(reference))
    assert eps == compare.norm_eps(reference)
    assert set(eps.values()) == {1e-5, 1e-6}


def test_time_and_words_once_for_all_steps():
    """`embed_time` for three steps at once and `embed_context`, then `denoise`, against whole forwards."""
    reference = oracles.unet("sd1")
    unet = compare.ours(reference)
    x, context, times = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 64), torch.tensor([981, 500, 1])
    context_kv, time_shifts = unet.embed_context(context), unet.embed_time(times)
    for i, t in enumerate(times):
        output = unet.denoise(x, time_shifts[i : i + 1], context_kv)
        assert_parity(
            {
                "diffusers": (output, reference(x, t, context).sample),
                "forward": (output, unet(x, t[None], context)),
            }
        )


@pytest.mark.parametrize("family", ["sd1", "small", "sdxl"])
@torch.no_grad()
def test_guidance_shares_what_precedes_the_prompt(family):
    """Two pictures, each with two prompts, against diffusers with every picture twice; and nothing that does
    not depend on the prompt is computed for more than two, unless the conditions of SDXL differ."""
    reference = oracles.unet(family)
    unet, context = (
        compare.ours(reference),
        torch.randn(4, 77, oracles.unet(family).config.cross_attention_dim),
    )
    x, t = torch.randn(2, 4, 8, 16), torch.tensor([500])
    added, told = None, {}
    if family == "sdxl":
        added = torch.randn(4, 20), torch.tensor([[512.0, 768, 0, 64, 1024, 1024]]).expand(4, -1)
        told = {"added_cond_kwargs": {"text_embeds": added[0], "time_ids": added[1]}}
    rows = []
    unet.conv_in.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    output = unet.denoise(x, unet.embed_time(t, added), unet.embed_context(context))
    assert_parity({"diffusers": (output, reference(torch.cat([x, x]), t, context, **told).sample)})
    assert rows == [4 if added else 2]


@pytest.mark.parametrize("family", ["sd1", "sd2", "inpainting", "sdxl", "small"])
def test_everything_matters(family):
    """Were the output deaf to one of its inputs, or to the heads, comparing it would prove nothing."""
    unet = compare.ours(oracles.unet(family))
    torch.manual_seed(0)
    x, context = (
        torch.randn(1, unet.config.in_channels, 8, 8),
        torch.randn(2, 1, 77, unet.config.cross_attention_dim),
    )
    t, added = torch.tensor([500]), None
    if family == "sdxl":
        added = torch.randn(1, 20), torch.tensor([[512.0, 768, 0, 64, 1024, 1024]])
    output = unet(x, t, context[0], added)
    others = {"time": unet(x, t + 20, context[0], added), "context": unet(x, t, context[1], added)}
    if added:
        others["pooled text"] = unet(x, t, context[0], (added[0] + 1, added[1]))
        others["sizes"] = unet(x, t, context[0], (added[0], added[1] + 64))
    for module in unet.modules():
        if isinstance(module, Attention):
            module.heads = 1 if module.heads > 1 else 2
    others["heads"] = unet(x, t, context[0], added)
    for name, other in others.items():
        assert compare.relative_error(other, output) > 1e-3, name  # a hundred times the tolerance


@pytest.mark.parametrize("upcast", [False, True])
def test_upcast_attention_reaches_every_layer(upcast):
    unet = compare.ours(oracles.unet("sd2", upcast_attention=upcast))
    layers = [module for module in unet.modules() if isinstance(module, Attention)]
    assert len(layers) == 32
    assert all(layer.upcast == upcast for layer in layers)


def test_sdxl_needs_its_conditions():
    unet = compare.ours(oracles.unet("sdxl"))
    with pytest.raises(InputError, match="pooled text"):
        unet(torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 77, 64))


@pytest.mark.parametrize("dim", [2, 8, 320])
def test_timestep_embedding(dim):
    """Angles go up to 1000, where float32 has steps of 6e-5: that much the sines may differ."""
    t = torch.tensor([0, 1, 20, 500, 999])
    expected = get_timestep_embedding(t, dim, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(t, dim), expected, rtol=0, atol=1e-4)
    assert torch.equal(timestep_embedding(t, dim)[0], torch.tensor([1.0] * (dim // 2) + [0.0] * (dim // 2)))
