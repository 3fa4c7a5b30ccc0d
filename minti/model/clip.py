"""CLIP's text encoder (Radford et al. 2021, arXiv 2103.00020, section 2.4), and the transformer in it.

The text encoder turns token ids into one vector a token. Stable Diffusion 1 uses OpenAI's ViT-L/14, and
Stable Diffusion 2 OpenCLIP's ViT-H/14 without its last layer (`layer: "penultimate"` in the configs of
Stability-AI/stablediffusion); both are this code with another `TextConfig`. Textual Inversion acts on the
very first step, the table that turns a token id into a vector.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attention
from .config import TextConfig, TransformerConfig
from .embedding import Embedding, TokenEmbedding


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of the Gaussian error linear unit (arXiv 1606.08415): x sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class CLIPAttention(nn.Module):
    """Multi-head self-attention: (B, N, D) -> (B, N, D).

    Args:
        causal: whether a position attends only to itself and to those before it. CLIP's text encoder does, so
            that it could be trained as a language model as well (arXiv 2103.00020, section 2.4).
    """

    def __init__(self, config: TransformerConfig, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = config.num_attention_heads, causal
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(attention(q, k, v, self.heads, causal=self.causal))


class CLIPMLP(nn.Module):
    """The perceptron of a layer, applied to every position by itself: (B, N, D) -> (B, N, D)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPLayer(nn.Module):
    """A pre-norm transformer layer, attention and perceptron with a shortcut each: (B, N, D) -> (B, N, D)."""

    def __init__(self, config: TransformerConfig, causal: bool) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = CLIPAttention(config, causal)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: TransformerConfig, causal: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CLIPLayer(config, causal) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, N, D) -> x and the output of every layer, each (B, N, D)."""
        hidden_states = [x]
        for layer in self.layers:
            hidden_states.append(layer(hidden_states[-1]))
        return hidden_states


class TextEmbeddings(nn.Module):
    """The sum of a vector for each token and one for each position: (B, L) ids -> (B, L, D)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token_embedding = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class TextTransformer(nn.Module):
    """Embeddings, layers and the final norm."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = CLIPEncoder(config, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, L) ids -> the last layer, normalised, and all layers as they are, each (B, L, D)."""
        hidden_states = self.encoder(self.embeddings(ids))
        return self.final_layer_norm(hidden_states[-1]), hidden_states


class TextOutput(NamedTuple):
    """What a text encoder makes of a batch of prompts of L tokens.

    Attributes:
        context: (B, L, D), what the UNet attends to; CLIP's is the last layer, normalised.
        pooled: the last layer, normalised, at the end token: (B, D), or (B, P) behind a text_projection.
        hidden_states: the input and the output of every layer, each (B, L, D), not normalised.
    """

    context: Tensor
    pooled: Tensor | None = None
    hidden_states: Sequence[Tensor] = ()


def first_end(ids: Tensor, end_id: int) -> Tensor:
    """Where the first end token of each prompt is, (B, L) -> (B,).

    CLIP's own code looks for the largest id, which goes wrong once there are placeholder words, whose ids are
    larger.
    """
    return (ids == end_id).int().argmax(dim=1)


class CLIPTextModel(nn.Module):
    """CLIP's text encoder. Modules have the key names of public checkpoints."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)
        self.context_layer = 1  # the layer that becomes the context, counted from the end
        self.text_projection = None
        if config.projection_dim:
            self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    @property
    def token_embedding(self) -> TokenEmbedding:
        """The table of token vectors, (vocab_size, D), to which Textual Inversion adds its rows."""
        return self.text_model.embeddings.token_embedding

    def forward(self, ids: Tensor) -> TextOutput:
        """Encode the ids of prompts, (B, L) int64, L at most 77."""
        context, hidden_states = self.text_model(ids)
        end = first_end(ids, self.config.eos_token_id)
        pooled = context[torch.arange(len(ids), device=ids.device), end]  # (B, L, D) -> (B, D)
        if self.context_layer > 1:
            context = self.text_model.final_layer_norm(hidden_states[-self.context_layer])
        if self.text_projection is not None:
            pooled = self.text_projection(pooled)
        return TextOutput(context, pooled, hidden_states)
