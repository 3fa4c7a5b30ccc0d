"""A word learned by the objective of CLIP instead of that of the diffusion model: a rival, not the method.

The word is to be near the photos and away from its class, as CLIP sees them. This is the second stage of
PALAVRA (Cohen et al. 2022, arXiv 2204.01694; `calc_contrastive_loss_with_coarse_grained_token` in its code),
with which the Textual Inversion paper compares (arXiv 2208.01618, figure 5). The first stage, a network that
guesses the word, needs a model of its own, and so does the map from texts to pictures: both are left out.

Stable Diffusion 1 reads prompts with the text encoder of a CLIP. So a row that is learned with that CLIP can
be used in its prompts at once, and shows how much of a picture the objective of CLIP leaves out.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..model.clip import CLIPTextModel
from ..model.model_hash import model_hash
from ..model.stable_diffusion import StableDiffusion
from .batches import Batch, Settings, Word, to_device
from .inversion import Inversion

TEMPERATURE = 0.25


def contrastive_loss(image: Tensor, class_text: Tensor, word_text: Tensor) -> Tensor:
    """InfoNCE (arXiv 1807.03748) over two pairs: photos and word, class and class.

    Each of the four embeddings is to be told from the others by its partner, as in SimCLR (arXiv 2002.05709,
    equation 1). That brings the word to the photos, and takes it away from the class.

    Args:
        image, class_text, word_text: (B, P), of unit length.

    Returns:
        (B,)
    """
    points = torch.stack([image, class_text, word_text, class_text], dim=1)  # (B, 4, P)
    itself = torch.eye(4, dtype=torch.bool, device=points.device)
    logits = (points @ points.mT / TEMPERATURE).masked_fill(itself, -torch.inf)  # (B, 4, 4)
    partner = torch.tensor([2, 3, 0, 1], device=points.device).repeat(len(points))
    return F.cross_entropy(logits.flatten(0, 1), partner, reduction="none").view(-1, 4).mean(dim=1)


@dataclass(frozen=True)
class ClipTarget:
    """What a word is learned from.

    Attributes:
        image: (P,) of unit length, the mean of the embeddings of its photos.
        class_word: what stands in the place of the word in prompts of its class.
    """

    image: Tensor
    class_word: str


class ClipInversion(Inversion):
    """An `Inversion` whose loss is `contrastive_loss`.

    Args:
        text_encoder: of the CLIP that has embedded the photos. Its text projection is used, and otherwise the
            text encoder of the model, which has the same weights.
        targets: one for each word.
        options: others of `Inversion`.

    Raises:
        InputError: the text encoders are different; a class has no name; or see `Inversion`.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        words: Sequence[Word],
        settings: Settings,
        *,
        text_encoder: CLIPTextModel,
        targets: Sequence[ClipTarget],
        **options: Any,
    ) -> None:
        check_same_encoder(sd, text_encoder)
        if settings.per_image:
            raise InputError("per_image: words of single photos cannot be learned with the objective clip")
        for word, target in zip(words, targets, strict=True):
            if not target.class_word:
                raise InputError(f"{word.placeholder!r}: the objective clip needs an init word, not a file")
        self._project = text_encoder.text_projection or nn.Identity()
        self._classes = [target.class_word for target in targets]
        self._images = torch.stack([target.image for target in targets]).to(sd.device)  # (words, P)
        super().__init__(sd, words, settings, **options)

    def _losses(self, batches: Sequence[Batch]) -> Tensor:
        prompts, of_class = [], []
        for word, name, batch in zip(self.words, self._classes, batches, strict=True):
            prompts += batch.prompts
            of_class += [prompt.replace(word.placeholder, name) for prompt in batch.prompts]
        with torch.no_grad():
            class_texts = self._embed(of_class)
        images = self._images.repeat_interleave(len(prompts) // len(self.words), dim=0)
        return contrastive_loss(images, class_texts, self._embed(prompts)).view(len(self.words), -1).sum(1)

    def _embed(self, prompts: Sequence[str]) -> Tensor:
        """n prompts -> (n, P) float32 of unit length."""
        pooled = self.sd.text_encoder(to_device(self.sd.tokenizer(prompts), self.sd.device)).pooled
        return F.normalize(self._project(pooled.float()), dim=1)

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | {"clip_images": self._images}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        began = state.get("clip_images")
        if began is None or not torch.equal(began.to(self._images.device), self._images):
            raise InputError("the run began with another CLIP, or with another objective")
        super().load_state_dict(state)


def check_same_encoder(sd: StableDiffusion, text_encoder: CLIPTextModel) -> None:
    """Raises InputError unless the text encoder of a model is that of a CLIP, in its dtype or in float16."""

    def hashed(encoder: CLIPTextModel, dtype: torch.dtype) -> str:
        return model_hash(copy.deepcopy(encoder.text_model).to(dtype))

    own = sd.text_encoder
    same = isinstance(own, CLIPTextModel) and any(
        hashed(own, dtype) == hashed(text_encoder, dtype) for dtype in (sd.dtype, torch.float16)
    )
    if not same:
        raise InputError(
            f"{sd.source}: its text encoder is not that of the CLIP given with --clip, so a word cannot be "
            "learned with the objective clip; Stable Diffusion 1 has that of openai/clip-vit-large-patch14"
        )
