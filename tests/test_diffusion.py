"""The noise schedule and DDIM against diffusers and against the formulas."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from minti.errors import InputError
from minti.formats import configs
from minti.model.diffusion import Schedule

from . import oracles
from .compare import assert_parity

KINDS = ["epsilon", "v_prediction", "sample"]
SPACINGS = ["leading", "trailing", "linspace"]


def both(kind=DDIMScheduler, **changes):
    """Our schedule and diffusers', of one config."""
    reference = kind.from_config(oracles.SCHEDULE | changes)
    return Schedule(configs.schedule_config(dict(reference.config), "config of the oracle")), reference


@pytest.mark.parametrize(
    ("shape", "start", "end"), [("scaled_linear", 0.00085, 0.012), ("linear", 0.0001, 0.02)]
)
def test_alphas_cumprod(shape, start, end):
    schedule, reference = both(beta_schedule=shape, beta_start=start, beta_end=end)
    power = 2 if shape == "scaled_linear" else 1
    first, last = start ** (1 / power), end ** (1 / power)
    betas = [(first + (last - first) * i / 999) ** power for i in range(1000)]
    exact = [math.prod(1 - beta for beta in betas[: t + 1]) for t in range(1000)]
    # In float64 up to the last rounding, which is 6e-8 of the value ...
    torch.testing.assert_close(
        schedule.alphas_cumprod.double(), torch.tensor(exact).double(), rtol=1e-7, atol=0
    )
    # ... where diffusers has float32 from the start, and 1000 factors of rounding.
    torch.testing.assert_close(schedule.alphas_cumprod, reference.alphas_cumprod, rtol=1e-5, atol=0)
    assert schedule.alphas_cumprod.dtype == torch.float32


def test_q_sample_and_targets():
    x0, eps = torch.randn(2, 50, 4, 3, 3)
    t = torch.linspace(0, 999, 50).long()
    schedule, reference = both(DDPMScheduler)
    assert_parity({"q_sample": (schedule.q_sample(x0, eps, t), reference.add_noise(x0, eps, t))})
    assert torch.equal(schedule.target(x0, eps, t), eps)
    schedule, reference = both(DDPMScheduler, prediction_type="v_prediction")
    assert_parity({"v": (schedule.target(x0, eps, t), reference.get_velocity(x0, eps, t))})
    schedule, _ = both(DDPMScheduler, prediction_type="sample")
    assert torch.equal(schedule.target(x0, eps, t), x0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_prediction_gives_picture_and_noise_back(kind):
    schedule, reference = both(prediction_type=kind)
    reference.set_timesteps(1)
    x0, eps = torch.randn(2, 30, 4, 3, 3)
    t = torch.linspace(1, 998, 30).long()
    x_t = schedule.q_sample(x0, eps, t)
    target = schedule.target(x0, eps, t)
    found = schedule.x0_and_eps(target, x_t, t)
    # Solving for what is nearly drowned magnifies rounding: by 1 / signal <= 15, or 1 / noise <= 25.
    assert_parity({"x0": (found[0], x0), "eps": (found[1], eps)})
    for i, step in enumerate(t):
        theirs = reference.step(target[i], step, x_t[i]).pred_original_sample
        assert_parity({"x0": (found[0][i], theirs)})


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
def test_timesteps(spacing, offset):
    schedule, reference = both(timestep_spacing=spacing, steps_offset=offset)
    for steps in range(1, 1000):
        reference.set_timesteps(steps)
        ours = [t for t, _ in schedule.timesteps(steps)]
        # For 62 of the step counts diffusers, adding up fractions, gives one too many with "trailing": -1.
        assert ours == reference.timesteps[:steps].tolist(), f"{steps} steps"
        assert len(ours) == steps
        assert all(t - t_prev == 1000 // steps for t, t_prev in schedule.timesteps(steps))
        assert min(ours) >= 0 and max(ours) <= 999


@pytest.mark.parametrize(
    ("spacing", "offset", "steps"),
    [("leading", 1, 1000), ("leading", 0, 1001), ("trailing", 1, 1001), ("linspace", 1, 1001)]
    + [(spacing, 1, steps) for spacing in SPACINGS for steps in (0, -1)],
)
def test_steps_out_of_range(spacing, offset, steps):
    """1000 leading steps with offset 1 would begin at time 1000, which is one too late."""
    schedule, _ = both(timestep_spacing=spacing, steps_offset=offset)
    with pytest.raises(InputError, match=f"steps = {steps}: .* 1 to "):
        schedule.timesteps(steps)


@pytest.mark.parametrize(("spacing", "offset"), [("leading", 0), ("trailing", 1), ("linspace", 1)])
def test_as_many_steps_as_there_are(spacing, offset):
    schedule, _ = both(timestep_spacing=spacing, steps_offset=offset)
    assert schedule.timesteps(1000) == [(t, t - 1) for t in range(999, -1, -1)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_ddim(kind, spacing, to_one, eta):
    """Every x_t of a whole sampling run, with a smooth function in place of the UNet."""
    schedule, reference = both(prediction_type=kind, timestep_spacing=spacing, set_alpha_to_one=to_one)
    steps = 13  # does not divide 1000

    def predict(x, t):
        return torch.sin(2 * x + t / 300).roll(1, dims=-1)

    x_T = torch.randn(2, 4, 3, 5)
    mine, theirs = ([torch.Generator().manual_seed(s) for s in (8, 9)] for _ in range(2))
    ours = list(schedule.ddim_sample(predict, x_T, steps, eta, mine))
    assert len(ours) == steps

    reference.set_timesteps(steps)
    x = x_T
    for i, t in enumerate(reference.timesteps):
        # One step from the same x_t, so that rounding does not add up over the run ...
        assert_parity({f"x after step {i}": (ours[i], x_next(reference, predict, x, t, eta, theirs))})
        x = ours[i]


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_zero_terminal_snr(kind, eta):
    """Betas rescaled so that the last x_t is pure noise; diffusers does it in float32, hence 1e-5.

    With eta 1 the reference would take the root of a difference that is zero at the first step but for
    rounding, which may make it negative.
    """
    changes = {"prediction_type": kind, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    schedule, reference = both(**changes)
    assert schedule.alphas_cumprod[-1] == 0
    torch.testing.assert_close(schedule.alphas_cumprod, reference.alphas_cumprod, rtol=0, atol=1e-5)
    x_T, times = torch.randn(1, 4, 3, 5), schedule.timesteps(10)
    assert times[0] == (999, 899)
    reference.set_timesteps(10)
    mine, theirs = ([torch.Generator().manual_seed(8)] for _ in range(2))
    ours = list(schedule.ddim_sample(lambda x, t: torch.sin(2 * x + t / 300), x_T, 10, eta, mine))
    for i, t in enumerate(reference.timesteps):
        before = ours[i - 1] if i else x_T
        step = reference.step(torch.sin(2 * before + t / 300), t, before, eta=eta, generator=theirs[0])
        assert_parity({f"x after step {i}": (ours[i], step.prev_sample)}, 1e-5)
    with pytest.raises(InputError, match=r"rescale_betas_zero_snr .* v_prediction"):
        both(prediction_type="epsilon", rescale_betas_zero_snr=True)


def x_next(reference, predict, x, t, eta, generators):
    return reference.step(predict(x, t.item()), t, x, eta=eta, generator=generators).prev_sample
