"""What the rivals of a learned word need: tuned UNets, samplers that CLIP guides, and image prompts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from safetensors.torch import save
from torch import Tensor, nn

from ..cli.processes import Processes
from ..cli.progress import Progress
from ..edit.clip_guidance import ClipGuidance
from ..edit.inverting import encode_mean
from ..edit.region import as_tensor
from ..formats.atomic import write_atomically
from ..formats.photos import load_photos
from ..formats.views import make_views
from ..inversion.batches import Word
from ..inversion.from_photos import Picture
from ..inversion.latents import encode_views
from ..inversion.templates import load_templates
from ..judge.picture_jobs import OnStep, PictureJob, Protocol, file_name
from ..judge.scorer import Scorer
from ..model.stable_diffusion import StableDiffusion
from ..runs.folder import read_state
from ..tune.tuner import Tuner, TuneSettings, choose_weights
from .recipe import Request
from .ways import PLAIN


class Rivals:
    """Makes pictures in the ways that requests ask for.

    Args:
        folder: the folder for `tuned/`, the weights of the tuned UNets.
    """

    def __init__(self, sd: StableDiffusion, scorer: Scorer, folder: Path) -> None:
        self.sd, self.scorer, self.folder = sd, scorer, folder

    def job(self, job: PictureJob, request: Request, prompt: str, protocol: Protocol) -> PictureJob:
        """A job that makes its pictures as the request has it, instead of plainly from the prompt."""
        if request.way == PLAIN:
            return job
        make = job.make
        if request.way.clip_guidance or request.way.from_photo or request.way.show_photos:
            make = partial(self._sample, request, prompt, protocol)
        if request.way.tune:
            make = partial(self._with_tuned, request, make)
        way = {key: value for key, value in asdict(request.way).items() if key != "guidance"}
        return replace(job, inputs=job.inputs | {"way": way}, make=make)

    def _sample(self, request: Request, prompt: str, p: Protocol, on_step: OnStep) -> list[Image.Image]:
        way, seeds, size = request.way, range(p.seed, p.seed + p.num_images), self.sd.check_size(p.size)
        how: dict[str, Any] = {"steps": p.steps, "guidance_scale": p.guidance_scale, "eta": p.eta}
        how |= {"size": size, "batch_size": p.batch_size, "on_step": on_step}
        photos, z0 = load_photos(request.concept.images), None
        if way.show_photos:
            how["image_prompt"] = self.sd.image_prompter.prompt([photo.open() for photo in photos])
        if way.from_photo:
            z0 = encode_mean(self.sd, as_tensor(ImageOps.fit(photos[0].open(), size)))
        if way.clip_guidance or way.from_photo:
            texts = self.scorer.embed_texts([prompt]).expand(p.num_images, -1)
            more = {"scale": way.clip_guidance, "z0": z0}
            how["sampler"] = ClipGuidance(self.sd, p.steps, seeds, self.scorer, texts, **more)
        return list(self.sd.sample_each([(prompt, seed) for seed in seeds], **how))

    def tune(self, asked: Sequence[tuple[Request, str]], processes: Processes) -> None:
        """Tune a UNet for each request that asks for one, unless that is done; processes share out the work.

        Args:
            asked: all requests, and what prompts call the concept in each.
        """
        todo = {self._path(r): (r, word) for r, word in asked if r.way.tune and not self._path(r).exists()}
        mine = processes.share(list(todo.items()))
        steps = sum(request.way.tune_steps for _, (request, _) in mine)
        with closing(Progress(steps, "tuning step", estimate_after=10)) as progress:
            for path, (request, word) in mine:
                with self._restored():
                    weights = self._tuned(request, word, progress.step)
                write_atomically(path, save(weights))
        processes.wait()

    def _path(self, request: Request) -> Path:
        """The file of tuned weights, which are the same at all guidance scales."""
        same = replace(request, way=replace(request.way, guidance=None))
        return self.folder / "tuned" / f"{file_name(same.key)}.safetensors"

    def _tuned(self, request: Request, word: str, on_step: OnStep) -> dict[str, Tensor]:
        """The weights of a UNet that is tuned to the photos of a concept, by name."""
        way, photos, side = request.way, load_photos(request.concept.images), self.sd.image_size[0]
        latents, none, prior = (
            encode_views(self.sd, make_views(photos, side, flip=True)),
            torch.empty(0),
            None,
        )
        if request.variant:
            templates = load_templates(request.variant.templates)
            instance = Word(word, none, latents, templates, [photo.caption for photo in photos])
        else:
            instance = Word("", none, latents, [f"a photo of {word}"])
            of_class = f"a photo of {request.concept.init_word}"
            images = self.sd.sample(of_class, steps=20, guidance_scale=4, num_images=way.class_images)
            pictures = [Picture(Path("a picture of the class"), image=image) for image in images]
            class_latents = encode_views(self.sd, make_views(pictures, side, flip=True))
            prior = Word("", none, class_latents, [of_class])
        weights = choose_weights(self.sd, "unet")
        tuner = Tuner(self.sd, weights, instance, prior, TuneSettings(lr=way.tune_lr))
        for _ in range(way.tune_steps):
            tuner.step()
            on_step()
        return {key: w.detach().cpu().clone() for key, w in tuner.weights["unet"].items()}

    def _with_tuned(
        self, request: Request, make: Callable[[OnStep], list[Image.Image]], on_step: OnStep
    ) -> list[Image.Image]:
        """The pictures of a tuned UNet. Raises InputError if its file is damaged."""
        with self._restored() as parameters:
            for key, weight in read_state(self._path(request)).items():
                parameters[key].copy_(weight)
            return make(on_step)

    @contextmanager
    def _restored(self) -> Iterator[dict[str, nn.Parameter]]:
        """The weights of the UNet, which are afterwards what they were."""
        parameters = dict(self.sd.unet.named_parameters())
        before = {key: p.detach().clone() for key, p in parameters.items()}
        try:
            yield parameters
        finally:
            for key, p in parameters.items():
                p.requires_grad_(False).grad = None
                p.copy_(before[key])
