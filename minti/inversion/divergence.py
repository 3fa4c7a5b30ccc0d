"""Noticing that learning has gone wrong, and going back to what last worked, without making a GPU wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class DivergenceWatch:
    """Stands by parameters; from the first number on that is not finite, they no longer change.

    Whether all is well is known on the device only, and every decision taken there, until someone asks for
    `healthy`. So the processor can prepare the next steps while the device computes this one.

    Attributes:
        good_steps: how many steps have been finished in good health.
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
        """Go back to what was last kept if one of these is not finite, now or ever before."""
        longest = torch.stack([rows.norm(dim=1).max() for rows in self._rows])
        self.longest = torch.where(self._healthy, longest, self.longest)
        self._healthy = torch.stack([self._healthy, *(t.isfinite().all() for t in tensors)]).all()
        for p, good in zip(self._parameters, self._last_good, strict=True):
            p.copy_(torch.where(self._healthy, p, good))

    @torch.no_grad()
    def remember(self) -> None:
        """Remember the parameters as they are, if all is well."""
        for p, good in zip(self._parameters, self._last_good, strict=True):
            good.copy_(torch.where(self._healthy, p, good))

    def count_step(self) -> None:
        self.good_steps += self._healthy

    def healthy(self) -> bool:
        """Wait for the device and see. If not, the parameters are those last kept, and all is well again."""
        if self._healthy:
            return True
        self._healthy = torch.ones_like(self._healthy)
        return False
