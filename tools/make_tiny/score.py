"""python tools/make_tiny/score.py --checkpoint weights/tiny --work DIR: how good the tiny model is.

Prompts are fresh, and what they ask for is known exactly. A probe trained on rendered pictures (`make_tiny
probe`) reads what the generated ones show; its own error on fresh renders is reported first.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.nn.functional as F

import minti
from minti import cli
from minti.clip import CLIPVisionModel
from minti.concept import Concept
from minti.config import InputError, VisionConfig, read_json
from minti.pipeline import StableDiffusion
from minti.weightfile import WeightFile
from tools.make_tiny import concepts
from tools.make_tiny.captions import TOY_NAMES, Caption, caption
from tools.make_tiny.clip import normalise
from tools.make_tiny.data import TEST_SEED, to_pixels
from tools.make_tiny.draw import render, sheet
from tools.make_tiny.probe import Probe, facts_of, load, shares, single_scenes

GOALS = {"noun": 0.90, "color": 0.90, "pattern": 0.85, "background": 0.90, "style": 0.90}


def pixels_of(images: Sequence) -> torch.Tensor:
    return to_pixels(np.stack([np.asarray(image) for image in images]))


def psnr(sd: StableDiffusion, count: int) -> tuple[float, float]:
    """Of the autoencoder on fresh pictures, in dB: the mean over pictures, and that of the mean error."""
    pixels = to_pixels(np.stack([render(s) for s in single_scenes(TEST_SEED, count, start=200_000)]))
    with torch.no_grad():
        back = torch.cat([sd.vae.decode(sd.vae.encode(p).mean) for p in pixels.split(50)])
    error = (back.clamp(-1, 1) - pixels).square().mean(dim=(1, 2, 3))
    return float((10 * (4 / error).log10()).mean()), 10 * math.log10(4 / error.mean())


def load_image_encoder(folder: Path) -> CLIPVisionModel:
    model = CLIPVisionModel(VisionConfig.from_json(read_json(folder / "config.json"), str(folder)))
    file = WeightFile(folder / "model.safetensors")
    model.load_state_dict({k: v.float() for k, v in file.read(list(file.shapes), copied=True)})
    return model.eval()


def full_caption(scene, rng: np.random.Generator) -> Caption:
    """A caption that names everything about a single thing."""
    wanted = {"noun", "color", "pattern", "background", "style"}
    while True:
        found = caption(scene, rng)
        if wanted <= found.facts.keys():
            return found


@torch.no_grad()
def retrieval(sd: StableDiffusion, folder: Path, rounds: int = 5) -> tuple[float, float]:
    """Share of 100 captions whose picture is found among those of all: full captions, and random ones."""
    image_encoder, rng, results = load_image_encoder(folder), np.random.default_rng(0), []
    for describe in (full_caption, caption):
        hits, start = [], 300_000
        for _ in range(rounds):
            pairs: dict[str, object] = {}
            while len(pairs) < 100:
                scene = single_scenes(TEST_SEED, 1, start)[0]
                start += 3
                pairs.setdefault(describe(scene, rng).text, scene)
            images = image_encoder(normalise(to_pixels(np.stack([render(s) for s in pairs.values()]))))
            texts = sd.text_encoder(sd.tokenizer(list(pairs))).pooled
            best = (F.normalize(texts, dim=-1) @ F.normalize(images, dim=-1).T).argmax(dim=1)
            hits += (best == torch.arange(100)).tolist()
        results.append(sum(hits) / len(hits))
    return results[0], results[1]


def prompts(count: int) -> list[Caption]:
    rng = np.random.default_rng(12)
    return [full_caption(s, rng) for s in single_scenes(TEST_SEED, count, start=400_000)]


def table(rows: dict[str, dict[str, tuple[float, int]]]) -> str:
    facts = ("noun", "color", "color2", "pattern", "background", "style")
    lines = ["| | " + " | ".join(facts) + " |", "|---" * (len(facts) + 1) + "|"]
    for name, result in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{100 * result[f][0]:.1f} %" for f in facts) + " |")
    return "\n".join(lines)


# Where a concept is asked for: (prompt, background, style)
NEW_PLACES = (
    ("a photo of a {} in the snow", "snow", "photo"),
    ("a photo of a {} on the beach", "beach", "photo"),
    ("a photo of a {} on a yellow background", "yellow", "photo"),
    ("a drawing of a {} on the grass", "grass", "drawing"),
    ("a painting of a {} at night", "night", "painting"),
    ("pixel art of a {} in the snow", "snow", "pixel art"),
)


def concept_rows(sd: StableDiffusion, probe: Probe, learned: Path, options: dict) -> tuple[dict, list]:
    """For every concept with a learned word in `learned`: word, best human caption, and no word at all.

    The silhouette has no name, so the probe judges colours, pattern, background and style.
    """
    rows, pictures = {}, []
    for concept in concepts.held_out().values():
        path = learned / concept.name / "learned_embeds.safetensors"
        if concept.kind != "object" or not path.is_file():
            continue
        word = f"<{concept.name}>"
        sd.add_concept(Concept.load(path, placeholder=word))
        for kind, subject in (("word", word), ("caption", concept.caption), ("without", concept.init)):
            texts = [template.format(subject) for template, _, _ in NEW_PLACES]
            images = sd.sample(texts, num_images=4, **options)
            thing = concept.thing
            truths = [
                {
                    "color": thing.color,
                    "color2": thing.color2,
                    "pattern": thing.pattern,
                    "background": b,
                    "style": s,
                }
                for _, b, s in NEW_PLACES
                for _ in range(4)
            ]
            rows[f"{concept.name}, {kind}"] = shares(truths, probe.read(pixels_of(images)))
            pictures += [np.asarray(image) for image in images]
    return rows, pictures


def main(argv: Sequence[str] | None) -> None:
    parser = cli.Parser(prog="python tools/make_tiny/score.py", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of the training stages, with the probe"
    )
    parser.add_argument("--prompts", type=cli.number(int, 1), default=500)
    parser.add_argument("--steps", type=cli.number(int, 1), default=50)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument(
        "--learned", type=Path, help="folder with NAME/learned_embeds.safetensors of concepts"
    )
    args = parser.parse_args(argv)
    if not (args.work / "probe" / "state.pt").is_file():
        raise InputError(
            f"{args.work}: has no probe; run `python tools/make_tiny probe --work {args.work}` first"
        )
    out = args.work / "score"
    out.mkdir(parents=True, exist_ok=True)
    probe, sd = load(args.work), minti.load(args.checkpoint, device="cpu", dtype="float32")
    options = {"steps": args.steps, "guidance_scale": args.guidance_scale, "batch_size": 50}

    test = single_scenes(TEST_SEED, 1000, start=500_000)
    renders = to_pixels(np.stack([render(s) for s in test]))
    rows = {"probe on fresh renders": shares([facts_of(s) for s in test], probe.read(renders))}
    with torch.no_grad():
        back = torch.cat([sd.vae.decode(sd.vae.encode(p).mean) for p in renders.split(50)])
    rows["probe after the autoencoder"] = shares([facts_of(s) for s in test], probe.read(back))
    mean, overall = psnr(sd, 200)
    print(f"autoencoder: {mean:.2f} dB (mean over pictures), {overall:.2f} dB (of the mean error)")
    full, random = retrieval(sd, args.checkpoint / "image_encoder")
    print(
        f"CLIP, text to image among 100: {100 * full:.1f} % full captions, {100 * random:.1f} % random ones"
    )

    asked = prompts(args.prompts)
    progress, images = cli.Progress(-(-len(asked) // 50), "batch"), []
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
    rows["generated, without toys"] = shares([asked[i].facts for i in named], [read[i] for i in named])
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
    cli.run("make_tiny/score", main)
