"""Noticing that training has diverged, and going back to the last good step, without making a GPU wait."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Diverged(ArithmeticError):
    """The loss is no longer a finite number; the rows are those of the step before."""


class DivergenceWatch:
    """Watches parameters; from the first number on that is not finite, they no longer change.

    Whether all is well is known on the device only, and every decision is taken there, until someone calls
    `healthy`. So the processor can prepare the next steps while the device computes this one.

    Args:
        parameters: everything that is learned.
        rows: those of each word, whose lengths may explain what happened.

    Attributes:
        good_steps: how many steps were finished in good health.
        longest: (words,) the longest row of each word at the last step, or at the one that went wrong.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], rows: Sequence[nn.Parameter]) -> None:
        device = rows[0].device
        self._parameters, self._rows = parameters, rows
        self._last_good = [p.detach().clone() for p in parameters]
        self._healthy = torch.ones((), dtype=torch.bool, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.longest = torch.zeros(len(rows), device=device)

    @torch.no_grad()
    def check_finite(self, tensors: Sequence[Tensor]) -> None:
        """Go back to what was last remembered if one of these is not finite, now or ever before."""
        longest = torch.stack([rows.norm(dim=1).max() for rows in self._rows])
        self.longest = torch.where(self._healthy, longest, self.longest)
        self._healthy = torch.stack([self._healthy, *(t.isfinite().all() for t in tensors)]).all()
        for p, good in zip(self._parameters, self._last_good, strict=True):
            p.copy_(torch.where(self._healthy, p, good))

    @torch.no_grad()
    def check_gradients(self, losses: Tensor, scaler: torch.amp.GradScaler) -> None:
        """Before an update: remember the parameters, if the losses and gradients are finite."""
        # With a scaled loss, gradients may overflow: the scaler then leaves out the step and scales less.
        scaled = scaler.is_enabled() and scaler.get_scale() > 1
        self.check_finite([losses] if scaled else [losses, *(p.grad for p in self._parameters)])
        for p, good in zip(self._parameters, self._last_good, strict=True):
            good.copy_(torch.where(self._healthy, p, good))

    def end_step(self) -> None:
        """After an update: see that the parameters are finite, and count the step if all is well."""
        self.check_finite(self._parameters)
        self.good_steps += self._healthy

    def healthy(self) -> bool:
        """Wait for the device. If not, the parameters are the last good ones, and all is well again."""
        if self._healthy:
            return True
        self._healthy = torch.ones_like(self._healthy)
        return False

    def cause(self, words: Sequence[str], vocabulary_norm: float, dtype: torch.dtype) -> str:
        """What has probably gone wrong, and the remedy.

        Args:
            words: the placeholders, in the order of the rows.
            vocabulary_norm: the mean length of the vocabulary's vectors.
            dtype: of the model.
        """
        longest, index = self.longest.max(0)
        ratio = longest.item() / vocabulary_norm
        if self.good_steps == 0:
            return "weights of the checkpoint or pictures hold no finite numbers"
        if not ratio < 20:
            remedy = "lower the learning rate, or set max_norm"
            return f"a vector of {words[index]!r} has become {ratio:.0f} times too long: {remedy}"
        if dtype == torch.float16:
            return "the model overflows in float16: use bfloat16 or float32"
        return "the learning rate is too high"
