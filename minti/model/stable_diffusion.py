"""The parts of a Stable Diffusion put together: words to context, noise to latents, latents to pictures."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import InputError, check_number
from .canvas import BlankCanvas
from .checks import LearnedWord, check_options, check_output, check_size
from .conditioning import Conditioning, encode_each
from .diffusion import Schedule
from .embedding import TokenEmbedding
from .fitting import fit_word, tables_of
from .tokenizer import Tokenizer
from .unclip import ImagePrompt, ImagePrompter
from .unet import UNet
from .vae import VAE

Predict = Callable[[Tensor, int], Tensor]  # (x_t, t) -> the UNet's output, (B, C, h, w) float32


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
    image_prompter: ImagePrompter | None = None  # of unCLIP only

    def __post_init__(self) -> None:
        self.canvas = BlankCanvas(self.unet, self.vae)  # which a UNet for inpainting sees beside x_t

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
        return tables_of(self.text_encoder)

    @property
    def widths(self) -> dict[str, int]:
        """The parts of a word's vectors and their widths, see `Concept`; {} where they have no parts."""
        return {table.key: table.weight.shape[1] for table in self.tables if table.key}

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
        self.text_encoder, vectors = fit_word(concept, self.text_encoder, self.unet)
        tables = self.tables
        first = len(tables[0].weight) + len(tables[0].rows)
        ids = range(first, first + len(vectors))
        self.tokenizer.add_placeholder(concept.placeholder, ids, replace=replace)
        rows = nn.Parameter(vectors.to(self.device, torch.float32, copy=True), requires_grad=False)
        for table in tables:
            table.words.append(rows)
        return rows

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> Tensor:
        """Prompts to what the UNet attends to, (B, 77, D)."""
        return self.text_encoder(self.tokenizer(prompts).to(self.device)).context

    def condition(self, ids: Tensor, sizes: Tensor) -> Conditioning:
        """What the UNet is told of token ids, (B, 77), and of sizes and crops, (B, 6)."""
        text = self.text_encoder(ids.to(self.device))
        has_sizes = self.unet.add_embedding is not None
        return Conditioning(text.context, (text.pooled, sizes.to(self.device)) if has_sizes else None)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> list[Image.Image]:
        """Latents of about unit variance, (B, C, h, w), to pictures.

        Raises:
            InputError: the autoencoder's output is not finite.
        """
        z = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        # Few at a time: for a large picture the decoder takes more memory than everything before it.
        pixels = torch.cat([self.vae.decode(part) for part in z.split(max(1, 64**2 // z[0, 0].numel()))])
        check_output(pixels, "autoencoder", self)
        array = pixels.float().div(2).add(0.5).clamp(0, 1).mul(255).round().byte()
        array = array.permute(0, 2, 3, 1).cpu().numpy()  # (B, 3, H, W) -> (B, H, W, 3)
        return [Image.fromarray(pixels) for pixels in array]

    def sample(
        self, prompt: str | Sequence[str], *, seed: int = 0, num_images: int = 1, **options: Any
    ) -> list[Image.Image]:
        """Make pictures, `num_images` of each prompt, in order. Image i of each prompt has seed `seed + i`.

        Args:
            prompt: one prompt or several.
            options: `steps`, `guidance_scale`, `negative_prompt`, `eta`, `size`, `batch_size`,
                `long_prompts`, `image_prompt`; see `sample_each`, `denoise`, `guided` and `encode_each`.
        """
        check_number("num_images", num_images, int, 1)
        check_number("seed", seed, int, 0)
        prompts = prompt if isinstance(prompt, list | tuple) else [prompt]
        each = [(p, seed + i) for p in prompts for i in range(num_images)]
        return list(self.sample_each(each, **options))

    def sample_each(
        self,
        each: Sequence[tuple[str, int]],
        *,
        batch_size: int = 4,
        on_step: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> Iterator[Image.Image]:
        """Make pictures one after another.

        Args:
            each: the prompt and the seed of each picture.
            batch_size: pictures made at a time: memory and speed, the pictures alike but for rounding.
            on_step: called after each DDIM step of each batch.
            options: those of `denoise`.
        """
        check_number("batch_size", batch_size, int, 1)
        for i in range(0, len(each), batch_size):
            prompts, seeds = zip(*each[i : i + batch_size], strict=True)
            yield from self.decode_latents(last(self.denoise(prompts, seeds, **options), on_step))

    @torch.no_grad()
    def denoise(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int = 50,
        eta: float = 0.0,
        size: int | tuple[int, int] | None = None,
        sampler: Callable[[Predict, Tensor], Iterator[Tensor]] | None = None,
        image_prompt: ImagePrompt | None = None,
        **guidance: Any,
    ) -> Iterator[Tensor]:
        """Turn noise into latents, one picture for each prompt and its seed, yielding every x_t on the way.

        Args:
            steps: how many DDIM steps to take.
            eta: 0 is deterministic, 1 has the noise of DDPM.
            size: pixels, or (width, height), see `check_size`; by default what the model was trained on.
            sampler: another way from noise to picture than `Schedule.ddim_sample`. It is given the output of
                `guided` and the noise x_T, (B, C, h, w) float32, and yields every x_t.
            image_prompt: pictures that unCLIP is shown beside the prompt, from `ImagePrompter.prompt`.
            guidance: `guidance_scale`, `negative_prompt` and others of `guided`.

        Yields:
            (B, C, h, w) float32, `steps` times; the last are the finished latents.

        Raises:
            InputError: an option is impossible; or the UNet's first output is not finite.
        """
        check_options(prompts, seeds, {"steps": steps, "eta": eta, **guidance})
        if image_prompt and self.image_prompter is None:
            raise InputError(f"image_prompt: {self.source} is no unCLIP and sees no pictures; leave it out")
        (width, height), f = self.check_size(size), self.vae.config.downscale
        shape = (1, self.vae.config.latent_channels, height // f, width // f)
        generators = [torch.Generator().manual_seed(int(s)) for s in seeds]
        shown = image_prompt and image_prompt(generators)  # drawn before the latents, as diffusers does
        x_T = torch.cat([torch.randn(shape, generator=g) for g in generators]).to(self.device)
        times = [t for t, _ in self.schedule.timesteps(steps)]
        predict = self.guided(prompts, times, (width, height), shown=shown, **guidance)
        ddim = self.schedule.ddim_sample(predict, x_T, steps, eta, generators)
        yield from ddim if sampler is None else sampler(predict, x_T)

    def guided(
        self,
        prompts: Sequence[str],
        times: Sequence[int],
        size: tuple[int, int],
        *,
        negative_prompt: str | None = None,
        guidance_scale: float = 7.5,
        **conditions: Any,
    ) -> Predict:
        """The UNet's output for prompts with classifier-free guidance (Ho and Salimans, arXiv 2207.12598).

        With a guidance scale w above 1 the UNet is asked twice, in one batch, with the prompt and without,
        and eps = eps_without + w (eps_with - eps_without): their equation 6, with w - 1 for w.

        Args:
            prompts: one for each picture.
            times: the time steps that it will be asked at.
            size: width and height of the pictures, in pixels.
            negative_prompt: what to steer away from, instead of from no prompt; unused at scales up to 1.
            guidance_scale: 1 or less is the model as it is; more follows the prompt closer.
            conditions: further options of `encode_each`, such as `long_prompts`.
        """
        guided = guidance_scale > 1
        texts = [negative_prompt] * len(prompts) + list(prompts) if guided else list(prompts)
        how = {"zero_empty": self.zero_empty_prompt, **conditions}
        conditioning = encode_each(texts, self.tokenizer, self.condition, size, **how)
        # All that depends on the prompts or on the time, but not on x_t.
        context_kv = self.unet.embed_context(conditioning.context)
        time_shifts = conditioning.time_shifts(self.unet, times)
        checked = False

        def predict(x_t: Tensor, t: int) -> Tensor:
            nonlocal checked
            output = self.unet.denoise(self.unet_input(x_t), time_shifts[t], context_kv)
            if not checked:  # the first output only, since a check makes a GPU wait
                check_output(output, "UNet", self)
                checked = True
            if not guided:
                return output.float()
            without, with_prompt = output.float().chunk(2)  # (2B, C, h, w) -> (B, C, h, w) each
            return without + guidance_scale * (with_prompt - without)

        return predict

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The UNet's output for noisy latents x_t, (B, C, h, w), at time steps t, (B,).

        Returns:
            (B, C, h, w) float32: eps, v or x0, see `Schedule.target`.
        """
        return self.unet(self.unet_input(x_t), t, *conditioning).float()

    def unet_input(self, x_t: Tensor) -> Tensor:
        """Noisy latents in the model's dtype, with a canvas beside them where the UNet is for inpainting."""
        return self.canvas.beside(x_t.to(self.dtype))

    def check_size(self, size: int | tuple[int, int] | None) -> tuple[int, int]:
        """(width, height) in pixels, filled in. Raises InputError unless multiples of `downscale`."""
        return check_size(size, self.image_size, self.vae.config.downscale)


def last(way: Iterator[Tensor], on_step: Callable[[], None]) -> Tensor:
    """The last of the latents, (B, C, h, w), that a sampler goes through; `on_step` is called after each."""
    for x_t in way:
        latents = x_t
        on_step()
    return latents
