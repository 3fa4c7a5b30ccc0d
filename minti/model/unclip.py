"""What Stable unCLIP has and other models have not: it is shown pictures, by way of CLIP.

The UNet of DALL-E 2 (unCLIP, Ramesh et al. 2022, arXiv 2204.06125, section 2.1) sees the CLIP embedding of a
picture, added to the embedding of the time step. Stable unCLIP is Stable Diffusion 2.1, trained further so.
Noise is mixed into the embedding e, as into latents, and the UNet is told how much (the noise level n):

    (sqrt(a_n) (e - mean) / std + sqrt(1 - a_n) eps) std + mean,  beside the cosines and sines of n

with a schedule a_n of its own, and the mean and std of such embeddings. Even the level 0 has some noise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import check_number
from .blocks import TimeEmbedding, timestep_embedding
from .diffusion import Schedule
from .image_encoder import CLIPVisionModel

# Of each picture's generator, what the UNet is shown: n generators -> (n, 2P).
ImagePrompt = Callable[[Sequence[torch.Generator]], Tensor]


class ClassEmbedding(TimeEmbedding):
    """What unCLIP adds to the embedding of the time step; diffusers has the same module for classes."""

    def forward(self, added: tuple[Tensor, ...] | None) -> Tensor:
        """Noisy image embeddings and their noise levels, ((N, 2P),), to (N, time_dim).

        None and zeros mean no picture, as in a quarter of the model's training.
        """
        weight = self.linear_1.weight
        shown = weight.new_zeros(1, weight.shape[1]) if added is None else added[0].to(weight.dtype)
        return super().forward(shown)


@dataclass(frozen=True)
class NormalizerConfig:
    """Of `ImageNormalizer`."""

    embedding_dim: int = 768


class ImageNormalizer(nn.Module):
    """The mean and std of image embeddings, (1, P) each float32, with the key names of public checkpoints."""

    def __init__(self, config: NormalizerConfig) -> None:
        super().__init__()
        self.config = config
        self.mean = nn.Parameter(torch.zeros(1, config.embedding_dim))
        self.std = nn.Parameter(torch.ones(1, config.embedding_dim))


@dataclass
class ImagePrompter:
    """Makes prompts of pictures.

    Attributes:
        image_encoder: a CLIP's; its embeddings have P numbers.
        normalizer: of these embeddings.
        schedule: of the noise that is mixed into them.
        preprocess: an RGB picture -> (3, S, S), the encoder's input.
    """

    image_encoder: CLIPVisionModel
    normalizer: ImageNormalizer
    schedule: Schedule
    preprocess: Callable[[Image.Image], Tensor]

    def prompt(self, images: Sequence[Image.Image], noise_level: int = 0) -> ImagePrompt:
        """A prompt for `StableDiffusion.denoise`: the mean of the embeddings of RGB pictures.

        Args:
            noise_level: time step of `schedule`; at 0 pictures resemble the prompt most.

        Raises:
            InputError: there is no such noise level.
        """
        check_number("noise_level", noise_level, int, 0, self.schedule.config.num_train_timesteps - 1)
        return partial(self.add_noise, self.embed(images), noise_level)

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """The mean of the embeddings of pictures as the encoder gives them, (1, P) float32."""
        pixels = torch.stack([self.preprocess(image) for image in images])  # (n, 3, S, S)
        embeddings = self.image_encoder(pixels.to(self.image_encoder.visual_projection.weight))
        return embeddings.float().mean(dim=0, keepdim=True)

    def add_noise(self, embedding: Tensor, level: int, generators: Sequence[torch.Generator]) -> Tensor:
        """Mix noise into an embedding, (1, P), once for each of n generators: (n, 2P), see this module."""
        mean, std = self.normalizer.mean, self.normalizer.std
        signal, noise = self.schedule.signal_and_noise(level)
        eps = torch.cat([torch.randn(embedding.shape, generator=g) for g in generators]).to(embedding)
        noisy = (signal * (embedding - mean) / std + noise * eps) * std + mean  # (n, P)
        told = timestep_embedding(torch.tensor([level], device=noisy.device), noisy.shape[1])  # (1, P)
        return torch.cat([noisy, told.expand(len(noisy), -1)], dim=1)
