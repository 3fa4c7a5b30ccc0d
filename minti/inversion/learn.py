"""Textual Inversion (Gal et al. 2022, arXiv 2208.01618): a new word for what a few photos show.

A latent diffusion model is trained to find the noise eps in a noisy latent x_t, given a prompt y (equation
1, where a_t is `Schedule.alphas_cumprod[t]`):

    L_LDM = E_{x0, y, eps, t} || eps - eps_theta(x_t, t, c(y)) ||^2,    x_t = sqrt(a_t) x0 + sqrt(1 - a_t) eps

Textual Inversion freezes such a model and gives a placeholder word, such as "<toy>", rows v of its own in the
text encoder's table of word vectors. Only these are learned, with the model's own loss, from photos x0 and
prompts y_v like "a photo of a <toy>" (equation 2):

    v* = argmin_v  E_{x0, y, eps, t} || eps - eps_theta(x_t, t, c(y_v)) ||^2

`diffusion_loss` is the loss, and `learn_word` the method in its plainest form. `Inversion` in `inversion.py`
takes the same steps, and is what the commands and `minti.learn` use.
"""

import torch
from torch import Tensor

from ..formats.concept import Concept
from ..model.stable_diffusion import StableDiffusion
from .batches import Settings, Word, sample_batch


def diffusion_loss(
    sd: StableDiffusion, x0: Tensor, eps: Tensor, t: Tensor, ids: Tensor, weight: Tensor, sizes: Tensor
) -> Tensor:
    """The loss of each of B samples.

    Args:
        sd: the model.
        x0: (B, C, h, w) float32, latents of photos, scaled to about unit variance.
        eps: (B, C, h, w) float32, standard normal noise.
        t: (B,) int64, time steps.
        ids: (B, 77) int64, token ids of the prompts.
        weight: (B, 1, h, w) float32, how much each latent counts, from the masks of the photos.
        sizes: (B, 6) float32, sizes and crops of the photos in pixels, which only SDXL is told.

    Returns:
        (B,) float32. Where the model predicts x0 or a velocity (see `Schedule.target`), that is the target.
    """
    x_t = sd.schedule.q_sample(x0, eps, t)
    context = sd.condition(ids, sizes)
    prediction = sd.predict(x_t, t, context)
    target = sd.schedule.target(x0, eps, t)
    error = weight * (prediction - target) ** 2  # (B, C, h, w)
    return error.mean(dim=(1, 2, 3)) / weight.mean(dim=(1, 2, 3)).clamp(min=1e-6)


def learn_word(sd: StableDiffusion, word: Word, settings: Settings) -> Concept:
    """Learn one word: draw a batch, compute the loss, its gradient, and a step of AdamW (arXiv 1711.05101).

    Of the settings, these are used: steps, batch_size, t_min, t_max, caption_dropout, betas, weight_decay.
    """
    rows = sd.add_concept(Concept(word.placeholder, word.init)).requires_grad_(True)
    optimizer = torch.optim.AdamW([rows], word.lr, settings.betas, weight_decay=settings.weight_decay)
    T = sd.schedule.config.num_train_timesteps
    for step in range(settings.steps):
        batch = sample_batch(word, settings, T, settings.batch_size, step).to(sd.device)
        x0, weight, sizes = word.latents_at(batch)
        ids = sd.tokenizer(batch.prompts).to(sd.device)
        loss = diffusion_loss(sd, x0, batch.eps, batch.t, ids, weight, sizes).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Concept(word.placeholder, rows.requires_grad_(False).cpu().clone(), widths=sd.widths)
