"""What differs between checkpoints in the noise schedule: the betas, and the time steps of sampling."""

import numpy as np

from ..errors import InputError
from .config import ScheduleConfig


def alphas_cumprod(config: ScheduleConfig) -> np.ndarray:
    """The share of x0 in the variance of x_t, (T,) float64: the running product of 1 - beta_t."""
    start, end, T = config.beta_start, config.beta_end, config.num_train_timesteps
    if config.beta_schedule == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, T) ** 2
    elif config.beta_schedule == "squaredcos_cap_v2":  # Nichol and Dhariwal, arXiv 2102.09672, equation 17
        signal = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - signal[1:] / signal[:-1], 0.999)
    else:
        betas = np.linspace(start, end, T)
    alphas = np.cumprod(1 - betas)
    if config.rescale_betas_zero_snr:
        # Shift sqrt(alpha-bar) so that it ends at 0, and scale it so that it begins as before.
        signal = alphas**0.5
        alphas = ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])) ** 2
    return alphas


def spaced_timesteps(config: ScheduleConfig, steps: int) -> list[int]:
    """So many time steps, from noise to picture, in one of the three spacings of public scheduler configs.

    See Lin et al. 2023 (arXiv 2305.08891), table 2.

    Raises:
        InputError: the schedule does not have that many steps.
    """
    T, offset = config.num_train_timesteps, config.steps_offset
    most = T - offset if config.timestep_spacing == "leading" else T
    if not 1 <= steps <= most:
        raise InputError(f"steps = {steps}: this checkpoint's schedule allows 1 to {most}")
    if config.timestep_spacing == "leading":
        ascending = np.arange(steps) * (T // steps) + offset
    elif config.timestep_spacing == "linspace":
        ascending = np.linspace(0, T - 1, steps).round()
    else:
        # Rounding may give one more than was asked for, behind the last.
        ascending = np.arange(T, 0, -T / steps)[:steps].round()[::-1] - 1
    return [int(t) for t in ascending[::-1]]
