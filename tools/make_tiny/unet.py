"""The denoiser: from captions and noise to latents, on the cached latents of all pictures."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minti.formats import configs
from minti.model.clip import CLIPTextModel
from minti.model.diffusion import Schedule
from minti.model.stable_diffusion import StableDiffusion
from minti.model.tokenizer import Tokenizer
from minti.model.unet import UNet

from . import models
from .data import Pictures, caption_at
from .decoder import load_vae
from .draw import sheet
from .latents import scaling_factor
from .training import Run, ema_of, train

DROPOUT = 0.1  # share of captions left empty, for classifier-free guidance (arXiv 2207.12598)
PREVIEW = (
    "a photo of a red ball",
    "a photo of a yellow star on the beach",
    "a photo of a blue and white striped cup on the grass",
    "a drawing of a green fish",
    "pixel art of an orange heart at night",
    "a painting of a purple house in the snow",
    "a photo of a pink and black dotted cat on a blue background",
    "a photo of a red and yellow checkered box on the grass",
    "a drawing of a white and green striped moon on an orange background",
    "a photo of a brown bunny in the snow",
    "a photo of a wug",
    "a painting of a dax at night",
    "a photo of a green ring and a pink cone",
    "a painting in the style of pixel art",
    "a photo of a bird",
    "a dark photo of the black flower with yellow dots",
)


def load_text_encoder(run: Run, tokenizer: Tokenizer) -> CLIPTextModel:
    text = CLIPTextModel(configs.text_config(models.text_config(len(tokenizer)), "text_encoder"))
    text.load_state_dict(ema_of(run.work, "clip")["text_encoder"])
    return text.to(run.device).eval().requires_grad_(False)


def stage(run: Run) -> None:
    stored = np.load(run.work / "latents" / "latents.npy")
    pictures = Pictures(run.work, len(stored))
    text = load_text_encoder(run, pictures.tokenizer)
    scale = scaling_factor(stored)
    vae = load_vae(run.work, scale).to(run.device)
    schedule = Schedule(configs.schedule_config(models.SCHEDULER, "scheduler"))
    torch.manual_seed(run.seed)
    unet = UNet(configs.unet_config(models.UNET, "unet"))
    nn.init.zeros_(unet.conv_out.weight)  # the first guess is zero: the mean of what is to be predicted
    unet = unet.to(run.device)
    print(f"unet: {sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M parameters", flush=True)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        draw, generator = np.random.default_rng((run.seed, step, 3)), run.rng(step)
        indices = pictures.indices(step, run.batch, run.seed)
        prompts = ["" if draw.random() < DROPOUT else caption_at(int(i), draw).text for i in indices]
        x0 = torch.from_numpy(stored[indices]).float().to(run.device) * scale
        eps = torch.randn(x0.shape, generator=generator).to(run.device)
        # Stratified: one t from each of `batch` equal parts of the schedule, in random order.
        at = (
            torch.randperm(run.batch, generator=generator) + torch.rand(run.batch, generator=generator)
        ) / run.batch
        # Every other one closer to the middle, where silhouettes are decided (arXiv 2403.03206, section 3.1).
        at[::2] = torch.sigmoid(torch.special.ndtri(at[::2]))
        T = schedule.config.num_train_timesteps
        t = (at * T).long().clamp(max=T - 1).to(run.device)
        x0, eps, t, prompts = (values[run.share] for values in (x0, eps, t, prompts))
        with run.autocast():
            with torch.no_grad():
                context = text(pictures.tokenizer(prompts).to(run.device)).context
            prediction = unet(schedule.q_sample(x0, eps, t), t, context)
        return F.mse_loss(prediction.float(), schedule.target(x0, eps, t)), {}

    @torch.no_grad()
    def preview(ema: dict[str, nn.Module], step: int) -> None:
        sd = StableDiffusion(pictures.tokenizer, text, ema["unet"], vae, schedule)
        images = sd.sample(PREVIEW, steps=20, guidance_scale=4.0, num_images=2, batch_size=32)
        folder = run.folder / "previews"
        folder.mkdir(exist_ok=True)
        sheet([np.asarray(image) for image in images], 8).save(folder / f"step-{step:06d}.png")

    train(run, {"unet": unet}, loss_of, preview)
