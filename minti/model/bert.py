"""The text encoder of the first latent diffusion model, on which Textual Inversion was developed.

Rombach et al. 2022 (arXiv 2112.10752, section 4.3.1) trained a transformer from scratch for their 1.4-billion
text-to-image model and called it BERT, after the tokenizer that it uses (`wordpiece.py`). It is a plain
pre-norm transformer (Vaswani et al. 2017, arXiv 1706.03762): every position attends to every other one, also
to padding, because no mask is applied anywhere. Its heads are narrower than its width: 8 x 64 = 512 of 1280.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attention
from .clip import TextOutput
from .embedding import Embedding, TokenEmbedding


@dataclass(frozen=True)
class BertConfig:
    """The text encoder of the first latent diffusion model. Defaults: its published size."""

    vocab_size: int = 30522
    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_attention_heads: int = 8
    head_dim: int = 64  # the heads together are 512 wide, not hidden_size
    max_position_embeddings: int = 77


class BertAttention(nn.Module):
    """Self-attention over all positions, (B, L, D) -> (B, L, D)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        inner = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.out_proj = nn.Linear(inner, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(attention(q, k, v, self.heads))


class BertLayer(nn.Module):
    """Attention, then a perceptron with the exact GELU, each around a shortcut: (B, L, D) -> (B, L, D)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size)
        self.self_attn = BertAttention(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class BertEncoder(nn.Module):
    """Token ids to one vector per token, (B, L) int64 -> (B, L, D)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.embed_positions = Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.layer_norm = nn.LayerNorm(config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids) + self.embed_positions.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.layer_norm(x)


class BertTextModel(nn.Module):
    """The text encoder; module names are the keys of the public folder, without its unused `to_logits`."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.model = BertEncoder(config)

    def forward(self, ids: Tensor) -> TextOutput:
        """Encode token ids, (B, L) int64 with L at most 77; the context is (B, L, D), normalised."""
        return TextOutput(self.model(ids))
