"""The judge: a small convolutional network that reads shape, colours, pattern, background and style.

It has only ever seen rendered pictures, whose truth is known exactly, some of them repainted by the model
that it is to judge; fresh ones tell how far it can be trusted. One thing a picture; of two-coloured things
the first colour is the main one. Unlike the models it judges it knows the concepts and what else is held
out, so that it can tell whether they were learned. Of the names it knows some; every other shape is "" to
it.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minti.cli.progress import Progress
from minti.errors import InputError
from minti.formats.atomic import write_atomically
from minti.model.stable_diffusion import Predict, StableDiffusion
from minti.study.classifier import Judge, Probe

from . import names
from .captions import FACTS
from .concepts import held_out, pictures, riso_picture
from .contexts import weights_hash
from .data import PICTURE, TEST_SEED, Pictures, append, fill, records, scene_at, to_pixels
from .draw import render
from .training import Run, read, train
from .unet import load_model
from .world import BACKGROUNDS, NOUNS, TOY_NAMES, Scene, Thing, named_thing, scene, stands_out

ACCURACY = "accuracy.json"  # on fresh pictures of the concepts
PROBE_SEED = 2  # of the pictures it learns from: neither the training set's nor the held-out ones
# Pictures of what it must know best; of those, repainted; of the world.
SPECIAL, REPAINTED, WORLD = 36_000, 12_000, 24_000
PART = 100  # pictures repainted at a time
STEPS, WALKED = 20, range(8)  # DDIM steps from noise to picture; how many of the last ones a picture may walk
OBJECTS = tuple(c for c in held_out().values() if c.kind == "object")
KNOWN_NAMES = TOY_NAMES[:200]
HELD_OUT = {**names.held_out_things(), **names.held_out_combinations()}
READS = FACTS | {
    "noun": ("", *NOUNS, *(c.name for c in OBJECTS), *KNOWN_NAMES, *HELD_OUT),
    "style": (*FACTS["style"], "riso"),
}
Example = tuple[np.ndarray, dict[str, str]]  # a picture, (64, 64, 3) uint8, and the facts it shows


def facts_of(scene: Scene) -> dict[str, str]:
    thing = scene.things[0]
    return {
        "noun": thing.noun if thing.noun in READS["noun"] else "",
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
    found = []
    for i, original in enumerate(single_scenes(seed, count, start)):
        concept = OBJECTS[i % len(OBJECTS)]
        found.append(example(original, concept.thing, own_look=i % 3 == 0, riso=i % 5 == 0))
    return found


def example(original: Scene, shown: Thing, own_look: bool, riso: bool = False) -> Example:
    return rendered(shown_instead(original, shown, own_look), riso)


def shown_instead(original: Scene, shown: Thing, own_look: bool) -> Scene:
    """Another thing in the place of a scene's, in that one's colours and pattern or in its own."""
    (thing,) = original.things
    look = shown if own_look else thing
    shape = {"noun": shown.noun, "parts": shown.parts, "stripes": shown.stripes if own_look else None}
    shape |= {"kind": shown.kind, "factors": shown.factors}
    new = replace(thing, color=look.color, color2=look.color2, pattern=look.pattern, **shape)
    background = original.background
    while not stands_out(new, background):
        background = BACKGROUNDS[(BACKGROUNDS.index(background) + 1) % len(BACKGROUNDS)]
    return replace(original, things=(new,), background=background)


def rendered(scene: Scene, riso: bool) -> Example:
    facts = facts_of(scene)
    if riso:
        return riso_picture(scene.things[0], scene.detail), {"noun": facts["noun"], "style": "riso"}
    return render(scene), facts


def special_scene(i: int, seed: int = PROBE_SEED) -> tuple[Scene, bool]:
    """Number `i` of what the probe must know best, concepts, what is held out, names, nouns; if in riso."""
    (original,) = single_scenes(seed, 1, 100 * i)
    rng = np.random.default_rng((seed, i, 5))
    which = i % 10
    if which < 3:
        shown = OBJECTS[int(rng.integers(len(OBJECTS)))].thing
    elif which < 6:
        shown = named_thing(HELD_OUT[str(rng.choice(list(HELD_OUT)))])
    elif which < 9:
        shown = named_thing(names.trained()[str(rng.choice(KNOWN_NAMES))])
    else:
        shown = replace(original.things[0], noun=str(rng.choice(list(NOUNS))), parts=(), kind="", factors=())
    own_look, riso = rng.random() < 0.4, rng.random() < 0.05
    return shown_instead(original, shown, own_look), riso


def special_example(i: int, seed: int = PROBE_SEED) -> Example:
    return rendered(*special_scene(i, seed))


def special_picture(i: int) -> np.ndarray:
    return special_example(i)[0]


def photo_examples() -> list[Example]:
    """The pictures that concepts are learned from, and their mirror images."""
    found = []
    for concept in OBJECTS:
        thing = concept.thing
        facts = {"noun": thing.noun, "color": thing.color, "color2": thing.color2, "pattern": thing.pattern}
        found += [(p, facts) for picture in pictures(concept) for p in (picture, picture[:, ::-1])]
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


@torch.no_grad()
def repaint(sd: StableDiffusion, shown: np.ndarray, walked: int, seed: int = 0) -> np.ndarray:
    """Pictures, (N, 64, 64, 3), as a model finishes noisy versions of them, in the last steps and without a
    prompt: what they show stays, the strokes are the model's. Walking no steps is the autoencoder alone."""
    path, found = sd.schedule.timesteps(STEPS)[STEPS - walked :], []

    def sampler(predict: Predict, _: Tensor) -> Iterator[Tensor]:
        x = sd.schedule.q_sample(z0, eps, path[0][0])
        for t, t_prev in path:
            x = sd.schedule.ddim_step(predict(x, t), x, t, t_prev, 0.0, x)
            yield x

    for i, pixels in enumerate(to_pixels(shown).split(PART)):
        z0 = latents = sd.vae.encode(pixels.to(sd.device)).mean * sd.vae.config.scaling_factor
        if walked:
            eps = torch.randn(z0.shape, generator=torch.Generator().manual_seed(seed + i)).to(z0)
            how = {"steps": STEPS, "guidance_scale": 1.0, "sampler": sampler}
            *_, latents = sd.denoise([""] * len(z0), range(len(z0)), **how)
        found += [np.asarray(image) for image in sd.decode_latents(latents)]
    return np.stack(found)


def told_of_repainted(facts: dict[str, str]) -> dict[str, str]:
    """What stays when a picture is repainted: not the style of prints, which the model has never seen."""
    return {fact: value for fact, value in facts.items() if value != "riso"}


def training_set(run: Run, sd: StableDiffusion) -> tuple[list[np.ndarray], list[dict[str, str]]]:
    """Pictures from three sources, special ones, repainted ones and the world's; the facts of all."""
    path, again = run.folder / "special.u8", run.folder / "repainted.u8"
    run.folder.mkdir(parents=True, exist_ok=True)
    fill(replace(run, steps=SPECIAL), path, PICTURE, np.uint8, special_picture)
    special = records(path, PICTURE, np.uint8)
    made_with, model = run.folder / "unet.sha256", weights_hash(run.work, "unet", "unet")
    if made_with.is_file() and made_with.read_text() != model:
        raise InputError(f"{again}: of an older UNet; delete the folder and run `probe` again")
    made_with.write_text(model)
    count, done = min(REPAINTED, len(special)), len(records(again, PICTURE, np.uint8))
    progress = Progress(-(-count // PART), "part", -(-done // PART))
    while done < count:
        append(
            again, PICTURE, repaint(sd, special[done : done + PART], done // PART % len(WALKED), seed=done)
        )
        done += PART
        progress.step()
    progress.close()
    facts = []
    for scene_of, riso in map(special_scene, range(len(special))):
        found = facts_of(scene_of)
        facts.append({"noun": found["noun"], "style": "riso"} if riso else found)
    world = Pictures(run.work, WORLD).pixels
    scenes = [scene_at(i) for i in range(len(world))]
    single = [i for i, s in enumerate(scenes) if len(s.things) == 1 and s.look != "cropped"]
    shown = [special, records(again, PICTURE, np.uint8)[:count], world[single]]
    told = [told_of_repainted(found) for found in facts[:count]]
    return shown, facts + told + [facts_of(scenes[i]) for i in single]


def stage(run: Run) -> None:
    torch.manual_seed(run.seed)
    model = Probe(READS)
    if run.start:
        old, own = read(run.start / "probe" / "model.safetensors"), model.state_dict()
        fitting = {k: v for k, v in old.items() if k in own and own[k].shape == v.shape}
        model.load_state_dict(own | fitting)
    model = model.to(run.device, memory_format=torch.channels_last)
    sd = load_model(run.work, run.device)
    sources, truths = training_set(run, sd)
    pixels, ends = np.concatenate(sources), np.cumsum([0, *map(len, sources)])
    targets = {  # -100: not to be read
        fact: torch.tensor([values.index(t[fact]) if fact in t else -100 for t in truths])
        for fact, values in READS.items()
    }
    tests = {
        "the world": world_examples(TEST_SEED, 300, 100_000),
        "the concepts": concept_examples(TEST_SEED, 300, 150_000),
        "what is held out": [special_example(10 * i + 3 + i % 3, TEST_SEED) for i in range(300)],
        "photos and mirror images": photo_examples(),
    }
    for name, test in list(tests.items())[1:]:
        shown = np.stack([picture for picture, _ in test])
        for walked in WALKED[:: len(WALKED) - 1]:
            told = [told_of_repainted(facts) for _, facts in test]
            again = zip(repaint(sd, shown, walked), told, strict=True)
            tests[f"{name}, repainted in the last {walked} of {STEPS} steps"] = list(again)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        draw = np.random.default_rng((run.seed, step, 4))
        source = np.arange(run.batch) % len(sources)  # as many of each
        rows = draw.integers(ends[source], ends[source + 1])
        x = to_pixels(pixels[rows])
        x = torch.roll(x, tuple(draw.integers(-3, 4, 2)), dims=(2, 3))
        x = torch.where(torch.from_numpy(draw.random(run.batch) < 0.5)[:, None, None, None], x.flip(3), x)
        x = x + float(draw.random() * 0.06) * torch.randn(x.shape, generator=run.rng(step))
        with run.autocast():
            logits = model(x.to(run.device).contiguous(memory_format=torch.channels_last))
        return sum(F.cross_entropy(logits[f].float(), targets[f][rows].to(run.device)) for f in READS), {}

    def preview(ema: dict[str, nn.Module], step: int) -> None:
        for name, test in tests.items():
            test_pixels = to_pixels(np.stack([picture for picture, _ in test])).to(run.device)
            result = shares([facts for _, facts in test], ema["probe"].read(test_pixels))
            accuracy = {fact: round(share, 4) for fact, (share, n) in result.items() if n}
            if name == "the concepts":  # which is what it is shipped for
                write_atomically(run.folder / ACCURACY, json.dumps(accuracy).encode())
            print(f"probe step {step}, {name}: {accuracy}", flush=True)

    train(run, {"probe": model}, loss_of, preview)


def probe_of(checkpoint: Path) -> Probe:
    """The probe that a checkpoint is shipped with. Raises InputError if there is none."""
    if (judge := Judge.load(checkpoint)) is None:
        raise InputError(f"{checkpoint}: has no folder probe; `python tools/make_tiny export` writes one")
    return judge.probe
