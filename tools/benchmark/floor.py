"""The least that a task can take: the operations nobody can do without, at the machine's own speed.

Counted are the products in the UNet, the text encoder and the decoder, as torch's own counter finds them on
tensors without memory. The speed is that of one large matrix product in the same number format.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from minti.formats.checkpoint import DTYPES
from minti.model.tokenizer import PROMPT_LENGTH

from .jobs import Job, clock, median
from .models import build

SIDE = 4096  # of the matrices whose product tells the speed


@dataclass(frozen=True)
class Operations:
    """Floating-point operations for one picture; a multiplication and its addition are two."""

    unet: int
    unet_and_gradient: int  # forward, and backward to the context: the weights are frozen
    text: int
    text_and_gradient: int  # forward, and backward to the word vectors
    decode: int


def _count(run: Callable[[], Tensor], gradient: bool = False) -> int:
    with torch.set_grad_enabled(gradient), FlopCounterMode(display=False) as counter:
        output = run()
        if gradient:
            output.sum().backward()
    return counter.get_total_flops()


@functools.cache
def operations(model: str, size: int) -> Operations:
    """What the parts of a model need for a picture of `size` pixels."""
    with torch.device("meta"):
        unet, text, vae = (build(model, part) for part in ("unet", "text_encoder", "vae"))
        side = size // vae.config.downscale
        latents, t = torch.empty(1, vae.config.latent_channels, side, side), torch.zeros(1)
        words = torch.empty(1, PROMPT_LENGTH, text.config.hidden_size, requires_grad=True)

        def denoise() -> Tensor:
            return unet(latents, t, words)

        def encode() -> Tensor:
            return text.text_model.encoder(words)[-1]

        return Operations(
            unet=_count(denoise),
            unet_and_gradient=_count(denoise, gradient=True),
            text=_count(encode),
            text_and_gradient=_count(encode, gradient=True),
            decode=_count(lambda: vae.decode(latents)),
        )


def needed(job: Job) -> dict[str, int]:
    """Operations behind each of the durations that contenders report."""
    ops = operations(job.model, job.size)
    step, decode = 2 * job.batch_size * ops.unet, job.batch_size * ops.decode  # with the prompt and without
    return {
        "training step": job.concepts * job.batch_size * (ops.unet_and_gradient + ops.text_and_gradient),
        "picture": job.steps * step + 2 * ops.text + decode,
        "sampling step": step,
        "decoding": decode,
    }


@functools.cache
def speed(device: str, dtype: str) -> float:
    """Operations a second of this machine in a product of two square matrices."""
    a, b = (torch.randn(SIDE, SIDE).to(device, DTYPES[dtype]) for _ in range(2))
    count = 50 if device == "cuda" else 1  # in a row: a GPU takes less time for one than to be told
    seconds = []
    for _ in range(5):
        start = clock(device)
        for _ in range(count):
            a @ b
        seconds.append((clock(device) - start) / count)
    return 2 * SIDE**3 / median(seconds[1:])
