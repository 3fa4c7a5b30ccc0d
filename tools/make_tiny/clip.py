"""The image encoder of CLIP: it learns to find the captions of pictures among hard negatives.

The text encoder is finished and frozen (as in LiT, arXiv 2111.07991). Every batch is made of twins, which
differ in one attribute, half of them with captions that name it; and of things that look as their names say,
each with nothing but its name. And linear probes have to tell the facts and the factors of the thing.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minti.formats import configs
from minti.model.clip import CLIPTextModel
from minti.model.image_encoder import CLIPVisionModel

from . import models, names
from .captions import PHOTO_TEMPLATES
from .data import TEST_SEED, Pictures, captions_at, picture_at, scene_at, to_pixels
from .draw import render
from .kinds import code, code_layout
from .text import Heads, code_loss, crop_ids, load_text_encoder
from .training import Run, read, train
from .world import Scene, named_thing

# CLIP's own normalisation of pixels, which every user of an image encoder expects.
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
FACT_WEIGHT, CODE_WEIGHT = 0.5, 2.0
NAMED = 64  # things in a batch that only have their names
TESTS = 200  # pictures that previews look at, of either sort


def normalise(pixels: Tensor) -> Tensor:
    """[-1, 1] -> what CLIP's image encoder takes."""
    return ((pixels + 1) / 2 - MEAN.to(pixels)) / STD.to(pixels)


def contrastive_loss(text: Tensor, image: Tensor, scale: Tensor) -> Tensor:
    logits = scale * F.normalize(text, dim=-1) @ F.normalize(image, dim=-1).T
    target = torch.arange(len(text), device=text.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class ImageHeads(Heads):
    """Probes, and the temperature."""

    def __init__(self) -> None:
        super().__init__(len(code_layout()))
        self.logit_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))


class Named:
    """Things with names, each with the pictures that show it, alone, in the look that its name stands for.

    Attributes:
        rows: of each thing its pictures.
        features: (T, N, C), the text encoder's, of each template with each name.
        codes: (N, K), of the factors of each.
    """

    @torch.no_grad()
    def __init__(self, pictures: Pictures, text: CLIPTextModel, device: torch.device) -> None:
        rows: dict[str, list[int]] = {}
        codes = {}
        for i in range(len(pictures)):
            thing, *others = scene_at(i).things
            if thing.looks_as_named and not others:
                rows.setdefault(thing.noun, []).append(i)
                codes[thing.noun] = code(thing.kind, dict(thing.factors))
        ids = (pictures.tokenizer([t.format(name) for name in rows]) for t in PHOTO_TEMPLATES[""])
        self.rows, self.codes = list(rows.values()), torch.from_numpy(np.stack([codes[n] for n in rows]))
        end = pictures.tokenizer.end_id
        self.features = torch.stack([text(crop_ids(i, end).to(device)).pooled.float() for i in ids])

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, Tensor, Tensor]:
        """Different things, at most `NAMED`: (N,) pictures, (N, C) features, (N, K) codes."""
        which = rng.permutation(len(self.rows))[:NAMED]
        rows = np.array([rng.choice(self.rows[k]) for k in which])
        return rows, self.features[rng.integers(len(self.features)), which], self.codes[which]


def stage(run: Run) -> None:
    pictures = Pictures(run.work)
    text = load_text_encoder(run.work, pictures.tokenizer, run.device)
    torch.manual_seed(run.seed)
    image = CLIPVisionModel(configs.vision_config(models.VISION, "image_encoder"))
    nn.init.normal_(image.vision_model.embeddings.position_embedding.weight, std=0.02)
    if run.start:
        image.load_state_dict(read(run.start / "image_encoder" / "model.safetensors"))
    image, heads = image.to(run.device), ImageHeads().to(run.device)
    named = Named(pictures, text, run.device)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        draw = np.random.default_rng((run.seed, step, 2))
        pairs = draw.choice(len(pictures) // 2, run.batch // 2, replace=False)
        rows = np.sort(np.concatenate([2 * pairs, 2 * pairs + 1]))
        ids, targets, said = pictures.said(rows, draw.integers(pictures.captions.shape[1], size=run.batch))
        rows_named, t_named, code_named = named.draw(draw)
        pixels = normalise(pictures.batch(np.concatenate([rows, rows_named]))).to(run.device)
        with run.autocast():
            with torch.no_grad():
                t = text(crop_ids(ids, pictures.tokenizer.end_id).to(run.device)).pooled.float()
            features = image(pixels).float()
        v, v_named = features.split([len(rows), len(rows_named)])
        facts, right = heads.facts_loss(v, targets)
        factors = code_loss(heads.code(features), torch.cat([said, code_named]).to(run.device))
        scale = heads.logit_scale.exp().clamp(max=100)
        contrast, bare = contrastive_loss(t, v, scale), contrastive_loss(t_named, v_named, scale)
        values = {"contrast": contrast.item(), "bare names": bare.item(), "right": right}
        values["factors"] = factors.item()
        return contrast + bare + FACT_WEIGHT * facts + CODE_WEIGHT * factors, values

    scenes = [named_scene(i) for i in range(TESTS)]
    own = normalise(to_pixels(np.stack([render(scene) for scene in scenes])))
    bare = pictures.tokenizer([f"a photo of a {scene.things[0].noun}" for scene in scenes])
    fresh = normalise(to_pixels(np.stack([picture_at(i, TEST_SEED) for i in range(0, 2 * TESTS, 2)])))
    captions = [captions_at(i, TEST_SEED) for i in range(0, 2 * TESTS, 2)]
    full = pictures.tokenizer([max(of_one, key=lambda c: len(c.facts)).text for of_one in captions])
    random = pictures.tokenizer([of_one[0].text for of_one in captions])

    @torch.no_grad()
    def preview(ema: dict[str, nn.Module], step: int) -> None:
        def retrieval(ids: Tensor, pixels: Tensor) -> float:
            t = F.normalize(text(ids.to(run.device)).pooled, dim=-1)
            v = F.normalize(ema["image_encoder"](pixels.to(run.device)), dim=-1)
            parts = [slice(start, start + 100) for start in range(0, len(v), 100)]
            found = [(t[part] @ v[part].T).argmax(1).cpu() for part in parts]
            hits = [best == torch.arange(len(best)) for best in found]
            return torch.cat(hits).float().mean().item()

        print(
            f"clip step {step}: text to image among 100: detailed captions {retrieval(full, fresh):.3f}, "
            f"random {retrieval(random, fresh):.3f}, bare names {retrieval(bare, own):.3f}",
            flush=True,
        )

    train(run, {"image_encoder": image, "heads": heads}, loss_of, preview, every=200)


def named_scene(i: int) -> Scene:
    """A named thing in its own look, as training has it, in front of gray."""
    thing = named_thing(list(names.trained().values())[i])
    return Scene((thing,), "gray", "photo", detail=i)
