"""CLIP-guided sampling (Crowson 2021), a rival in the Textual Inversion paper (arXiv 2208.01618, figure 5).

At each step the picture x0 that the model expects is decoded and shown to a CLIP, and the noise is changed so
that the picture comes closer to a text (equation 14 of arXiv 2105.05233, with a CLIP as the classifier):

    eps <- eps + scale sqrt(1 - a_t) grad_{x_t} d(CLIP(decode(x)), CLIP(text))
    x = sqrt(1 - a_t) x0 + (1 - sqrt(1 - a_t)) x_t,    d(u, v) = 2 arcsin^2(|u - v| / 2)

The mixture x and the distance d are those of Crowson's code and of `clip_guided_stable_diffusion` in the
examples of diffusers. CLIP sees several cutouts of the picture, since one view alone is easily deceived. The
paper starts from a training picture, of which the first steps are left out; this is the only way in which the
concept gets into the pictures.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..inversion.batches import generator
from ..judge.scorer import Scorer
from ..model.stable_diffusion import StableDiffusion

CUTOUTS = 4  # of each picture at each step


@dataclass
class ClipGuidance:
    """A `sampler` for `StableDiffusion.sample_each`, which calls it for one batch after another.

    Attributes:
        sd: the model.
        steps: DDIM steps, of which the last `strength` are walked; the step from which they begin decides how
            much of the picture to start from is left.
        seeds: those of all pictures that will be made, in order; they decide about the cutouts.
        scorer: the CLIP; needed where `scale` is not 0.
        texts: (n, P) of unit length, what each picture should come closer to.
        scale: how strongly; diffusers' example has 100.
        z0: (1, C, h, w) latents of a picture to start from, instead of from noise alone.

    Raises:
        InputError: no step remains at this strength.
    """

    sd: StableDiffusion
    steps: int
    seeds: Sequence[int]
    scorer: Scorer | None = None
    texts: Tensor | None = None
    scale: float = 0.0
    z0: Tensor | None = None
    strength: float = 0.75
    _made: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        path = self.sd.schedule.timesteps(self.steps)
        self.path = path if self.z0 is None else path[len(path) - int(self.steps * self.strength) :]
        if not self.path:
            raise InputError(f"--strength {self.strength}: none of {self.steps} steps remain; raise it")

    def __call__(self, predict: Callable[[Tensor, int], Tensor], x_T: Tensor) -> Iterator[Tensor]:
        """Sample the next pictures, as many as there are in x_T, yielding every x_t, (B, C, h, w) float32."""
        own = slice(self._made, self._made + len(x_T))
        self._made = own.stop
        x = x_T if self.z0 is None else self.sd.schedule.q_sample(self.z0, x_T, self.path[0][0])
        for t, t_prev in self.path:
            # Where x_t is nothing but noise, as in some schedules at first, no change of it changes x0.
            if self.scale and self.sd.schedule.alpha(t) > 0:
                prediction = self.guide(predict, x, t, self.texts[own].to(x.device), self.seeds[own])
            else:
                prediction = predict(x, t)
            x = self.sd.schedule.ddim_step(prediction, x, t, t_prev, 0.0, x)
            yield x

    def guide(
        self,
        predict: Callable[[Tensor, int], Tensor],
        x_t: Tensor,
        t: int,
        texts: Tensor,
        seeds: Sequence[int],
    ) -> Tensor:
        """The UNet's output for x_t, (B, C, h, w) float32, after the change at the top of this file."""
        schedule, noise = self.sd.schedule, self.sd.schedule.signal_and_noise(t)[1]
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_()
            prediction = predict(x_t, t)
            x0, eps = schedule.x0_and_eps(prediction, x_t, t)
            distances = self.distances(noise * x0 + (1 - noise) * x_t, texts, seeds, t)
            gradient = torch.autograd.grad(distances.sum(), x_t)[0]
        eps = eps.detach() + self.scale * noise * gradient
        signal = schedule.signal_and_noise(t)[0]
        return schedule.target((x_t.detach() - noise * eps) / signal, eps, t)

    def distances(self, latents: Tensor, texts: Tensor, seeds: Sequence[int], t: int) -> Tensor:
        """How far the pictures of latents, (B, C, h, w), are from texts, (B, P): (B,), means over cutouts."""
        vae, preprocess = self.sd.vae, self.scorer.preprocess
        pixels = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).float()
        pixels = (pixels / 2 + 0.5).clamp(0, 1)
        random = [generator(seed, "cutouts", t) for seed in seeds]
        seen = torch.cat([cutouts(p, preprocess.crop, g) for p, g in zip(pixels, random, strict=True)])
        # seen: (B * n, 3, S, S), the n cutouts of the first picture, then those of the second, ...
        mean, std = (seen.new_tensor(v)[:, None, None] for v in (preprocess.mean, preprocess.std))
        embeddings = F.normalize(self.scorer.image_encoder((seen - mean) / std), dim=1)
        chord = (embeddings - texts.repeat_interleave(len(seen) // len(texts), dim=0)).norm(dim=1)
        return (2 * (chord / 2).arcsin() ** 2).view(len(texts), -1).mean(dim=1)


def cutouts(picture: Tensor, side: int, g: torch.Generator) -> Tensor:
    """Random squares of a picture, (3, H, W), at the size that CLIP sees: (CUTOUTS, 3, side, side).

    None is smaller than `side`. Of a picture that is not larger than that there is but one, in its middle.
    """
    height, width = picture.shape[1:]
    most = min(height, width)
    chances, found = torch.rand(CUTOUTS, 3, generator=g).tolist(), []
    for chance in chances if most > side else [(0.0, 0.5, 0.5)]:
        size = min(most, side) + int(chance[0] * (most - side + 1))
        top, left = int(chance[1] * (height - size + 1)), int(chance[2] * (width - size + 1))
        cut = picture[None, :, top : top + size, left : left + size]
        found.append(F.interpolate(cut, (side, side), mode="bicubic", antialias=True))
    return torch.cat(found)
