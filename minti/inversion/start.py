"""Where the vectors of a new word start: at a word that describes the concept coarsely."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.stable_diffusion import StableDiffusion
from .init_tokens import init_tokens


@torch.no_grad()
def word_rows(sd: StableDiffusion, word: str, num_vectors: int = 1) -> Tensor:
    """The vectors of a word or phrase, (num_vectors, D) float32 on the CPU.

    Args:
        word: a coarse description of the concept, such as "toy", or a word that was learned before.

    Raises:
        InputError: `word` is empty, or too long.
    """
    ids = init_tokens(sd.tokenizer, word, num_vectors)
    return spread(sd.look_up(torch.tensor([ids], device=sd.device))[0], num_vectors)


def spread(vectors: Tensor, n: int) -> Tensor:
    """Spread k vectors, (k, D), over n: repeated if too few, averaged if too many. Returns (n, D) float32."""
    k = len(vectors)
    parts = [vectors[i * k // n : max((i + 1) * k // n, i * k // n + 1)] for i in range(n)]
    return torch.stack([part.float().mean(0) for part in parts]).cpu()
