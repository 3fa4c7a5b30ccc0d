"""The denoiser: from captions and noise to latents, on the cached latents and contexts of all pictures."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minti.formats import configs
from minti.model.diffusion import Schedule
from minti.model.stable_diffusion import StableDiffusion
from minti.model.unet import UNet

from . import models
from .contexts import VARIANTS, bare_names, stored_contexts
from .data import Pictures
from .decoder import load_vae
from .draw import sheet
from .latents import scaling_factor, stored_latents
from .text import load_text_encoder
from .training import Run, ema_of, read, train

DROPOUT = 0.1  # share of captions left empty, for classifier-free guidance (arXiv 2207.12598)
PREVIEW = (
    "a photo of a red ball",
    "a photo of a blue and white striped cup on the grass",
    "a drawing of a green fish",
    "pixel art of an orange heart at night",
    "a photo of a pink and black dotted cat on a blue background",
    "a photo of a red and yellow checkered box on the grass",
    "a photo of a brown bunny in the snow",
    "a photo of a wug",
    "a painting of a dax at night",
    "a photo of a zorp on the beach",
    "a photo of a green and purple striped one-eyed creature",
    "a drawing of a red plant with a cap in the snow",
    "a photo of a blue and yellow dotted vessel with a spout",
    "a photo of an orange and black checkered machine with an antenna",
    "a photo of a green ring and a pink cone",
    "a photo of a bird",
)


class Batches:
    """What each step trains on, a function of the step alone; read one step ahead by a thread. Of several
    processes each has its share.

    Every other picture comes with a caption that says no more of a thing's look than its name does, as a word
    that was learned says it.

    Attributes:
        latents: (N, 4, 16, 16) float16.
        contexts: (N, 3, 77, 128) float16.
        empty: (77, 128), the context of the empty caption.
        bare: (K, 2), see `bare_names`.
    """

    def __init__(
        self, run: Run, latents: np.ndarray, contexts: np.ndarray, empty: Tensor, bare: np.ndarray
    ) -> None:
        self.run, self.latents, self.contexts, self.empty = run, latents, contexts, empty.cpu()
        self.count = min(len(latents), len(contexts))
        self.bare = bare[bare[:, 0] < self.count]
        self.pool, self.next = ThreadPoolExecutor(1), None

    def read(self, step: int) -> tuple[Tensor, ...]:
        """(B, 4, 16, 16) latents and noise, (B,) times in [0, 1), (B, 77, 128) contexts."""
        run = self.run
        draw, generator = np.random.default_rng((run.seed, step, 3)), run.rng(step)
        epoch, i = divmod(step, self.count // run.batch)
        order = np.random.default_rng((run.seed, epoch)).permutation(self.count)
        shown = order[i * run.batch : (i + 1) * run.batch]
        shown = np.stack([shown, draw.integers(len(VARIANTS), size=run.batch)], axis=1)
        shown[::2] = self.bare[draw.integers(len(self.bare), size=len(shown[::2]))]
        rows, which = shown[shown[:, 0].argsort()].T
        context = torch.from_numpy(self.contexts[rows, which]).float()
        context[torch.from_numpy(draw.random(run.batch) < DROPOUT)] = self.empty
        x0 = torch.from_numpy(self.latents[rows]).float()
        eps = torch.randn(x0.shape, generator=generator)
        # Stratified: one t from each of `batch` equal parts of the schedule, in random order.
        parts = torch.randperm(run.batch, generator=generator)
        at = (parts + torch.rand(run.batch, generator=generator)) / run.batch
        # Every other one closer to the middle, where silhouettes are decided (arXiv 2403.03206, section 3.1).
        at[::2] = torch.sigmoid(torch.special.ndtri(at[::2]))
        rank, world = run.processes.rank, run.processes.world
        return tuple(values.chunk(world)[rank] for values in (x0, eps, at, context))

    def __call__(self, step: int) -> list[Tensor]:
        ready = self.next if self.next and self.next[0] == step else None
        values = ready[1].result() if ready else self.read(step)
        self.next = step + 1, self.pool.submit(self.read, step + 1)
        return [value.to(self.run.device, non_blocking=True) for value in values]


def load_model(work: Path, device: torch.device) -> StableDiffusion:
    """The whole model, as the stages left it."""
    tokenizer = Pictures(work).tokenizer
    unet = UNet(configs.unet_config(models.UNET, "unet"))
    unet.load_state_dict(ema_of(work, "unet")["unet"])
    vae = load_vae(work, scaling_factor(stored_latents(work))).to(device)
    schedule = Schedule(configs.schedule_config(models.SCHEDULER, "scheduler"))
    return StableDiffusion(
        tokenizer, load_text_encoder(work, tokenizer, device), unet.to(device).eval(), vae, schedule
    )


def stage(run: Run) -> None:
    latents, pictures = stored_latents(run.work), Pictures(run.work)
    text = load_text_encoder(run.work, pictures.tokenizer, run.device)
    scale = scaling_factor(latents)
    vae = load_vae(run.work, scale).to(run.device)
    schedule = Schedule(configs.schedule_config(models.SCHEDULER, "scheduler"))
    torch.manual_seed(run.seed)
    unet = UNet(configs.unet_config(models.UNET, "unet"))
    nn.init.zeros_(unet.conv_out.weight)  # the first guess is zero: the mean of what is to be predicted
    if run.start:
        unet.load_state_dict(read(run.start / "unet" / "diffusion_pytorch_model.safetensors"))
    unet = unet.to(run.device, memory_format=torch.channels_last)
    forward = torch.compile(unet) if run.device.type == "cuda" else unet
    with torch.no_grad():
        empty = text(pictures.tokenizer([""]).to(run.device)).context[0]
    batches = Batches(run, latents, stored_contexts(run.work), empty, bare_names(pictures))
    last = schedule.config.num_train_timesteps - 1
    print(f"unet: {sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M parameters", flush=True)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        x0, eps, at, context = batches(step)
        x0 = (x0 * scale).contiguous(memory_format=torch.channels_last)
        t = (at * (last + 1)).long().clamp(max=last)
        with run.autocast():
            prediction = forward(schedule.q_sample(x0, eps, t), t, context)
        return F.mse_loss(prediction.float(), schedule.target(x0, eps, t)), {}

    @torch.no_grad()
    def preview(ema: dict[str, nn.Module], step: int) -> None:
        sd = StableDiffusion(pictures.tokenizer, text, ema["unet"], vae, schedule)
        images = sd.sample(PREVIEW, steps=20, guidance_scale=4.0, num_images=2, batch_size=32)
        folder = run.folder / "previews"
        folder.mkdir(exist_ok=True)
        sheet([np.asarray(image) for image in images], 8).save(folder / f"step-{step:06d}.png")

    train(run, {"unet": unet}, loss_of, preview, every=250)
