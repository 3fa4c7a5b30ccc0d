"""How words are learned: the options that all words of a run share."""

import math
from dataclasses import dataclass

from ..errors import InputError, check_number


@dataclass(frozen=True)
class Settings:
    """Options of `Inversion`. Impossible values raise InputError."""

    objective: str = "diffusion"  # or "clip", see `clip_objective.py`
    steps: int = 3000
    batch_size: int = 4  # samples of each word, in each process
    accumulate: int = 1  # batches whose gradients are added up for an update
    optimizer: str = "adamw"  # or "direction": rows keep one length, see `optimizers.DirectionDescent`
    kappa: float = 1e-4  # of "direction": how strongly it pulls towards the start
    lr_schedule: str = "constant"  # or "cosine", down to zero (arXiv 1608.03983, without restarts)
    warmup: int = 0  # steps over which the learning rate rises from zero
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW
    weight_decay: float = 0.01  # of AdamW
    t_min: int = 0  # first of the time steps that are learned from
    t_max: int | None = None  # last of them; None: that of the model
    average: int = 1  # the result is the mean of the rows after each of so many last steps
    progressive: tuple[int, ...] = ()  # steps at which the second vector of a word joins in, the third, ...
    regularization: float = 0.0  # weight of ||v - v_init||^2 in the loss
    context_weight: float = 0.0  # of the term that keeps what other words say, see `extensions.ContextTerm`
    max_norm: float | None = None  # longest a vector may be, in mean lengths of the vocabulary's
    per_image: float = 0.0  # share of prompts that also have a word of their photo's own
    caption_dropout: float = 0.0  # share of prompts that are the bare word
    eval_size: int = 16  # samples in the evaluation
    eval_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "average", "eval_size"):
            check_number(name, getattr(self, name), int, 1)
        for name in ("warmup", "t_min"):
            check_number(name, getattr(self, name), int, 0)
        if self.t_max is not None:
            check_number("t_max", self.t_max, int, self.t_min)
        for name in ("weight_decay", "regularization", "context_weight", "kappa"):
            check_number(name, getattr(self, name), float, 0)
        for name in ("per_image", "caption_dropout"):
            check_number(name, getattr(self, name), float, 0, 1)
        choices = {"lr_schedule": ("constant", "cosine"), "optimizer": ("adamw", "direction")}
        for name, known in (choices | {"objective": ("diffusion", "clip")}).items():
            if (value := getattr(self, name)) not in known:
                raise InputError(f"{name} {value!r}: choose from {', '.join(known)}")
        if self.max_norm is not None:
            check_number("max_norm", self.max_norm, float, 0)
        for beta in self.betas:
            check_number("betas", beta, float, 0, math.nextafter(1, 0))
        for step in self.progressive:
            check_number("progressive", step, int, 1)
        if sorted(set(self.progressive)) != list(self.progressive):
            raise InputError(f"progressive {self.progressive}: the steps should rise")
        if self.progressive and self.context_weight:
            raise InputError(
                "context_weight: not with progressive, whose words change; leave one of them out"
            )

    def lr_factor(self, step: int) -> float:
        """What the learning rate is multiplied by at a step, 0 to steps - 1."""
        factor = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.lr_schedule == "cosine":
            factor *= 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
        return factor

    def time_range(self, num_train_timesteps: int) -> tuple[int, int]:
        """The first time step that is learned from, and the one after the last, for a model that has T.

        Raises:
            InputError: the model has no such time steps.
        """
        T = num_train_timesteps
        last = T - 1 if self.t_max is None else self.t_max
        if not self.t_min <= last < T:
            text = f"t_min {self.t_min}, t_max {last}: the time steps of this model are 0 to {T - 1}"
            raise InputError(text)
        return self.t_min, last + 1
