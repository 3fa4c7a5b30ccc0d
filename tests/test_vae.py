"""The autoencoder against diffusers."""

import pytest
import torch
import torch.nn.functional as F

from minti.model.blocks import Downsample

from . import compare, oracles
from .compare import assert_parity


@pytest.mark.parametrize(
    ("changes", "height", "width"),
    [
        ({}, 32, 32),
        ({}, 24, 56),  # odd latents
        ({"layers_per_block": 1, "latent_channels": 8, "norm_num_groups": 16}, 16, 32),
    ],
)
def test_encode_sample_decode(changes, height, width):
    assert_parity(compare.compare_vae(oracles.vae(**changes), height, width))


def test_variance_is_clamped():
    """Beyond e^-30 and e^20, which these weights go."""
    reference = oracles.vae()
    reference.quant_conv.weight.mul_(1000)
    pairs = compare.compare_vae(reference, 32, 32)
    mean, std = pairs["mean"][0], pairs["std"][0]
    # The logarithms come out of sums of several hundred, and so does their rounding.
    assert_parity({"mean": pairs["mean"], "log std": tuple(s.log() for s in pairs["std"])}, 1e-4)
    torch.testing.assert_close(std.log().aminmax(), (torch.tensor(-15.0), torch.tensor(10.0)))
    assert mean.isfinite().all()


def test_downsample_pads_right_and_bottom():
    """All but the last row and column come from whole 3x3 windows, the first of which starts at pixel 0."""
    down, x = Downsample(3, symmetric=False).requires_grad_(False), torch.randn(1, 3, 8, 12)
    output = down(x)
    assert output.shape == (1, 3, 4, 6)
    inside = F.conv2d(x, down.conv.weight, down.conv.bias, stride=2)
    torch.testing.assert_close(output[..., :-1, :-1], inside)
    corner = F.conv2d(x[..., -2:, -2:], down.conv.weight[..., :2, :2], down.conv.bias)
    torch.testing.assert_close(output[..., -1:, -1:], corner)


def test_norm_eps():
    reference = oracles.vae()
    eps = compare.norm_eps(compare.ours(reference))
    assert eps == compare.norm_eps(reference)
    assert set(eps.values()) == {1e-6}


def test_sample_without_generator_has_the_moments():
    """20,000 values: the mean of (z - mean) / std is below 5 / sqrt(20,000), its variance about 1."""
    moments = compare.ours(oracles.vae()).encode(torch.zeros(1, 3, 16, 16))
    z = torch.stack([moments.sample() for _ in range(1250)])
    normal = (z - moments.mean) / moments.std
    assert normal.numel() == 20_000
    assert abs(normal.mean().item()) < 5 / 20_000**0.5
    assert abs(normal.var().item() - 1) < 0.06


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 20), (30, 8), (5, 23)])
def test_tiles_cover_the_picture_without_seams(height, width):
    """With a decoder whose pixels depend on nothing but the latent below, tiles change nothing."""
    vae = compare.ours(oracles.vae())
    f = vae.config.downscale
    vae.decoder.forward = lambda z: F.interpolate(z[:, :3], scale_factor=f, mode="nearest")
    latents = torch.randn(2, 4, height, width)
    whole = vae.decode(latents)
    vae.tile = 8
    torch.testing.assert_close(vae.decode(latents), whole, rtol=1e-5, atol=1e-6)


def test_tiles_of_a_real_decoder():
    """Close to the whole picture, and decoded piece by piece; equal where one tile is enough."""
    vae, latents = compare.ours(oracles.vae()), torch.randn(1, 4, 24, 12)
    whole, seen = vae.decode(latents), []
    vae.tile = 24
    assert torch.equal(vae.decode(latents), whole)
    vae.tile = 12
    vae.decoder.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[2:]))
    tiled = vae.decode(latents)
    assert seen == [(12, 12)] * 3
    # With random weights the statistics of a part differ much from those of the whole. A tile in the wrong
    # place would give an error of about twice the variance.
    assert (tiled - whole).square().mean() < 0.5 * whole.var()
