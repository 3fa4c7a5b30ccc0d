"""CLIP in small: a text and an image encoder that find each other's counterpart among hard negatives.

Every batch is made of twins, which differ in one attribute, half of them with captions that name it. Linear
probes have to tell the caption's facts, and the factors of the thing, from either feature. So the features of
"red" and "orange" become as unlike as those of "red" and "cup", which the UNet needs in order to bind colours
to things. And in every step the text encoder alone reads names that were moved about or mixed in pairs: what
the probes find must move and mix with them.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minti.clip import CLIPTextModel, CLIPVisionModel
from minti.config import TextConfig, VisionConfig
from minti.tokenizer import Tokenizer

from . import models, names
from .captions import FACTS, PHOTO_TEMPLATES
from .colors import COLORS
from .data import TEST_SEED, Pictures, captions_at, decode_captions, encode_captions, picture_at, to_pixels
from .draw import render
from .kinds import code_layout
from .training import Run, read, train
from .words import LOOK, NOISE, Disturbed, begin, meaning, meanings, name_ids, vectors
from .world import Scene, named_thing

# CLIP's own normalisation of pixels, which every user of an image encoder expects.
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
FACT_WEIGHT, CODE_WEIGHT = 0.5, 2.0
NAMES = 128  # read by the text encoder alone in every step
LENGTH = 1.2  # of the vectors of names to begin with


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
        self.text_code = nn.Linear(models.CONTEXT, len(code_layout()) + LOOK)
        self.image_code = nn.Linear(models.CONTEXT, len(code_layout()))


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


def code_loss(found: Tensor, target: Tensor) -> Tensor:
    """Mean square over the parts of the code that are known."""
    known = target.isfinite()
    return (found - target.nan_to_num())[known].square().mean() if known.any() else found.sum() * 0


def contrastive_loss(text: Tensor, image: Tensor, scale: Tensor) -> Tensor:
    logits = scale * F.normalize(text, dim=-1) @ F.normalize(image, dim=-1).T
    target = torch.arange(len(text), device=text.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def crop_ids(ids: Tensor, end_id: int) -> Tensor:
    """Leave out the padding that all prompts of a batch share; what is before it does not see it."""
    return ids[:, : int((ids == end_id).int().argmax(dim=1).max()) + 1]


def fresh(run: Run, tokenizer: Tokenizer) -> tuple[CLIPTextModel, CLIPVisionModel]:
    """Both encoders as they begin: from nothing, or with the weights and the common words of `run.start`."""
    text = CLIPTextModel(TextConfig.from_json(models.text_config(len(tokenizer)), "text_encoder"))
    table = text.token_embedding.weight
    nn.init.normal_(table, std=0.02)
    nn.init.normal_(text.text_model.embeddings.position_embedding.weight, std=0.01)
    image = CLIPVisionModel(VisionConfig.from_json(models.VISION, "image_encoder"))
    nn.init.normal_(image.vision_model.embeddings.position_embedding.weight, std=0.02)
    if run.start:
        state = read(run.start / "text_encoder" / "model.safetensors")
        key = "text_model.embeddings.token_embedding.weight"
        old, theirs = state.pop(key), Tokenizer.load(run.start / "tokenizer").vocab
        text.load_state_dict(state, strict=False)
        common = [(token, i) for token, i in tokenizer.vocab.items() if token in theirs]
        with torch.no_grad():
            table[[i for _, i in common]] = old[[theirs[token] for token, _ in common]]
        image.load_state_dict(read(run.start / "image_encoder" / "model.safetensors"))
    begin(table, tokenizer, LENGTH)
    return text, image


def stage(run: Run) -> None:
    pictures = Pictures(run.work)
    tokenizer, device = pictures.tokenizer, run.device
    torch.manual_seed(run.seed)
    text, image = (model.to(device) for model in fresh(run, tokenizer))
    heads, known, means = Heads().to(device), name_ids(tokenizer), meanings()
    templates = [tokenizer([t.format(n) for n in names.trained()])[:, :12] for t in PHOTO_TEMPLATES[""]]

    def read_names(draw: np.random.Generator, generator: torch.Generator) -> Tensor:
        """The loss of names on their own: half of them mixed with another, all of them moved."""
        which = torch.from_numpy(draw.integers(len(known), size=(2, NAMES)))
        share = torch.from_numpy(draw.random((NAMES, 1), dtype=np.float32)) * (torch.arange(NAMES) % 2)[:, None]
        ids = templates[int(draw.integers(len(templates)))][which[0]].to(device)
        target = (means[which[0]].lerp(means[which[1]], share)).to(device)
        with Disturbed(text.token_embedding, known.to(device), NOISE * LENGTH, generator) as disturbed:
            table, share = text.token_embedding.weight, share.to(device)
            step = share * (table[known[which[1]]] - table[known[which[0]]])
            disturbed.mixed = torch.isin(ids, known.to(device))[..., None] * step[:, None]
            found = heads.text_code(text(ids).pooled.float())
        return code_loss(found, target)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        draw, generator = np.random.default_rng((run.seed, step, 2)), run.rng(step)
        pairs = draw.choice(len(pictures) // 2, run.batch // 2, replace=False)
        indices = np.sort(np.concatenate([2 * pairs, 2 * pairs + 1]))
        ids, targets, code = pictures.said(indices, draw.integers(pictures.captions.shape[1], size=run.batch))
        pixels = normalise(pictures.batch(indices)).to(device)
        with run.autocast():
            with Disturbed(text.token_embedding, known.to(device), NOISE * LENGTH, generator):
                t = text(crop_ids(ids, tokenizer.end_id).to(device)).pooled.float()
            v = image(pixels).float()
            alone = read_names(draw, generator)
        text_facts, text_right = facts_loss(heads.text, t, targets)
        image_facts, image_right = facts_loss(heads.image, v, targets)
        image_code = code_loss(heads.image_code(v), code.to(device))
        contrast = contrastive_loss(t, v, heads.logit_scale.exp().clamp(max=100))
        loss = contrast + FACT_WEIGHT * (text_facts + image_facts) + CODE_WEIGHT * (image_code + alone)
        values = {"contrast": contrast.item(), "text": text_right, "image": image_right}
        return loss, values | {"names": alone.item(), "seen": image_code.item()}

    preview = Preview(run, tokenizer)
    train(run, {"text_encoder": text, "image_encoder": image, "heads": heads}, loss_of, preview, every=200)


class Preview:
    """How well captions and pictures never seen find each other, and names are understood."""

    def __init__(self, run: Run, tokenizer: Tokenizer) -> None:
        self.run, self.tokenizer = run, tokenizer
        self.pixels = normalise(to_pixels(np.stack([picture_at(i, TEST_SEED) for i in range(0, 400, 2)])))
        said = [captions_at(i, TEST_SEED) for i in range(0, 400, 2)]
        self.full = [max(c, key=lambda c: len(c.facts)) for c in said]
        self.random = [c[0] for c in said]
        things = list(names.trained().values())[:200]
        scenes = [Scene((named_thing(thing),), "gray", "photo", detail=i) for i, thing in enumerate(things)]
        self.named = normalise(to_pixels(np.stack([render(s) for s in scenes])))
        self.prompts = [f"a photo of a {thing.name}" for thing in things]
        strange = [*names.held_out_things().values(), *names.held_out_combinations().values()]
        self.strange = torch.from_numpy(np.stack([meaning(thing) for thing in strange]))

    @torch.no_grad()
    def __call__(self, ema: dict[str, nn.Module], step: int) -> None:
        text, image, heads = ema["text_encoder"], ema["image_encoder"], ema["heads"]

        def features(ids: Tensor) -> Tensor:
            return text(ids.to(self.run.device)).pooled

        def retrieval(ids: Tensor, pixels: Tensor) -> float:
            t = F.normalize(features(ids), dim=-1)
            v = F.normalize(image(pixels.to(self.run.device)), dim=-1)
            hits = [  # among 100 pictures; whose caption is said of two, counts for neither
                int((t[i] @ v[k : k + 100].T).argmax()) == i - k for k in range(0, len(v), 100) for i in range(k, k + 100)
            ]
            return sum(hits) / len(hits)

        full, random = (decode_captions(encode_captions(c, self.tokenizer))[0] for c in (self.full, self.random))
        bare = self.tokenizer(self.prompts)
        found = heads.text_code(features(bare)).cpu()
        table = text.token_embedding.weight
        word = bare[:1].repeat(len(self.strange), 1).to(self.run.device)
        place = word == name_ids(self.tokenizer)[0].to(word)
        with Disturbed(text.token_embedding, name_ids(self.tokenizer).to(word), 0.0, torch.Generator()) as moved:
            new = vectors(self.strange, table.shape[1], LENGTH).to(table) - table[name_ids(self.tokenizer)[0]]
            moved.mixed = place[..., None] * new[:, None]
            unseen = heads.text_code(features(word)).cpu()
        spread = (meanings() - meanings().mean(0)).square().mean()
        colors = self.tokenizer([f"a photo of a {c} cup" for c in COLORS])
        f = F.normalize(features(colors), dim=-1)
        alike = (f @ f.T - 2 * torch.eye(len(f), device=f.device)).max().item()
        print(
            f"clip step {step}: among 100: detailed captions {retrieval(full, self.pixels):.3f}, random "
            f"{retrieval(random, self.pixels):.3f}, bare names {retrieval(bare, self.named):.3f}; meaning "
            f"explained: names {1 - (found - meanings()[:200]).square().mean() / spread:.3f}, vectors never met "
            f"{1 - (unseen - self.strange).square().mean() / spread:.3f}; length of names "
            f"{table[name_ids(self.tokenizer)].norm(dim=1).mean():.2f}, of all {table.norm(dim=1).mean():.2f}; "
            f"most similar two colours have cosine {alike:.2f}",
            flush=True,
        )
