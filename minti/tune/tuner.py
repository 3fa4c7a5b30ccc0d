"""A step of tuning: the loss of `learn.py`, its gradient in the weights of the model, clipping, and AdamW.

Textual Inversion leaves the model as it is and seeks a word. What the model cannot draw, no word can say. So
pivotal tuning (Gal et al. 2022, arXiv 2208.01618, appendix A; after Roich et al., arXiv 2106.05744) keeps the
learned word v* as a pivot and changes the weights theta around it, with the very same loss:

    theta* = argmin_theta  E_{x0, y, eps, t} || eps - eps_theta(x_t, t, c(y_v*)) ||^2

DreamBooth (Ruiz et al. 2022, arXiv 2208.12242) uses a rare word of the vocabulary instead, in a prompt such
as "a photo of sks dog". So that the model does not forget what other dogs look like, it adds w times the same
loss over pictures that the untuned model has made of "a photo of dog" (equation 2 there).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..inversion import state as saved
from ..inversion.batches import Settings, Word, sample_batch
from ..inversion.divergence import Diverged
from ..inversion.shares import loss_function, loss_inputs
from ..model.stable_diffusion import StableDiffusion

# The weights of the UNet that may be tuned. Keys and values of cross-attention are all that sees the prompt;
# they are a fortieth of the weights, and enough for one thing (Kumari et al. 2022, arXiv 2212.04488).
WHAT = {"unet": r".*", "cross-kv": r".*\.attn2\.to_[kv]\..*"}

Weights = dict[str, dict[str, nn.Parameter]]  # part of the model -> name of a weight -> the weight


def choose_weights(sd: StableDiffusion, what: str, text_encoder: bool = False) -> Weights:
    """The weights that are tuned, by their names in the part "unet" and, if wanted, "text_encoder".

    Args:
        what: a key of WHAT.
        text_encoder: also those of the text encoder, without the learned words.
    """
    unet = {key: p for key, p in sd.unet.named_parameters() if re.fullmatch(WHAT[what], key)}
    text = {key: p for key, p in sd.text_encoder.named_parameters() if ".words." not in key}
    return {"unet": unet, "text_encoder": text} if text_encoder else {"unet": unet}


def memory_needed(sd: StableDiffusion, weights: Weights) -> int:
    """Bytes for the model, and for gradients, two moments and, below float32, master copies of what is tuned.

    The activations come on top of that.
    """
    model = [p for module in (sd.text_encoder, sd.unet, sd.vae) for p in module.parameters()]
    tuned = [p for part in weights.values() for p in part.values()]
    each = [p.element_size() + (8 if p.dtype == torch.float32 else 16) for p in tuned]
    return sum(p.numel() * p.element_size() for p in model) + sum(
        p.numel() * size for p, size in zip(tuned, each, strict=True)
    )


@dataclass(frozen=True)
class TuneSettings:
    """How weights are tuned."""

    lr: float = 5e-6
    batch_size: int = 1  # samples of the thing; as many of its class come beside them
    prior_weight: float = 1.0  # of the loss of the class
    weight_decay: float = 0.01  # of AdamW
    max_grad_norm: float = 1.0  # longer gradients are made shorter, all together


class Tuner:
    """Weights in the course of being tuned.

    Args:
        sd: the model, whose weights change.
        weights: those that are tuned, from `choose_weights`.
        instance: photos of the thing, and prompts for them. Its placeholder is a word the model knows.
        prior: pictures of its class, and their prompt; None: there are none.
        compiled: turn the loss into one compiled graph at the first step, which takes a while.

    Attributes:
        weights: part -> name -> float32 weight, which AdamW updates. Where the model computes in a lower
            precision, it gets a rounded copy after every step: there, a single step is often less than the
            difference between a weight and the next number.
        step_count: how many steps were taken.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        weights: Weights,
        instance: Word,
        prior: Word | None,
        settings: TuneSettings,
        compiled: bool = False,
    ) -> None:
        self.sd, self.settings, self.step_count = sd, settings, 0
        self._words = [word for word in (instance, prior) if word]
        self._draw = Settings(batch_size=settings.batch_size)
        self._used = [p for part in weights.values() for p in part.values()]
        for p in self._used:
            p.data = p.data.clone()  # the loaded one may be a view of the file
            p.requires_grad_(True)
        masters = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in self._used]
        own = iter(masters)
        self.weights = {part: {name: next(own) for name in names} for part, names in weights.items()}
        self._masters, how = masters, {"lr": settings.lr, "weight_decay": settings.weight_decay}
        self.optimizer = torch.optim.AdamW(masters, **how)
        self.scaler = torch.amp.GradScaler(sd.device.type, enabled=sd.dtype == torch.float16)
        self._loss = loss_function(sd, instance.latents.mean[:1], compiled)

    def step(self) -> tuple[float, float | None, float]:
        """Take one step. Returns, of before it: the loss of the thing and of its class, the gradient's norm.

        Raises:
            Diverged: one of them is not finite; the weights are those before the step.
        """
        n, T = self.settings.batch_size, self.sd.schedule.config.num_train_timesteps
        keys = ((self.step_count,), ("prior", self.step_count))
        batches = [sample_batch(w, self._draw, T, n, *key) for w, key in zip(self._words, keys, strict=False)]
        losses = self._loss(*loss_inputs(self.sd, self._words, batches)).view(-1, n).mean(1)  # (words,)
        loss = losses[0] + self.settings.prior_weight * losses[1:].sum()
        self.scaler.scale(loss).backward()
        for p, master in zip(self._used, self._masters, strict=True):
            if p is not master and p.grad is not None:
                master.grad, p.grad = p.grad.float(), None
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self._masters, self.settings.max_grad_norm)
        # With a scaled loss, gradients may overflow: the scaler then leaves out the step and scales less.
        scaled = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        if not (loss if scaled else loss + norm).isfinite():
            raise Diverged(f"step {self.step_count + 1}: the loss is not finite; lower the learning rate")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self._round()
        self.step_count += 1
        first, *rest = losses.tolist()
        return first, rest[0] if rest else None, norm.item()

    @torch.no_grad()
    def _round(self) -> None:
        """Give the model its weights in its own precision."""
        for p, master in zip(self._used, self._masters, strict=True):
            if p is not master:
                p.copy_(master)

    def state_dict(self) -> dict[str, Tensor]:
        """All that changes in the course of tuning."""
        return saved.pack(self.step_count, self.optimizer, self.scaler)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue where `state_dict` was taken. Raises InputError if it does not fit."""
        self.step_count = saved.unpack(dict(state), self.optimizer, self.scaler)
        self._round()
