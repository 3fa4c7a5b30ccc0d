"""The judge: a small convolutional network that reads shape, colours, pattern, background and style.

It has only ever seen rendered pictures, whose truth is known exactly; fresh renders tell how far it can
be trusted. One thing a picture; of two-coloured things the first colour is the main one.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minti.files import write_atomically
from minti.study.probe import Probe

from .captions import FACTS
from .data import TEST_SEED, to_pixels
from .draw import render
from .training import Run, ema_of, train
from .world import Scene, scene

ACCURACY = "accuracy.json"  # on fresh pictures
PROBE_SEED = 2  # of the pictures it learns from: neither the training set's nor the held-out ones


def facts_of(scene: Scene) -> dict[str, str]:
    thing = scene.things[0]
    return {
        "noun": thing.noun,
        "color": thing.color,
        "color2": thing.color2 or "",
        "pattern": thing.pattern,
        "background": scene.background,
        "style": scene.style,
    }


def single_scenes(seed: int, count: int, start: int = 0) -> list[Scene]:
    """The first `count` scenes from `start` on that show one thing, all of it, in plain sight."""
    found: list[Scene] = []
    while len(found) < count:
        candidate = scene(seed, start)
        if len(candidate.things) == 1 and candidate.look != "cropped":
            found.append(candidate)
        start += 1
    return found


def shares(
    truths: Sequence[dict[str, str]], readings: Sequence[dict[str, str]]
) -> dict[str, tuple[float, int]]:
    """For each fact: the share of pictures read as they should be, and how many say what they should be."""
    result = {}
    for fact in FACTS:
        pairs = [(t[fact], r[fact]) for t, r in zip(truths, readings, strict=True) if fact in t]
        result[fact] = (sum(a == b for a, b in pairs) / max(1, len(pairs)), len(pairs))
    return result


def stage(run: Run) -> None:
    torch.manual_seed(run.seed)
    model = Probe(FACTS).to(run.device, memory_format=torch.channels_last)
    count = 16_000
    scenes = single_scenes(PROBE_SEED, count)
    pixels = np.stack([render(s) for s in scenes])
    targets = {f: torch.tensor([v.index(facts_of(s)[f]) for s in scenes]) for f, v in FACTS.items()}
    test = single_scenes(TEST_SEED, 1000, start=100_000)
    test_pixels = to_pixels(np.stack([render(s) for s in test])).to(run.device)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        draw = np.random.default_rng((run.seed, step, 4))
        rows = draw.choice(count, run.batch, replace=False)
        x = to_pixels(pixels[rows])
        x = torch.roll(x, tuple(draw.integers(-3, 4, 2)), dims=(2, 3))
        x = x + float(draw.random() * 0.06) * torch.randn(x.shape, generator=run.rng(step))
        with run.autocast():
            logits = model(x.to(run.device).contiguous(memory_format=torch.channels_last))
        return sum(F.cross_entropy(logits[f].float(), targets[f][rows].to(run.device)) for f in FACTS), {}

    def preview(ema: dict[str, nn.Module], step: int) -> None:
        probe: Probe = ema["probe"]
        result = shares([facts_of(s) for s in test], probe.read(test_pixels))
        accuracy = {fact: round(share, 4) for fact, (share, _) in result.items()}
        write_atomically(run.folder / ACCURACY, json.dumps(accuracy).encode())
        print(f"probe step {step}: " + ", ".join(f"{f} {s:.3f}" for f, (s, _) in result.items()), flush=True)

    train(run, {"probe": model}, loss_of, preview)


def load(work: Path) -> Probe:
    probe = Probe(FACTS)
    probe.load_state_dict(ema_of(work, "probe")["probe"])
    return probe.eval()
