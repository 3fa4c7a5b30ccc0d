"""minti's side: what `minti.train` and `minti.sample` do, without their files."""

from torch import Tensor, nn

import minti
from minti.formats.photos import load_photos
from minti.formats.views import make_views
from minti.inversion.batches import Batch, Settings, Word, sample_batch
from minti.inversion.inversion import Inversion
from minti.inversion.latents import encode_views
from minti.inversion.start import initial_rows
from minti.model import kernels

from .jobs import Job
from .models import GUIDANCE_SCALE, INIT_WORD, PLACEHOLDER, PROMPT


def load(job: Job) -> list[nn.Module]:
    sd = _load(job)
    return [sd.text_encoder, sd.unet, sd.vae]


def _load(job: Job) -> minti.StableDiffusion:
    sd = minti.load(job.checkpoint, device=job.device, dtype=job.dtype)
    kernels.use(job.attention, sd.device)
    return sd


class Training:
    """See `jobs.Training`. Which samples a step looks at follows from the seed, whatever it is given."""

    def __init__(self, job: Job, compiled: bool = False, checkpointing: bool = False) -> None:
        sd = _load(job)
        sd.unet.gradient_checkpointing = checkpointing
        latents = encode_views(sd, make_views(load_photos(job.photos), job.size, flip=True))
        sd.vae.to("cpu")
        rows = initial_rows(sd, "word", INIT_WORD, job.vectors)
        names = [PLACEHOLDER, *(f"<toy-{i}>" for i in range(1, job.concepts))]
        words = [Word(name, rows, latents, seed=i) for i, name in enumerate(names)]
        self.inversion = Inversion(sd, words, Settings(batch_size=job.batch_size), compiled=compiled)

    def samples(self) -> Batch:
        """What the next step will look at."""
        i = self.inversion
        total = i.sd.schedule.config.num_train_timesteps
        return sample_batch(i.words[0], i.settings, total, i.settings.batch_size, i.step_count)

    def step(self, samples: Batch | None = None) -> Tensor:
        return self.inversion.step()

    def rows(self) -> Tensor:
        return self.inversion.concept(0).vectors


class Sampling:
    """See `jobs.Sampling`."""

    def __init__(self, job: Job, compiled: bool = False) -> None:
        self.job = job
        self.sd = _load(job)
        if compiled:
            kernels.compile_denoiser(self.sd.unet)

    def latents(self) -> Tensor:
        seeds = range(self.job.batch_size)
        options = {"steps": self.job.steps, "guidance_scale": GUIDANCE_SCALE, "size": self.job.size}
        *_, latents = self.sd.denoise([PROMPT] * len(seeds), seeds, **options)
        return latents

    def decode(self, latents: Tensor) -> None:
        self.sd.decode_latents(latents)
