"""The CLIP that judges pictures. What its embeddings are used for is in `scores.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..errors import InputError
from ..formats.checkpoint import check_exists
from ..formats.clip_checkpoint import ClipParts, load_clip


class Scorer(ClipParts):
    """A CLIP that judges pictures. It computes in float32."""

    @classmethod
    def load(
        cls, path: str | Path, *, device: str | torch.device = "cpu", tokenizer: str | Path | None = None
    ) -> Scorer:
        """Open a CLIP.

        Args:
            path: a transformers folder of a CLIPModel; OpenAI's own `.pt` file; or a Stable Diffusion folder
                with an image encoder that shares the space of its text encoder, such as weights/tiny.
            tokenizer: folder or file, for a `.pt` file, which comes without one.

        Raises:
            InputError: one line that says what is wrong.
        """
        return cls(**vars(load_clip(path, device=torch.device(device), tokenizer=tokenizer)))

    @torch.no_grad()
    def embed_images(self, images: Iterable[Image.Image], batch_size: int = 32) -> Tensor:
        """n RGB pictures of any size, one in memory at a time -> (n, P) float32 of unit length, on the CPU.

        Raises:
            InputError: the CLIP holds NaN or infinity.
        """
        embeddings, inputs = [], map(self.preprocess, images)
        while batch := list(islice(inputs, batch_size)):
            pixels = torch.stack(batch).to(_device(self.image_encoder))
            embeddings.append(self.image_encoder(pixels).cpu())
        return _unit(torch.cat(embeddings))

    def mean_embedding(self, images: Iterable[Image.Image]) -> Tensor:
        """The mean of the embeddings of n pictures, (P,) float32 of unit length, on the CPU."""
        return F.normalize(self.embed_images(images).mean(dim=0), dim=0)

    def measure(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """The embeddings of pictures, as `picture_jobs.Measure` has it."""
        return {"embeddings": self.embed_images(images)}

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """n prompts -> (n, P) float32 of unit length, on the CPU."""
        ids = self.tokenizer(texts).to(_device(self.text_encoder))
        return _unit(self.text_encoder(ids).pooled.cpu())


def _unit(x: Tensor) -> Tensor:
    if not x.isfinite().all():
        raise InputError("the CLIP that judges holds NaN or infinity; download it again")
    return F.normalize(x, dim=1)


def choose_clip(clip: str | None, checkpoint: str | None) -> str:
    """The CLIP to judge by: the one given, or the checkpoint's own. Raises InputError if there is neither."""
    if clip is not None:
        return clip
    if checkpoint is not None and (check_exists(checkpoint) / "image_encoder").is_dir():
        return checkpoint
    raise InputError(
        f"--clip must be given, since {checkpoint or 'nothing else'} has no image encoder: OpenAI's "
        "ViT-B-32.pt, or get one with `python tools/download.py clip-b32 weights/clip-b32`"
    )


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
