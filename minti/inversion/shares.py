"""A step in parts: several words, processes that share the samples, batches whose gradients are added up."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..model.kernels import compile_for
from ..model.stable_diffusion import StableDiffusion
from .batches import Batch, Word, to_device
from .learn import diffusion_loss


@dataclass(frozen=True)
class Share:
    """What one process does of every step.

    Attributes:
        batch_size, accumulate: see `Settings`.
        rank, world: which of how many processes this is.
    """

    batch_size: int
    accumulate: int
    rank: int = 0
    world: int = 1

    @property
    def count(self) -> int:
        """How many samples of each word there are in a step, in all processes together."""
        return self.batch_size * self.accumulate * self.world

    def parts(self, drawn: Sequence[Batch]) -> Iterator[list[Batch]]:
        """Of the `count` samples of each word those of this process, one batch after another."""
        for i in range(self.accumulate):
            first = (i * self.world + self.rank) * self.batch_size
            yield [batch[first : first + self.batch_size] for batch in drawn]

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors, in place, by their sums over all processes."""
        if self.world > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)


def loss_inputs(sd: StableDiffusion, words: Sequence[Word], batches: Sequence[Batch]) -> tuple[Tensor, ...]:
    """What `diffusion_loss` takes: the samples of each word, one word behind the other."""
    samples = []
    for word, batch in zip(words, batches, strict=True):
        batch = batch.to(sd.device)
        x0, weight, sizes = word.latents_at(batch)
        ids = to_device(sd.tokenizer(batch.prompts), sd.device)
        samples.append((x0, batch.eps, batch.t, ids, weight, sizes))
    return tuple(map(torch.cat, zip(*samples, strict=True)))


def loss_function(sd: StableDiffusion, latents: Tensor, compiled: bool) -> Callable[..., Tensor]:
    """`diffusion_loss` of a model, as a function of what `loss_inputs` gives.

    Args:
        latents: (1, C, h, w), like those of the photos. What an inpainting model sees beside them is computed
            now, which a compiled graph could not do.
        compiled: turn it into one graph at the first call.
    """
    sd.unet_input(latents)

    def loss(*inputs: Tensor) -> Tensor:
        return diffusion_loss(sd, *inputs)

    return compile_for(sd.device, loss) if compiled else loss
