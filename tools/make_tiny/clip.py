"""CLIP in small: a text and an image encoder that find each other's counterpart among hard negatives.

Every batch is made of twins, which differ in one attribute, mostly with captions that name it. And a linear
probe has to tell the caption's facts from either feature. So the features of "red" and "orange" become as
unlike as those of "red" and "cup", which the UNet needs in order to bind colours to things.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minti.formats import configs
from minti.model.clip import CLIPTextModel
from minti.model.image_encoder import CLIPVisionModel

from . import models
from .captions import FACTS, caption
from .data import TEST_SEED, Pictures, caption_at, fact_targets, to_pixels
from .draw import render
from .training import Run, train
from .world import COLORS, scene

# CLIP's own normalisation of pixels, which every user of an image encoder expects.
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
FACT_WEIGHT = 0.5


def normalise(pixels: Tensor) -> Tensor:
    """[-1, 1] -> what CLIP's image encoder takes."""
    return ((pixels + 1) / 2 - MEAN.to(pixels)) / STD.to(pixels)


class Heads(nn.Module):
    """Linear probes of the shared features, and the temperature. Not part of what is shipped."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))
        self.text = nn.ModuleDict({f: nn.Linear(models.CONTEXT, len(v)) for f, v in FACTS.items()})
        self.image = nn.ModuleDict({f: nn.Linear(models.CONTEXT, len(v)) for f, v in FACTS.items()})


def facts_loss(heads: nn.ModuleDict, features: Tensor, targets: dict[str, Tensor]) -> tuple[Tensor, float]:
    """Mean cross-entropy over the facts, and the share of facts told right."""
    total, right, count = torch.zeros((), device=features.device), 0, 0
    for fact, head in heads.items():
        target = targets[fact].to(features.device)
        logits = head(features)
        total = total + F.cross_entropy(logits, target, ignore_index=-100)
        right += int((logits.argmax(-1) == target).sum())
        count += int((target >= 0).sum())
    return total / len(heads), right / count


def contrastive_loss(text: Tensor, image: Tensor, scale: Tensor) -> Tensor:
    logits = scale * F.normalize(text, dim=-1) @ F.normalize(image, dim=-1).T
    target = torch.arange(len(text), device=text.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def crop_ids(ids: Tensor, end_id: int) -> Tensor:
    """Leave out the padding that all prompts of a batch share; what is before it does not see it."""
    return ids[:, : int((ids == end_id).int().argmax(dim=1).max()) + 1]


def stage(run: Run) -> None:
    pictures = Pictures(run.work)
    torch.manual_seed(run.seed)
    text = CLIPTextModel(configs.text_config(models.text_config(len(pictures.tokenizer)), "text_encoder"))
    nn.init.normal_(text.token_embedding.weight, std=0.02)
    nn.init.normal_(text.text_model.embeddings.position_embedding.weight, std=0.01)
    image = CLIPVisionModel(configs.vision_config(models.VISION, "image_encoder"))
    nn.init.normal_(image.vision_model.embeddings.position_embedding.weight, std=0.02)
    text, image, heads = text.to(run.device), image.to(run.device), Heads().to(run.device)

    rng = np.random.default_rng(5)
    test_scenes = [scene(TEST_SEED, i) for i in range(400)]
    test_pixels = normalise(to_pixels(np.stack([render(s) for s in test_scenes])))
    detailed = [max((caption(s, rng) for _ in range(12)), key=lambda c: len(c.facts)) for s in test_scenes]
    random = [caption(s, rng) for s in test_scenes]

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        draw = np.random.default_rng((run.seed, step, 2))
        pairs = draw.choice(len(pictures) // 2, run.batch // 2, replace=False)
        indices = np.sort(np.concatenate([2 * pairs, 2 * pairs + 1]))
        captions = [caption_at(int(i), draw, contrast=draw.random() < 0.7) for i in indices]
        pixels = normalise(pictures.batch(indices)).to(run.device)
        ids = crop_ids(pictures.ids(captions), pictures.tokenizer.end_id).to(run.device)
        with run.autocast():
            t, v = text(ids).pooled, image(pixels)
        t, v = t.float(), v.float()
        targets = fact_targets(captions)
        text_facts, text_right = facts_loss(heads.text, t, targets)
        image_facts, image_right = facts_loss(heads.image, v, targets)
        contrast = contrastive_loss(t, v, heads.logit_scale.exp().clamp(max=100))
        loss = contrast + FACT_WEIGHT * (text_facts + image_facts)
        return loss, {"contrast": contrast.item(), "text": text_right, "image": image_right}

    @torch.no_grad()
    def preview(ema: dict[str, nn.Module], step: int) -> None:
        v = F.normalize(ema["image_encoder"](test_pixels.to(run.device)), dim=-1)

        def retrieval(captions: list) -> float:
            t = F.normalize(ema["text_encoder"](pictures.ids(captions).to(run.device)).pooled, dim=-1)
            hits = []
            for k in range(0, 400, 100):  # among 100 pictures whose captions are distinct
                rows = list({captions[i].text: i for i in range(k, k + 100)}.values())
                hits += ((t[rows] @ v[rows].T).argmax(1) == torch.arange(len(rows), device=t.device)).tolist()
            return sum(hits) / len(hits)

        colors = pictures.tokenizer([f"a photo of a {c} cup" for c in COLORS]).to(run.device)
        f = F.normalize(ema["text_encoder"](colors).pooled, dim=-1)
        alike = (f @ f.T - 2 * torch.eye(len(f), device=f.device)).max().item()
        print(
            f"clip step {step}: held-out text-to-image retrieval among 100: detailed captions "
            f"{retrieval(detailed):.3f}, random captions {retrieval(random):.3f}; most similar two colours "
            f"have cosine {alike:.2f}",
            flush=True,
        )

    train(run, {"text_encoder": text, "image_encoder": image, "heads": heads}, loss_of, preview, every=250)
