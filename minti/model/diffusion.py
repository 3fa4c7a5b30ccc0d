"""The noise schedule, by which a latent is dissolved into noise, and the DDIM sampler, which goes back.

Symbols as in the papers: x0 a clean latent, eps standard normal noise, t a time step from 0 to T - 1, and
alphas_cumprod[t] the share of the variance of x_t that is still x0. DDPM (arXiv 2006.11239) writes it as
alpha-bar, DDIM (arXiv 2010.02502) as alpha.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .config import ScheduleConfig
from .schedules import alphas_cumprod, spaced_timesteps


class Schedule:
    """The forward process q(x_t | x_0), and its deterministic or stochastic reversal.

    Attributes:
        alphas_cumprod: (T,) float32, the products of all 1 - beta up to t; see `schedules.py`.
    """

    def __init__(self, config: ScheduleConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.alphas_cumprod = torch.from_numpy(alphas_cumprod(config)).float().to(device)
        # Numbers asked back from a GPU make the processor wait, and a sampler needs some at every step.
        self._alphas = self.alphas_cumprod.tolist()

    def alpha(self, t: int) -> float:
        """alphas_cumprod[t]; behind the last step (t < 0) 1, or that of t = 0 if the checkpoint says so."""
        return 1.0 if t < 0 and self.config.set_alpha_to_one else self._alphas[max(t, 0)]

    def signal_and_noise(self, t: Tensor | int) -> tuple[Tensor | float, Tensor | float]:
        """sqrt(alphas_cumprod[t]) and sqrt(1 - alphas_cumprod[t]): (B, 1, 1, 1) for t (B,), or floats."""
        if isinstance(t, int):
            return self.alpha(t) ** 0.5, (1 - self.alpha(t)) ** 0.5
        alpha = self.alphas_cumprod.to(t.device)[t][:, None, None, None]  # (B,) -> (B, 1, 1, 1)
        return alpha.sqrt(), (1 - alpha).sqrt()

    def q_sample(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(alpha-bar_t) x0 + sqrt(1 - alpha-bar_t) eps (DDPM, equation 4).

        Args:
            x0, eps: (B, C, h, w) clean latents and noise.
            t: (B,) int64.

        Returns:
            (B, C, h, w)
        """
        signal, noise = self.signal_and_noise(t)
        return signal * x0 + noise * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the UNet should predict: eps, x0, or v = signal eps - noise x0 (arXiv 2202.00512, appendix D).

        The arguments and the result have the shapes of `q_sample`.
        """
        signal, noise = self.signal_and_noise(t)
        if self.config.prediction_type == "epsilon":
            return eps
        if self.config.prediction_type == "sample":
            return x0
        return signal * eps - noise * x0

    def x0_and_eps(self, prediction: Tensor, x_t: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """The clean latents and the noise that a prediction at x_t stands for: the inverse of `target`.

        Args:
            prediction, x_t: (B, C, h, w), the UNet's output and its input.
            t: (B,) int64, or one time step for all.

        Returns:
            x0 and eps, both (B, C, h, w), of which `q_sample` would make x_t.
        """
        signal, noise = self.signal_and_noise(t)
        if self.config.prediction_type == "epsilon":
            return (x_t - noise * prediction) / signal, prediction
        if self.config.prediction_type == "sample":
            return prediction, (x_t - signal * prediction) / noise
        return signal * x_t - noise * prediction, noise * x_t + signal * prediction

    def timesteps(self, steps: int) -> list[tuple[int, int]]:
        """The steps a sampler takes, from noise to picture: pairs (t, t_prev), where it is and where it goes.

        As in diffusers, t_prev lies T // steps before t. Behind the last step it is mostly negative; `alpha`
        says what that means.

        Raises:
            InputError: the schedule does not have that many steps.
        """
        times = spaced_timesteps(self.config, steps)
        return [(t, t - self.config.num_train_timesteps // steps) for t in times]

    def ddim_step(
        self, prediction: Tensor, x_t: Tensor, t: int, t_prev: int, eta: float, noise: Tensor
    ) -> Tensor:
        """One step of DDIM, from x_t to the x of the earlier t_prev (equation 12, sigma as in equation 16).

        Args:
            prediction: (B, C, h, w), the UNet's output for x_t.
            x_t: (B, C, h, w) float32.
            t, t_prev: time steps, see `alpha`; with eta = 0, t_prev may also be the later one.
            eta: 0 is deterministic, 1 has the variance of DDPM.
            noise: like x_t; not looked at where eta is 0.

        Returns:
            (B, C, h, w) float32
        """
        alpha, alpha_prev = self.alpha(t), self.alpha(t_prev)
        sigma = eta * ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)) ** 0.5 if eta else 0.0
        x0, eps = self.x0_and_eps(prediction, x_t, t)
        x_prev = alpha_prev**0.5 * x0 + max(0.0, 1 - alpha_prev - sigma**2) ** 0.5 * eps
        return x_prev + sigma * noise if eta else x_prev

    def ddim_sample(
        self,
        predict: Callable[[Tensor, int], Tensor],
        x_T: Tensor,
        steps: int,
        eta: float = 0.0,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Iterator[Tensor]:
        """Sample, yielding every x_t on the way.

        Args:
            predict: (x_t, t) -> the UNet's output, (B, C, h, w).
            x_T: (B, C, h, w) float32 standard normal noise.
            steps: how many steps to take.
            eta: see `ddim_step`.
            generators: one for each picture, for the noise of eta > 0.

        Yields:
            (B, C, h, w) float32, `steps` times; the last is the clean latent.
        """
        x_t = x_T
        for t, t_prev in self.timesteps(steps):
            prediction = predict(x_t, t).float()
            noise = torch.zeros_like(x_t)
            if eta:
                noise = torch.cat([torch.randn(x_t[:1].shape, generator=g) for g in generators]).to(x_t)
            x_t = self.ddim_step(prediction, x_t, t, t_prev, eta, noise)
            yield x_t
