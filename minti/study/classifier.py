"""What pictures of a small world really show, read by a classifier that was trained on that world.

CLIP says how similar pictures and texts are, which is not the same as whether a picture is right. Everything
about the world of weights/tiny is known, and a classifier that was trained on its renderings reads the shape,
colours, pattern, background and style of a picture. It cannot judge pictures of two things.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..errors import InputError, check_number
from ..formats.json_checks import read_json
from ..formats.weightfile import WeightFile
from ..judge.scores import Score, Term, bootstrap

Facts = Mapping[str, str]  # such as {"color": "red", "background": "snow"}


class Probe(nn.Module):
    """(B, 3, 64, 64) pixels in [-1, 1] -> for each fact, logits over its values.

    Args:
        facts: fact -> the values it can take.
    """

    SIZE = 64

    def __init__(self, facts: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.facts = facts
        channels, width = (3, 32, 64, 96, 128), 128
        self.convs = nn.ModuleList()
        for c_in, c_out in pairwise(channels):
            self.convs.append(
                nn.Sequential(
                    nn.Conv2d(c_in, c_out, 3, stride=2, padding=1),
                    nn.GroupNorm(8, c_out),
                    nn.ReLU(),
                    nn.Conv2d(c_out, c_out, 3, padding=1),
                    nn.GroupNorm(8, c_out),
                    nn.ReLU(),
                )
            )
        self.hidden = nn.Linear(channels[-1] * (self.SIZE // 16) ** 2, width)
        self.heads = nn.ModuleDict({fact: nn.Linear(width, len(values)) for fact, values in facts.items()})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        x = pixels
        for conv in self.convs:
            x = conv(x)
        h = F.relu(self.hidden(x.flatten(1)))
        return {fact: head(h) for fact, head in self.heads.items()}

    @torch.no_grad()
    def read(self, pixels: Tensor, batch: int = 100) -> list[dict[str, str]]:
        """The facts of each picture: (n, 3, SIZE, SIZE) in [-1, 1] -> n dictionaries, fact -> value."""
        results: list[dict[str, str]] = []
        for part in pixels.split(batch):
            best = {fact: logits.argmax(-1).tolist() for fact, logits in self(part).items()}
            results += [{f: values[best[f][i]] for f, values in self.facts.items()} for i in range(len(part))]
        return results


@dataclass(frozen=True)
class Truth:
    """How often pictures show what they should, 0 to 1; None where there was nothing to read.

    Attributes:
        kept: the share of right facts of the concept in pictures of the prompt for reconstruction, which is
            what CLIP-I is to estimate.
        kept_edited: the same in pictures of the other prompts.
        followed: the share of right facts among those that the other prompts ask for, which is what CLIP-T is
            to estimate.
        asked: the other prompts that ask for a fact.
        facts: for each fact of the concept its share in pictures of all prompts that do not ask for another.
    """

    kept: Score | None
    kept_edited: Score | None
    followed: Score | None
    asked: Sequence[str] = ()
    facts: Mapping[str, Score] = field(default_factory=dict)


@dataclass
class Judge:
    """A probe, and what the prompts of its world ask for.

    Attributes:
        phrases: words of a prompt, with {} for the concept -> the facts that they ask for.
        accuracy: the share of fresh pictures in which it reads each fact right, as far as that is known.
    """

    probe: Probe
    phrases: Mapping[str, Facts]
    accuracy: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Judge | None:
        """Open `probe/` in the folder of a checkpoint; None if there is none. Raises InputError."""
        folder = Path(folder) / "probe"
        if not folder.is_dir():
            return None
        config = read_json(folder / "config.json")
        file = WeightFile(folder / "model.safetensors")
        try:
            facts, phrases, accuracy = config["facts"], config["phrases"], config.get("accuracy", {})
            if not all(isinstance(part, dict) for part in (facts, phrases, accuracy, *phrases.values())):
                raise TypeError("config.json should hold tables")
            for fact, share in accuracy.items():
                check_number(f"{folder / 'config.json'}: accuracy of {fact}", share, float, 0, 1)
            probe = Probe(facts)
            state = file.read(list(file.shapes), copied=True)
            probe.load_state_dict({key: value.float() for key, value in state})
            return cls(probe.eval(), phrases, accuracy)
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            text = " ".join(str(error).split())[:100]
            raise InputError(f"{folder}: does not fit together ({text}); export it again") from None

    def asked(self, template: str) -> dict[str, str] | None:
        """The facts that a prompt asks for; None if the prompt is about two things."""
        if re.search(r"\band\b", template):
            return None
        found: dict[str, str] = {}
        for phrase, facts in self.phrases.items():
            if re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", template):
                found |= facts
        return found

    def check(self, facts: Facts, name: str) -> None:
        """Raises InputError unless these facts of a concept are among what the probe reads."""
        for fact, value in facts.items():
            if value not in self.probe.facts.get(fact, ()):
                known = ", ".join(self.probe.facts.get(fact, self.probe.facts))
                raise InputError(f"concepts: {name} has {fact}: {value!r}; the probe knows {known}")

    def read(self, images: Sequence[Image.Image]) -> list[dict[str, str]] | None:
        """The facts of each picture; None if the pictures do not have the size of the probe's."""
        if any(image.size != (Probe.SIZE, Probe.SIZE) for image in images):
            return None
        pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
        return self.probe.read(pixels.permute(0, 3, 1, 2) / 127.5 - 1)  # (n, H, W, 3) -> (n, 3, H, W)

    def measure(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """What `read` says, as (n, facts) int64 indices of values, for a store; {} if it cannot read them."""
        readings = self.read(images)
        if readings is None:
            return {}
        facts = self.probe.facts
        indices = [[list(values).index(r[fact]) for fact, values in facts.items()] for r in readings]
        return {"facts": torch.tensor(indices)}

    def readings(self, measurements: Mapping[str, Tensor]) -> list[dict[str, str]] | None:
        """What `read` said, from what `measure` returned."""
        if "facts" not in measurements:
            return None
        indices = measurements["facts"].tolist()
        return [{f: v[i] for (f, v), i in zip(self.probe.facts.items(), row, strict=True)} for row in indices]

    def truth(
        self, readings: Mapping[str, Sequence[Facts] | None], facts: Facts, reconstruction: str, seed: int = 0
    ) -> Truth | None:
        """How often pictures are right; each prompt counts the same.

        Args:
            readings: prompt -> the facts of each of its pictures, or None if they could not be read.
            facts: the facts of the concept.
            reconstruction: the prompt that only names the concept.
            seed: of the draws for the intervals; see `scores.bootstrap`.
        """
        plain = self.asked(reconstruction) or {}
        kept, kept_edited, followed, telling = [], [], [], []
        each: dict[str, list[Term]] = {}
        for template, found in readings.items():
            asked = self.asked(template)
            if asked is None or found is None:
                continue
            # Told to be red, a thing in two colours may give up either.
            own = {f: v for f, v in facts.items() if not (f in ("color", "color2") and "color" in asked)}
            wanted = {f: v for f, v in asked.items() if plain.get(f) != v}
            for fact, value in own.items():
                each.setdefault(fact, []).append(_share({fact: value}, found))
            if own:
                (kept if template == reconstruction else kept_edited).append(_share(own, found))
            if wanted and template != reconstruction:
                followed.append(_share(wanted, found))
                telling.append(template)
        if not (kept or kept_edited or followed):
            return None
        scores = (bootstrap(shares, seed) if shares else None for shares in (kept, kept_edited, followed))
        by_fact = {fact: bootstrap(shares, seed) for fact, shares in each.items()}
        return Truth(*scores, tuple(telling), by_fact)


def _share(facts: Facts, readings: Sequence[Facts]) -> Term:
    """The share of right facts in pictures, as `bootstrap` takes it."""
    right = torch.tensor([[reading[fact] == value for fact, value in facts.items()] for reading in readings])
    shares = right.float().mean(dim=1)  # (n, facts) -> (n,)
    return (lambda weights: weights @ shares), len(shares)
