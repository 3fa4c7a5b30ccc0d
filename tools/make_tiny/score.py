"""python tools/make_tiny/score.py --checkpoint weights/tiny --out DIR: how good the tiny model is.

Prompts are fresh, and what they ask for is known exactly. The checkpoint's probe, trained on rendered
pictures, reads what the generated ones show; its own error on fresh renders is reported first.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from PIL import Image

import minti
from minti.cli.command import run_command
from minti.cli.options import Parser, number
from minti.cli.progress import Progress
from minti.formats.concept import Concept
from minti.judge.scorer import Scorer
from minti.model.stable_diffusion import StableDiffusion
from tools.make_tiny import concepts
from tools.make_tiny.captions import TOY_NAMES, Caption, caption
from tools.make_tiny.clip import named_scene
from tools.make_tiny.data import TEST_SEED, to_pixels
from tools.make_tiny.draw import render, sheet
from tools.make_tiny.probe import (
    Probe,
    concept_examples,
    facts_of,
    photo_examples,
    probe_of,
    shares,
    single_scenes,
    special_example,
)
from tools.make_tiny.world import STYLES, Scene

LOOKS = {"small": "small", "large": "large", "close-up": "close-up", "weird": "tilted by up to 30 degrees"}
GOALS = {"noun": 0.93, "color": 0.95, "pattern": 0.92, "background": 0.97, "style": 0.97}


def pixels_of(images: Sequence) -> torch.Tensor:
    return to_pixels(np.stack([np.asarray(image) for image in images]))


def psnr(sd: StableDiffusion, count: int) -> tuple[float, float]:
    """Of the autoencoder on fresh pictures, in dB: the mean over pictures, and that of the mean error."""
    pixels = to_pixels(np.stack([render(s) for s in single_scenes(TEST_SEED, count, start=200_000)]))
    with torch.no_grad():
        back = torch.cat([sd.vae.decode(sd.vae.encode(p).mean) for p in pixels.split(50)])
    error = (back.clamp(-1, 1) - pixels).square().mean(dim=(1, 2, 3))
    return float((10 * (4 / error).log10()).mean()), 10 * math.log10(4 / error.mean())


def nameable_scenes(count: int, start: int) -> list[Scene]:
    """Fresh scenes with one thing, whose noun or name the probe knows."""
    found: list[Scene] = []
    while len(found) < count:
        found += [s for s in single_scenes(TEST_SEED, 10, start) if facts_of(s)["noun"]]
        start += 20
    return found[:count]


def full_caption(scene: Scene, rng: np.random.Generator) -> Caption:
    """A caption that names everything about a single thing."""
    wanted = {"noun", "color", "pattern", "background", "style"}
    while True:
        found = caption(scene, rng)
        if wanted <= found.facts.keys():
            return found


def retrieval(scorer: Scorer, pairs: Iterable[tuple[str, Scene]]) -> float:
    """Share of captions whose picture is found among those of 100, all of them different."""
    found, hits = list(dict(pairs).items()), []
    for start in range(0, len(found) - len(found) % 100, 100):
        texts, scenes = zip(*found[start : start + 100], strict=True)
        images = scorer.embed_images([Image.fromarray(render(s)) for s in scenes])
        hits += ((scorer.embed_texts(list(texts)) @ images.T).argmax(dim=1) == torch.arange(100)).tolist()
    return sum(hits) / len(hits)


def retrievals(scorer: Scorer, count: int = 500) -> dict[str, float]:
    """By full captions, by random ones and by bare names."""
    rng, scenes = np.random.default_rng(0), nameable_scenes(count + 50, 300_000)
    bare = [(f"a photo of a {name}", named_scene(i)) for i, name in enumerate(TOY_NAMES[:count])]
    return {
        "full captions": retrieval(scorer, ((full_caption(s, rng).text, s) for s in scenes)),
        "random ones": retrieval(scorer, ((caption(s, rng).text, s) for s in scenes)),
        "bare names": retrieval(scorer, bare),
    }


def prompts(count: int) -> list[Caption]:
    rng = np.random.default_rng(12)
    return [full_caption(s, rng) for s in nameable_scenes(count, 400_000)]


def table(rows: dict[str, dict[str, tuple[float, int]]]) -> str:
    facts = ("noun", "color", "color2", "pattern", "background", "style")
    lines = ["| | " + " | ".join(facts) + " |", "|---" * (len(facts) + 1) + "|"]
    for name, result in rows.items():
        cells = (f"{100 * share:.1f} %" if n else "" for share, n in (result[f] for f in facts))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# Where a concept is asked for, and what pictures should then show.
NEW_PLACES = {
    "a photo of a {} in the snow": {"background": "snow", "style": "photo"},
    "a photo of a {} on the beach": {"background": "beach", "style": "photo"},
    "a photo of a {} on a yellow background": {"background": "yellow", "style": "photo"},
    "a drawing of a {} on the grass": {"background": "grass", "style": "drawing"},
    "a painting of a {} at night": {"background": "night", "style": "painting"},
    "pixel art of a {} in the snow": {"background": "snow", "style": "pixel art"},
}
NEW_THINGS = {
    f"a rendering of a {noun} in the style of {{}}": {"noun": noun}
    for noun in ("ball", "flower", "bunny", "moon", "bird", "ring")
}


def concept_rows(
    sd: StableDiffusion, probe: Probe, learned: Path, options: dict
) -> tuple[dict[str, dict[str, tuple[float, int]]], list[np.ndarray]]:
    """For every concept with a learned word in `learned`: word, best human caption, and no word at all.

    The set's pictures may have any colour: of those it counts how many are not the usual blue.
    """
    rows, pictures = {}, []
    descriptions = concepts.describe()
    for concept in concepts.held_out().values():
        path = learned / concept.name / "learned_embeds.safetensors"
        if not path.is_file():
            continue
        word = f"<{concept.name}>"
        sd.add_concept(Concept.load(path, placeholder=word))
        places = NEW_THINGS if concept.kind == "style" else NEW_PLACES
        own = {"noun": "bird"} if concept.kind == "set" else descriptions[concept.name]["facts"]
        truths = [facts | own for facts in places.values() for _ in range(4)]
        for kind, subject in (("word", word), ("caption", concept.caption), ("without", concept.init)):
            images = sd.sample([place.format(subject) for place in places], num_images=4, **options)
            read = probe.read(pixels_of(images))
            rows[f"{concept.name}, {kind}"] = shares(truths, read)
            if concept.kind == "set":
                other = sum(r["color"] != "blue" for r in read) / len(read)
                print(f"{concept.name}, {kind}: {100 * other:.1f} % are not blue")
            pictures += [np.asarray(image) for image in images]
    return rows, pictures


def main(argv: Sequence[str] | None) -> None:
    parser = Parser(prog="python tools/make_tiny/score.py", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the table and pictures")
    parser.add_argument("--prompts", type=number(int, 1), default=500)
    parser.add_argument("--steps", type=number(int, 1), default=50)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument(
        "--learned", type=Path, help="folder with NAME/learned_embeds.safetensors of concepts"
    )
    args = parser.parse_args(argv)
    probe, out = probe_of(args.checkpoint), args.out
    out.mkdir(parents=True, exist_ok=True)
    options = {"steps": args.steps, "guidance_scale": args.guidance_scale, "batch_size": 50}

    rows, sd = {}, minti.load(args.checkpoint, device="cpu", dtype="float32")
    test = nameable_scenes(600, 500_000)
    renders = to_pixels(np.stack([render(s) for s in test]))
    rows["probe on fresh renders"] = shares([facts_of(s) for s in test], probe.read(renders))
    for name, examples in (
        ("concepts", concept_examples(TEST_SEED, 500, start=550_000)),
        ("held-out things", [special_example(10 * i + 3 + i % 3, TEST_SEED) for i in range(500)]),
        ("the concepts' photos and mirror images", photo_examples()),
    ):
        facts = [facts for _, facts in examples]
        shown = to_pixels(np.stack([picture for picture, _ in examples]))
        rows[f"probe on fresh renders: {name}"] = shares(facts, probe.read(shown))
        with torch.no_grad():
            back = torch.cat([sd.vae.decode(sd.vae.encode(p).mean) for p in shown.split(50)])
        rows[f"the same after the autoencoder: {name}"] = shares(facts, probe.read(back))
    varied = nameable_scenes(2000, 700_000)
    groups = {style: [s for s in varied if s.style == style] for style in STYLES}
    groups |= {name: [s for s in varied if s.look == look] for look, name in LOOKS.items()}
    for name, scenes in groups.items():
        read = probe.read(to_pixels(np.stack([render(s) for s in scenes])))
        rows[f"probe on fresh renders: {name}"] = shares([facts_of(s) for s in scenes], read)
    with torch.no_grad():
        back = torch.cat([sd.vae.decode(sd.vae.encode(p).mean) for p in renders.split(50)])
    rows["probe after the autoencoder"] = shares([facts_of(s) for s in test], probe.read(back))
    mean, overall = psnr(sd, 200)
    print(f"autoencoder: {mean:.2f} dB (mean over pictures), {overall:.2f} dB (of the mean error)")
    found = retrievals(Scorer.load(args.checkpoint))
    print("CLIP, text to image among 100: " + ", ".join(f"{100 * v:.1f} % {k}" for k, v in found.items()))

    asked = prompts(args.prompts)
    progress, images = Progress(-(-len(asked) // 50), "part"), []
    for start in range(0, len(asked), 50):
        part = asked[start : start + 50]
        seeds = range(start, start + len(part))  # no two pictures begin with the same noise
        *_, latents = sd.denoise(
            [c.text for c in part], seeds, steps=args.steps, guidance_scale=args.guidance_scale
        )
        images += sd.decode_latents(latents)
        progress.step()
    progress.close()
    read = probe.read(pixels_of(images))
    rows["generated"] = shares([c.facts for c in asked], read)
    named = [i for i, c in enumerate(asked) if c.facts["noun"] not in TOY_NAMES]
    rows["generated, without names"] = shares([asked[i].facts for i in named], [read[i] for i in named])
    sheet([np.asarray(image) for image in images[:128]], 16).save(out / "samples.png")
    (out / "prompts.txt").write_text("\n".join(c.text for c in asked) + "\n", encoding="utf-8")
    if args.learned:
        more, pictures = concept_rows(sd, probe, args.learned, options)
        rows |= more
        if pictures:
            sheet(pictures, 24).save(out / "concepts.png")
    report = table(rows)
    (out / "table.md").write_text(report + "\n", encoding="utf-8")
    print(report)
    missed = [f for f, goal in GOALS.items() if rows["generated"][f][0] < goal]
    print("goals missed: " + (", ".join(missed) or "none"))


if __name__ == "__main__":
    run_command("make_tiny/score", main)
