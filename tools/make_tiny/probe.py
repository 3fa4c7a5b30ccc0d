"""The judge: a small convolutional network that reads shape, colours, pattern, background and style.

It has only ever seen rendered pictures, whose truth is known exactly; fresh renders tell how far it can
be trusted. One thing a picture; of two-coloured things the first colour is the main one. Unlike the models it
judges it knows the concepts, so that it can tell whether they were learned.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minti.formats.atomic import write_atomically
from minti.study.classifier import Probe

from .captions import FACTS
from .concepts import held_out, riso_picture
from .data import TEST_SEED, to_pixels
from .draw import render
from .training import Run, ema_of, train
from .world import TOY_NAMES, Scene, scene

ACCURACY = "accuracy.json"  # on fresh pictures of the concepts
PROBE_SEED = 2  # of the pictures it learns from: neither the training set's nor the held-out ones
OBJECTS = tuple(c for c in held_out().values() if c.kind == "object")
READS = FACTS | {
    "noun": (*FACTS["noun"], *(c.name for c in OBJECTS)),
    "style": (*FACTS["style"], "riso"),
}
Example = tuple[np.ndarray, dict[str, str]]  # a picture, (64, 64, 3) uint8, and the facts it shows


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


def world_examples(seed: int, count: int, start: int) -> list[Example]:
    return [(render(s), facts_of(s)) for s in single_scenes(seed, count, start)]


def concept_examples(seed: int, count: int, start: int) -> list[Example]:
    """The concepts' silhouettes in all colours, patterns, places and styles; every fifth in style riso."""
    found: list[Example] = []
    for i, original in enumerate(single_scenes(seed, count, start)):
        (thing,) = original.things
        if i % 5 == 0:
            found.append((riso_picture(thing, i), {"noun": thing.noun, "style": "riso"}))
        elif thing.noun not in TOY_NAMES:  # which have no colours to choose from
            concept = OBJECTS[i % len(OBJECTS)]
            other = replace(thing, noun=concept.name, parts=concept.thing.parts)
            new = replace(original, things=(other,))
            found.append((render(new), facts_of(new)))
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
    model = Probe(READS).to(run.device, memory_format=torch.channels_last)
    examples = world_examples(PROBE_SEED, 32_000, 0) + concept_examples(PROBE_SEED, 10_000, 100_000)
    pixels = np.stack([picture for picture, _ in examples])
    targets = {  # -100: not to be read
        fact: torch.tensor([values.index(facts[fact]) if fact in facts else -100 for _, facts in examples])
        for fact, values in READS.items()
    }
    tests = {
        "the world": world_examples(TEST_SEED, 1000, 100_000),
        "the concepts": concept_examples(TEST_SEED, 500, 150_000),
    }

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        draw = np.random.default_rng((run.seed, step, 4))
        rows = draw.choice(len(pixels), run.batch, replace=False)
        x = to_pixels(pixels[rows])
        x = torch.roll(x, tuple(draw.integers(-3, 4, 2)), dims=(2, 3))
        x = x + float(draw.random() * 0.06) * torch.randn(x.shape, generator=run.rng(step))
        with run.autocast():
            logits = model(x.to(run.device).contiguous(memory_format=torch.channels_last))
        return sum(F.cross_entropy(logits[f].float(), targets[f][rows].to(run.device)) for f in READS), {}

    def preview(ema: dict[str, nn.Module], step: int) -> None:
        for name, test in tests.items():
            test_pixels = to_pixels(np.stack([picture for picture, _ in test])).to(run.device)
            result = shares([facts for _, facts in test], ema["probe"].read(test_pixels))
            accuracy = {fact: round(share, 4) for fact, (share, _) in result.items()}
            if name == "the concepts":  # which is what it is shipped for
                write_atomically(run.folder / ACCURACY, json.dumps(accuracy).encode())
            print(f"probe step {step}, {name}: {accuracy}", flush=True)

    train(run, {"probe": model}, loss_of, preview)


def load(work: Path) -> Probe:
    probe = Probe(READS)
    probe.load_state_dict(ema_of(work, "probe")["probe"])
    return probe.eval()
