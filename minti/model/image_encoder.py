"""CLIP's image encoder, a vision transformer (Radford et al., arXiv 2103.00020, section 2.4), which scores
pictures. It takes no part in making them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .clip import CLIPEncoder
from .config import TransformerConfig
from .embedding import Embedding


@dataclass(frozen=True)
class VisionConfig(TransformerConfig):
    """CLIP's image encoder. Defaults: ViT-B/32, with which the papers score their results."""

    image_size: int = 224
    patch_size: int = 32
    projection_dim: int = 512


class VisionEmbeddings(nn.Module):
    """The patches of a picture as a sequence, behind one learned vector that will stand for the whole."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            3, config.hidden_size, config.patch_size, stride=config.patch_size, bias=False
        )
        patches = (config.image_size // config.patch_size) ** 2
        self.position_embedding = Embedding(1 + patches, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 1 + N, D) for N patches."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, 3, H, W) -> (B, N, D)
        whole = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([whole, patches], dim=1) + self.position_embedding.weight


class VisionTransformer(nn.Module):
    """Embeddings, layers and the norms around them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        # Every checkpoint spells it like this.
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = CLIPEncoder(config, causal=False)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, D): the last layer at the vector that stands for the whole."""
        x = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x[:, 0])


class CLIPVisionModel(nn.Module):
    """CLIP's image encoder. Modules have the key names of public checkpoints."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionTransformer(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed pictures in the space that texts and pictures share.

        Args:
            pixels: (B, 3, image_size, image_size), normalised by CLIP's mean and standard deviation.

        Returns:
            (B, projection_dim), not normalised.
        """
        return self.visual_projection(self.vision_model(pixels))
