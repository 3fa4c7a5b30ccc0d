"""How the gradient moves the rows: by AdamW, or along the sphere of vectors of one length."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.stable_diffusion import StableDiffusion
from .settings import Settings
from .start import vocabulary


def vocabulary_norm(sd: StableDiffusion) -> float:
    """The mean length of the model's own word vectors, all parts of them together; see `vocabulary`."""
    squares = [vectors.square().sum(dim=1) for vectors in vocabulary(sd)]
    return torch.stack(squares).sum(dim=0).sqrt().mean().item()


def make_optimizer(
    sd: StableDiffusion, groups: list[dict[str, Any]], settings: Settings
) -> torch.optim.Optimizer:
    """The optimizer that the settings name, for groups {"params": rows, "lr": rate}."""
    if settings.optimizer == "direction":
        lengths = [(v.shape[1], v.norm(dim=1).mean().item()) for v in vocabulary(sd)]
        return DirectionDescent(groups, lengths, settings.kappa)
    return torch.optim.AdamW(groups, betas=settings.betas, weight_decay=settings.weight_decay)


class DirectionDescent(torch.optim.Optimizer):
    """Gradient descent on the direction of each row, while its length stays (DTI, arXiv 2512.13672).

    The rows that AdamW learns grow many times longer than those of a vocabulary, and drown the position and
    the other words of a prompt. Here a row is m v, where m is the mean length of the vocabulary's vectors and
    v has length 1. A step moves v by the learning rate along the sphere, whatever the size of the gradient:

        g = dL/dv - kappa mu        mu: the direction at the start, towards which kappa pulls
        g = g - (g . v) v           the part along the sphere
        v = v - lr g / |g|          and back to length 1

    A row without any gradient, such as one that no prompt of the batch names, stays where it is.

    Args:
        groups: of parameters, (num_vectors, D) each; they are brought to their length at once.
        lengths: for each text encoder the number of its columns in the rows, and m.
        kappa: weight of the pull; more follows prompts closer, less is closer to the photos.
    """

    def __init__(self, groups: list[dict[str, Any]], lengths: Sequence[tuple[int, float]], kappa: float):
        super().__init__(groups, {"lr": 1e-2})
        self._widths, self._lengths = zip(*lengths, strict=True)
        self._kappa = kappa
        self.normalize()
        self._starts = {p: self._directions(p) for p in self._rows}

    @property
    def _rows(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def _directions(self, p: Tensor) -> list[Tensor]:
        return [F.normalize(part, dim=1) for part in p.split(self._widths, dim=1)]

    @torch.no_grad()
    def _place(self, p: Tensor, directions: Sequence[Tensor]) -> None:
        p.copy_(torch.cat([m * v for m, v in zip(self._lengths, directions, strict=True)], dim=1))

    def normalize(self) -> None:
        """Bring all rows to their length."""
        for p in self._rows:
            self._place(p, self._directions(p))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move every row that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    gradients = p.grad.split(self._widths, dim=1)
                    parts = zip(self._directions(p), gradients, self._starts[p], self._lengths, strict=True)
                    self._place(p, [self._moved(v, m * g, mu, group["lr"]) for v, g, mu, m in parts])

    def _moved(self, v: Tensor, gradient: Tensor, mu: Tensor, lr: float) -> Tensor:
        g = gradient - self._kappa * mu
        g = g - (g * v).sum(dim=1, keepdim=True) * v
        g = g / (g.norm(dim=1, keepdim=True) + 1e-8)
        has_gradient = (gradient != 0).any(dim=1, keepdim=True)
        return torch.where(has_gradient, F.normalize(v - lr * g, dim=1), v)
