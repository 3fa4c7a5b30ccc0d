"""CLIP (Radford et al. 2021, arXiv 2103.00020): a text and an image encoder around one transformer.

The text encoder turns token ids into one vector a token. Stable Diffusion 1 uses OpenAI's ViT-L/14, Stable
Diffusion 2 OpenCLIP's ViT-H/14 without its last layer; both are this code with another `TextConfig`. Textual
Inversion acts on its very first step, the table that turns a token id into a vector. The image encoder takes
no part in making pictures; it judges them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attention, merge_heads, split_heads
from .config import TextConfig, VisionConfig


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of the Gaussian error linear unit."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class CLIPAttention(nn.Module):
    def __init__(self, config: TextConfig | VisionConfig, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = config.num_attention_heads, causal
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(merge_heads(attention(q, k, v, causal=self.causal)))


class CLIPMLP(nn.Module):
    def __init__(self, config: TextConfig | VisionConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPLayer(nn.Module):
    def __init__(self, config: TextConfig | VisionConfig, causal: bool) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = CLIPAttention(config, causal)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    """The stack of layers. Returns its output and, for SDXL, what went into the last layer."""

    def __init__(self, config: TextConfig | VisionConfig, causal: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CLIPLayer(config, causal) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        penultimate = x
        for layer in self.layers:
            penultimate = x
            x = layer(x)
        return x, penultimate


def table(rows: int, dim: int) -> nn.Embedding:
    """A table of random vectors; as `nn.Embedding`, which imports all of PyTorch's compiler where it only has
    to pretend, on the meta device."""
    weight = torch.empty(rows, dim)
    return nn.Embedding.from_pretrained(weight if weight.is_meta else weight.normal_(), freeze=False)


class TextEmbeddings(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token_embedding = table(config.vocab_size, config.hidden_size)
        self.position_embedding = table(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return (
            self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
        )  # (B, L) -> (B, L, D)


class TextTransformer(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = CLIPEncoder(config, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x, penultimate = self.encoder(self.embeddings(ids))
        return self.final_layer_norm(x), penultimate


class TextOutput(NamedTuple):
    """What the text encoder says about a batch of prompts of L tokens."""

    context: Tensor  # (B, L, D): the last layer, normalised; what the UNet of SD 1.x and 2.x attends to
    penultimate: Tensor  # (B, L, D): the last layer but one, not normalised; SDXL's context
    pooled: Tensor  # (B, D): context at the end token; or (B, P), projected, where there is a text_projection


class CLIPTextModel(nn.Module):
    """CLIP's text encoder; module names are the key names of public checkpoints."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)
        self.text_projection = (
            nn.Linear(config.hidden_size, config.projection_dim, bias=False)
            if config.projection_dim
            else None
        )

    @property
    def token_embedding(self) -> nn.Module:
        """The table of word vectors, (vocab_size, D): where Textual Inversion adds its rows."""
        return self.text_model.embeddings.token_embedding

    def forward(self, ids: Tensor) -> TextOutput:
        """Encode token ids, (B, L) int64 with L at most 77.

        The pooled vector is read at the first end token of each prompt. (Looking for the largest id, as
        CLIP's own code does, goes wrong once placeholder words with larger ids exist.)
        """
        context, penultimate = self.text_model(ids)
        end = (ids == self.config.eos_token_id).int().argmax(dim=1)  # (B, L) -> (B,)
        pooled = context[torch.arange(len(ids), device=ids.device), end]  # (B, L, D) -> (B, D)
        if self.text_projection is not None:
            pooled = self.text_projection(pooled)
        return TextOutput(context, penultimate, pooled)
