"""The text encoder of CLIP, which comes first: it learns to say what captions mean, before it sees a picture.

Linear probes have to tell a caption's facts, and the factors of the thing it speaks of, from the feature that
it will share with pictures. So the features of "red" and "orange" become as unlike as those of "red" and
"cup", which the UNet needs in order to bind colours to things. And in every step it reads names that were
moved about or mixed in pairs: what the probes find must move and mix with them.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minti.formats import configs
from minti.formats.vocabulary import read_tokenizer
from minti.model.clip import CLIPTextModel
from minti.model.tokenizer import Tokenizer

from . import models, names
from .captions import FACTS, PHOTO_TEMPLATES
from .colors import COLORS
from .data import Pictures
from .kinds import code_layout
from .training import Run, ema_of, read, train
from .words import LOOK, NOISE, Disturbed, begin, fitted_vectors, meaning, meanings, name_ids

CODE_WEIGHT, NAME_WEIGHT = 2.0, 3.0
NAMES = 128  # read on their own in every step
SHORT = 12  # tokens of a template with a name in it, and some to spare


class Heads(nn.Module):
    """Linear probes of a feature: for each fact its classes, and a code. Not part of what is shipped."""

    def __init__(self, codes: int) -> None:
        super().__init__()
        self.facts = nn.ModuleDict({f: nn.Linear(models.CONTEXT, len(v)) for f, v in FACTS.items()})
        self.code = nn.Linear(models.CONTEXT, codes)

    def facts_loss(self, features: Tensor, targets: dict[str, Tensor]) -> tuple[Tensor, float]:
        """Mean cross-entropy over the facts, and the share of facts told right."""
        total, right, count = torch.zeros((), device=features.device), 0, 0
        for fact, head in self.facts.items():
            target = targets[fact].to(features.device)
            logits = head(features)
            if (target >= 0).any():
                total = total + F.cross_entropy(logits, target, ignore_index=-100)
            right += int((logits.argmax(-1) == target).sum())
            count += int((target >= 0).sum())
        return total / len(self.facts), right / max(1, count)


def code_loss(found: Tensor, target: Tensor) -> Tensor:
    """Mean square over those parts of the code that are known, which are not NaN."""
    known = target.isfinite()
    return (found - target.nan_to_num())[known].square().sum() / known.sum().clamp(min=1)


def crop_ids(ids: Tensor, end_id: int) -> Tensor:
    """Leave out the padding that all prompts of a batch share; what is before it does not see it."""
    return ids[:, : int((ids == end_id).int().argmax(dim=1).max()) + 1]


def load_text_encoder(work: Path, tokenizer: Tokenizer, device: torch.device) -> CLIPTextModel:
    """As the stage `text` left it, frozen."""
    text = CLIPTextModel(configs.text_config(models.text_config(len(tokenizer)), "text_encoder"))
    text.load_state_dict(ema_of(work, "text")["text_encoder"])
    return text.to(device).eval().requires_grad_(False)


def fresh(run: Run, tokenizer: Tokenizer) -> CLIPTextModel:
    """As it begins: from nothing, or with the weights and the common words of `run.start`, the names too if
    that has met them."""
    text = CLIPTextModel(configs.text_config(models.text_config(len(tokenizer)), "text_encoder"))
    table = text.token_embedding.weight
    met = False
    nn.init.normal_(table, std=0.02)
    nn.init.normal_(text.text_model.embeddings.position_embedding.weight, std=0.01)
    if run.start:
        state = read(run.start / "text_encoder" / "model.safetensors")
        old = state.pop("text_model.embeddings.token_embedding.weight")
        theirs = read_tokenizer(run.start / "tokenizer").vocab
        text.load_state_dict(state, strict=False)
        met = f"{list(names.trained())[-1]}</w>" in theirs
        common = [(token, i) for token, i in tokenizer.vocab.items() if token in theirs]
        with torch.no_grad():
            table[[i for _, i in common]] = old[[theirs[token] for token, _ in common]]
    if not met:
        begin(table, tokenizer)
    return text


class Names:
    """Prompts with names, for the text encoder; which of them, moved how far, is drawn anew each time."""

    def __init__(self, text: CLIPTextModel, heads: Heads, tokenizer: Tokenizer, device: torch.device) -> None:
        self.text, self.heads, self.known = text, heads, name_ids(tokenizer).to(device)
        texts = [[t.format(name) for name in names.trained()] for t in PHOTO_TEMPLATES[""]]
        self.templates = [tokenizer(t)[:, :SHORT].to(device) for t in texts]
        self.means = meanings().to(device)
        self.spread = (self.means - self.means.mean(0)).square().mean()

    def loss(self, draw: np.random.Generator, generator: torch.Generator) -> Tensor:
        """What is not explained of their meanings, 1 for a constant guess. Half of the names are mixed with
        another, all of them are moved."""
        device, embedding = self.known.device, self.text.token_embedding
        first, second = torch.from_numpy(draw.integers(len(self.known), size=(2, NAMES))).to(device)
        share = torch.from_numpy(draw.random((NAMES, 1), dtype=np.float32)).to(device)
        share[::2] = 0
        ids = self.templates[int(draw.integers(len(self.templates)))][first]
        step = share * (embedding.weight[self.known[second]] - embedding.weight[self.known[first]])
        with Disturbed(embedding, self.known, NOISE, generator, step):
            found = self.heads.code(self.text(ids).pooled.float())
        target = self.means[first].lerp(self.means[second], share)
        return F.mse_loss(found, target) / self.spread


def stage(run: Run) -> None:
    pictures = Pictures(run.work)
    torch.manual_seed(run.seed)
    text, heads = fresh(run, pictures.tokenizer).to(run.device), Heads(len(code_layout()) + LOOK)
    heads = heads.to(run.device)
    named = Names(text, heads, pictures.tokenizer, run.device)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        draw, generator = np.random.default_rng((run.seed, step, 2)), run.rng(step)
        rows = np.sort(draw.choice(len(pictures), run.batch, replace=False))
        ids, targets, code = pictures.said(rows, draw.integers(pictures.captions.shape[1], size=run.batch))
        ids = crop_ids(ids, pictures.tokenizer.end_id).to(run.device)
        with run.autocast(), Disturbed(text.token_embedding, named.known, NOISE, generator):
            features = text(ids).pooled.float()
        facts, right = heads.facts_loss(features, targets)
        said = code_loss(heads.code(features)[:, : code.shape[1]], code.to(run.device))
        with run.autocast():
            alone = named.loss(draw, generator)
        loss = facts + CODE_WEIGHT * said + NAME_WEIGHT * alone
        return loss, {"facts": facts.item(), "right": right, "said": said.item(), "names": alone.item()}

    train(run, {"text_encoder": text, "heads": heads}, loss_of, Preview(run, pictures.tokenizer), every=200)


class Preview:
    """How much of their meaning is found in names, and in vectors for things that it never met."""

    def __init__(self, run: Run, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.device = tokenizer, run.device
        strange = [*names.held_out_things().values(), *names.held_out_combinations().values()]
        self.strange = torch.from_numpy(np.stack([meaning(thing) for thing in strange]))

    @torch.no_grad()
    def __call__(self, ema: dict[str, nn.Module], step: int) -> None:
        text, heads = ema["text_encoder"], ema["heads"]
        table, known = text.token_embedding.weight, name_ids(self.tokenizer).to(self.device)
        bare = self.tokenizer([f"a photo of a {name}" for name in names.trained()]).to(self.device)
        found = heads.code(text(bare[:, :SHORT]).pooled).cpu()
        prompt = bare[:1, :SHORT].repeat(len(self.strange), 1)
        step_to = fitted_vectors(self.strange, table[known].cpu()).to(table) - table[known[0]]
        with Disturbed(text.token_embedding, known, 0.0, torch.Generator(), step_to):
            unseen = heads.code(text(prompt).pooled).cpu()
        spread = (meanings() - meanings().mean(0)).square().mean()
        of_names, of_strange = (
            1 - (a - b).square().mean() / spread for a, b in ((found, meanings()), (unseen, self.strange))
        )
        colors = self.tokenizer([f"a photo of a {c} cup" for c in COLORS]).to(self.device)
        f = F.normalize(text(colors).pooled, dim=-1)
        alike = (f @ f.T - 2 * torch.eye(len(f), device=f.device)).max().item()
        print(
            f"text step {step}: meaning explained: of names {of_names:.3f}, of vectors never met "
            f"{of_strange:.3f}; length of names {table[known].norm(dim=1).mean():.2f}; most similar two "
            f"colours have cosine {alike:.2f}",
            flush=True,
        )
