"""The parts of a Stable Diffusion put together: words to context, noise to latents, latents to pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import check_number
from .checks import check_options, check_output, check_size, check_weights, check_width
from .conditioning import Conditioning, blank_canvas, encode_each, encode_parts
from .diffusion import Schedule
from .embedding import LearnedWord, TokenEmbedding
from .kernels import compile_for
from .tokenizer import Tokenizer
from .unet import UNet
from .vae import VAE


@dataclass
class StableDiffusion:
    """A text-to-image latent diffusion model.

    All modules are frozen and share one device and dtype, except for an autoencoder that needs float32.
    """

    tokenizer: Tokenizer
    text_encoder: nn.Module  # token ids to a `TextOutput`
    unet: UNet
    vae: VAE
    schedule: Schedule
    source: str = "the checkpoint"  # where it was loaded from, for messages
    zero_empty_prompt: bool = False  # was trained with zeros for no prompt, instead of the prompt ""
    _canvas: dict[tuple[int, ...], Tensor] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @property
    def image_size(self) -> tuple[int, int]:
        """Width and height in pixels of the pictures the model was trained on."""
        height, width = self.unet.config.sample_size
        return width * self.vae.config.downscale, height * self.vae.config.downscale

    @property
    def tables(self) -> list[TokenEmbedding]:
        """The table of word vectors of each text encoder; a word has columns in every one of them."""
        return [module for module in self.text_encoder.modules() if isinstance(module, TokenEmbedding)]

    @property
    def widths(self) -> tuple[int, ...]:
        """The columns of a word's vectors for each text encoder; () where there is one encoder."""
        widths = tuple(table.weight.shape[1] for table in self.tables)
        return widths if len(widths) > 1 else ()

    @property
    def vocabulary(self) -> Tensor:
        """The checkpoint's own word vectors, (vocab_size, D), without any learned ones."""
        weights = [table.weight for table in self.tables]
        return weights[0] if len(weights) == 1 else torch.cat(weights, dim=1)

    def look_up(self, ids: Tensor) -> Tensor:
        """The vectors that the text encoders begin with, (B, L) -> (B, L, D)."""
        return torch.cat([table(ids) for table in self.tables], dim=-1)

    def add_concept(self, concept: LearnedWord, *, replace: bool = False) -> nn.Parameter:
        """Teach the model a learned word: it can be used in every prompt from now on.

        Args:
            replace: allow a word that has a meaning already, see `Tokenizer.add_placeholder`.

        Returns:
            The (num_vectors, D) rows that stand for the word, for whoever wants to train them further.

        Raises:
            InputError: the word was learned for another kind of model, or its name is taken.
        """
        tables = self.tables
        check_width(concept, sum(table.weight.shape[1] for table in tables))
        first = len(tables[0].weight) + len(tables[0].rows)
        ids = range(first, first + len(concept.vectors))
        self.tokenizer.add_placeholder(concept.placeholder, ids, replace=replace)
        rows = nn.Parameter(concept.vectors.to(self.device, torch.float32, copy=True), requires_grad=False)
        for table in tables:
            table.words.append(rows)
        return rows

    def compile(self) -> None:
        """Make sampling faster, after a first step that takes minutes."""
        self.unet.denoise = compile_for(self.device, self.unet.denoise)

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> Tensor:
        """Prompts to what the UNet attends to, (B, 77, D)."""
        return self.text_encoder(self.tokenizer(prompts).to(self.device)).context

    def condition(self, ids: Tensor, sizes: Tensor) -> Conditioning:
        """What the UNet is told of token ids, (B, 77), and of sizes and crops, (B, 6)."""
        text = self.text_encoder(ids)
        return Conditioning(text.context, None if self.unet.add_embedding is None else (text.pooled, sizes))

    def check_weights(self) -> None:
        """Raise InputError with the name of a weight that is NaN or infinite, be it only in this dtype."""
        check_weights(self._modules, self.source)

    @property
    def _modules(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.text_encoder, "unet": self.unet, "vae": self.vae}

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> list[Image.Image]:
        """Latents of about unit variance, (B, C, h, w), to pictures.

        Raises:
            InputError: the autoencoder's output is not finite.
        """
        z = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        # Few at a time: for a large picture the decoder takes more memory than everything before it.
        pixels = torch.cat([self.vae.decode(part) for part in z.split(max(1, 64**2 // z[0, 0].numel()))])
        check_output(pixels, "autoencoder", self._modules, self.source)
        array = pixels.float().div(2).add(0.5).clamp(0, 1).mul(255).round().byte()
        array = array.permute(0, 2, 3, 1).cpu().numpy()  # (B, 3, H, W) -> (B, H, W, 3)
        return [Image.fromarray(pixels) for pixels in array]

    def sample(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | None = None,
        steps: int = 50,
        guidance_scale: float = 7.5,
        eta: float = 0.0,
        seed: int = 0,
        num_images: int = 1,
        batch_size: int = 4,
        size: int | tuple[int, int] | None = None,
        long_prompts: bool = False,
    ) -> list[Image.Image]:
        """Make pictures, `num_images` of each prompt, in order. Image i of each prompt has seed `seed + i`.

        Args:
            prompt: one prompt or several.
            negative_prompt: what to steer away from, instead of from no prompt.
            steps: DDIM steps.
            guidance_scale: 1 is the model as it is; more follows the prompt closer (see `denoise`).
            eta: 0 is deterministic, 1 has the noise of DDPM.
            batch_size: pictures made at a time; changes memory and speed, not the pictures.
            size: pixels, or (width, height), multiples of 8; by default what the model was trained on.
            long_prompts: encode prompts of more than 75 tokens in parts, instead of cutting them off.

        Returns:
            List of pictures in RGB.
        """
        check_number("num_images", num_images, int, 1)
        check_number("seed", seed, int, 0)
        options = {"steps": steps, "guidance_scale": guidance_scale, "eta": eta, "size": size}
        options |= {"long_prompts": long_prompts}
        prompts = prompt if isinstance(prompt, list | tuple) else [prompt]
        each = [(p, seed + i) for p in prompts for i in range(num_images)]
        return list(self.sample_each(each, negative_prompt=negative_prompt, batch_size=batch_size, **options))

    def sample_each(
        self,
        each: Sequence[tuple[str, int]],
        *,
        batch_size: int = 4,
        on_step: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> Iterator[Image.Image]:
        """Make pictures one after another, `batch_size` at a time.

        Args:
            each: the prompt and the seed of each picture.
            on_step: called after each DDIM step of each batch.
            options: those of `denoise`.
        """
        check_number("batch_size", batch_size, int, 1)
        for i in range(0, len(each), batch_size):
            prompts, seeds = zip(*each[i : i + batch_size], strict=True)
            for x_t in self.denoise(prompts, seeds, **options):
                latents = x_t
                on_step()
            yield from self.decode_latents(latents)

    @torch.no_grad()
    def denoise(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        negative_prompt: str | None = None,
        steps: int = 50,
        guidance_scale: float = 7.5,
        eta: float = 0.0,
        size: int | tuple[int, int] | None = None,
        size_condition: Sequence[int] | None = None,
        long_prompts: bool = False,
        x_T: Tensor | None = None,
        beside: Sequence[Tensor] | None = None,
        sampler: Callable[[Callable[[Tensor, int], Tensor], Tensor], Iterator[Tensor]] | None = None,
    ) -> Iterator[Tensor]:
        """Turn noise into latents, one picture for each prompt and its seed, yielding every x_t on the way.

        With a guidance scale w above 1 the UNet is asked twice, in one batch, with the prompt and without,
        and eps = eps_without + w (eps_with - eps_without): classifier-free guidance (arXiv 2207.12598).

        Args:
            size_condition: for SDXL, the crop that the pictures should look like, in pixels: height and width
                of the original, top and left of the crop, its height and width; by default all of `size`.
            x_T: (B, C, h, w) float32 noise to start from, instead of that of the seeds.
            beside: what an inpainting UNet sees beside x_t, instead of `inpainting_channels`.
            sampler: (predict, x_T) -> every x_t, instead of `Schedule.ddim_sample`. Others as in `sample`.

        Yields:
            (B, C, h, w) float32, `steps` times; the last are the finished latents.

        Raises:
            InputError: the size does not fit; or the UNet's first output is not finite.
        """
        options = {"steps": steps, "guidance_scale": guidance_scale, "eta": eta}
        check_options([*prompts, negative_prompt or ""], seeds, options)
        width, height = self.check_size(size)
        f, device = self.vae.config.downscale, self.device
        shape = (1, self.vae.config.latent_channels, height // f, width // f)
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        x_T = torch.cat([torch.randn(shape, generator=g) for g in generators]) if x_T is None else x_T
        x_T = x_T.to(device)
        guided = guidance_scale > 1
        texts = [negative_prompt] * len(prompts) + list(prompts) if guided else list(prompts)
        sizes = torch.tensor([size_condition or (height, width, 0, 0, height, width)], device=device)
        context, added = encode_each(
            texts,
            lambda text: encode_parts(self.tokenizer, text, long_prompts).to(device),
            lambda ids: self.condition(ids, sizes.expand(len(ids), -1)),
            zero_empty=self.zero_empty_prompt,
        )
        # All that depends on the prompts or on the time, for all steps at once.
        context_kv = self.unet.embed_context(context)
        times = [t for t, _ in self.schedule.timesteps(steps)]
        rows = 1 if added is None else len(texts)  # of time_shifts at each step
        added = added and tuple(condition.repeat(steps, 1) for condition in added)
        t = torch.tensor(times, device=device).repeat_interleave(rows)
        time_shifts = dict(zip(times, self.unet.embed_time(t, added).split(rows), strict=True))
        extra = self.inpainting_channels(x_T) if beside is None else beside

        def predict(x_t: Tensor, t: int) -> Tensor:
            x = torch.cat([x_t.to(self.dtype), *extra], dim=1)
            x = torch.cat([x, x]) if guided else x
            output = self.unet.denoise(x, time_shifts[t], context_kv)
            if t == times[0]:
                check_output(output, "UNet", self._modules, self.source)
            if not guided:
                return output.float()
            without, with_prompt = output.float().chunk(2)
            return without + guidance_scale * (with_prompt - without)

        ddim = self.schedule.ddim_sample(predict, x_T, steps, eta, generators)
        yield from sampler(predict, x_T) if sampler else ddim

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The UNet's output for noisy latents.

        Args:
            x_t: (B, C, h, w), converted to the model's dtype.
            t: (B,) time steps.
            conditioning: from `condition`.

        Returns:
            (B, C, h, w) float32: eps, v or x0, see `Schedule.target`.
        """
        x = torch.cat([x_t.to(self.dtype), *self.inpainting_channels(x_t)], dim=1)
        return self.unet(x, t, *conditioning).float()

    @torch.no_grad()
    def inpainting_channels(self, x: Tensor) -> list[Tensor]:
        """What the UNet sees beside noisy latents x, (B, C, h, w): nothing, unless it was made to inpaint."""
        if self.unet.config.in_channels == x.shape[1]:
            return []
        if x.shape[2:] not in self._canvas:
            self._canvas[x.shape[2:]] = blank_canvas(self.vae, x[:1], self.dtype)
        return [self._canvas[x.shape[2:]].expand(len(x), -1, -1, -1)]

    def check_size(self, size: int | tuple[int, int] | None) -> tuple[int, int]:
        """(width, height) in pixels, filled in and checked. Raises InputError unless multiples of 8."""
        return check_size(size, self.image_size, self.vae.config.downscale)
