"""The peers' side, on the modules of diffusers and transformers.

Training does what the textual inversion example of diffusers does, step by step and dtype by dtype: photos
are read and encoded again for every sample; the text encoder stays in float32, under autocast; the whole
table of word vectors has a gradient and is updated; all rows but the new ones are then put back. Left out, to
its advantage, is what accelerate does around all this.
"""

import warnings
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from minti.formats.checkpoint import DTYPES
from minti.inversion.batches import Batch
from minti.inversion.templates import OBJECT

from .jobs import Job
from .models import GUIDANCE_SCALE, PLACEHOLDER, PROMPT

diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()


def _pipeline(job: Job) -> StableDiffusionPipeline:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # dtype is not the name in all versions
        pipe = StableDiffusionPipeline.from_pretrained(job.checkpoint, torch_dtype=DTYPES[job.dtype])
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(job.device)


def load(job: Job) -> list[nn.Module]:
    pipe = _pipeline(job)
    return [pipe.text_encoder, pipe.unet, pipe.vae]


class Training:
    """See `jobs.Training`."""

    def __init__(self, job: Job) -> None:
        self.job, self.dtype = job, DTYPES[job.dtype]
        folder = Path(job.checkpoint)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=77)
        self.schedule = DDPMScheduler.from_pretrained(folder / "scheduler")
        text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
        self.text_encoder = text_encoder.to(job.device, torch.float32)  # whatever the files hold
        self.vae = AutoencoderKL.from_pretrained(folder / "vae").to(job.device, self.dtype)
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet").to(job.device, self.dtype)

        words = [PLACEHOLDER, *(f"{PLACEHOLDER}_{i}" for i in range(1, job.vectors))]
        self.tokenizer.add_tokens(words)
        self.placeholder = " ".join(words)
        self.ids = self.tokenizer.convert_tokens_to_ids(words)
        (init_id,) = self.tokenizer.encode(job.init_word, add_special_tokens=False)
        self.text_encoder.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
        for module in (self.vae, self.unet, self.text_encoder):
            module.requires_grad_(False)
        self.table = self.text_encoder.get_input_embeddings().weight.requires_grad_(True)
        self.table.data[self.ids] = self.table.data[init_id].clone()
        self.original = self.table.data.clone()
        self.optimizer = torch.optim.AdamW([self.table], lr=job.lr, weight_decay=0.01)
        self.scaler = torch.amp.GradScaler(torch.device(job.device).type, enabled=self.dtype == torch.float16)
        self.text_encoder.train()
        self.photos = sorted(Path(job.photos).iterdir())

    def _read(self, photo: int, mirrored: bool) -> Tensor:
        """A photo from its file, (3, S, S) float32 in [-1, 1]."""
        image = Image.open(self.photos[photo]).convert("RGB")
        image = image.resize((self.job.size, self.job.size), Image.Resampling.BICUBIC)
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image
        array = (np.array(image).astype(np.uint8) / 127.5 - 1.0).astype(np.float32)
        return torch.from_numpy(array).permute(2, 0, 1)  # (S, S, 3) -> (3, S, S)

    def _tokenize(self, prompt: str) -> Tensor:
        """Token ids, (77,)."""
        how = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return self.tokenizer(prompt, max_length=self.tokenizer.model_max_length, **how).input_ids[0]

    def step(self, samples: Batch | None = None) -> Tensor:
        n, device = self.job.batch_size, self.job.device
        if samples is None:
            views = torch.randint(2 * len(self.photos), (n,)).tolist()
            prompts = [OBJECT[i].replace("{}", self.placeholder) for i in torch.randint(len(OBJECT), (n,))]
        else:
            views = samples.view.tolist()
            prompts = [prompt.replace(PLACEHOLDER, self.placeholder) for prompt in samples.prompts]
        pixels = torch.stack([self._read(view // 2, view % 2 == 1) for view in views]).to(device)
        ids = torch.stack([self._tokenize(prompt) for prompt in prompts]).to(device)

        posterior = self.vae.encode(pixels.to(self.dtype)).latent_dist
        if samples is None:
            latents = posterior.sample().detach()
        else:
            latents = posterior.mean + posterior.std * samples.posterior_noise.to(posterior.mean)
        latents = latents * self.vae.config.scaling_factor
        noise = torch.randn_like(latents) if samples is None else samples.eps.to(latents)
        steps = self.schedule.config.num_train_timesteps
        t = torch.randint(0, steps, (n,), device=device) if samples is None else samples.t.to(device)
        noisy = self.schedule.add_noise(latents, noise, t)

        half = self.dtype != torch.float32
        with torch.autocast(torch.device(device).type, self.dtype, enabled=half):
            context = self.text_encoder(ids)[0]
        prediction = self.unet(noisy, t, context.to(self.dtype)).sample
        target = noise
        if self.schedule.config.prediction_type == "v_prediction":
            target = self.schedule.get_velocity(latents, noise, t)
        loss = F.mse_loss(prediction.float(), target.float())

        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        others = torch.ones(len(self.tokenizer), dtype=torch.bool)
        others[min(self.ids) : max(self.ids) + 1] = False
        with torch.no_grad():
            self.table[others] = self.original[others]
        loss.detach().item()  # for the progress bar
        return loss.detach()

    def rows(self) -> Tensor:
        return self.table.detach()[self.ids].cpu()


class Sampling:
    """See `jobs.Sampling`."""

    def __init__(self, job: Job) -> None:
        self.job, self.pipe = job, _pipeline(job)

    def latents(self) -> Tensor:
        side = self.job.size // self.pipe.vae_scale_factor
        shape = (1, self.pipe.unet.config.in_channels, side, side)
        seeds = range(self.job.batch_size)
        noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
        return self.pipe(
            [PROMPT] * self.job.batch_size,
            height=self.job.size,
            width=self.job.size,
            num_inference_steps=self.job.steps,
            guidance_scale=GUIDANCE_SCALE,
            latents=noise.to(self.job.device, DTYPES[self.job.dtype]),
            output_type="latent",
        ).images

    @torch.no_grad()
    def decode(self, latents: Tensor) -> None:
        pixels = self.pipe.vae.decode(latents / self.pipe.vae.config.scaling_factor).sample
        self.pipe.image_processor.postprocess(pixels, output_type="pil")
