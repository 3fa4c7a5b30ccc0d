"""python tools/make_tiny/density.py --checkpoint weights/tiny --out DIR: can words carry the unseen?

Takes things that training never showed, 50 drawn like the others and 50 with a combination of choices of
their own, learns a word for each from six pictures as the recipe `tiny-all` does, paints it in new places,
and asks the probe how often their shape, colours and pattern are there. Beside that: the same for names that
training knows, and for vectors that were not learned but put where their meanings belong.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import yaml
from PIL import Image

import minti
from minti import train
from minti.cli.command import run_command
from minti.cli.options import Parser, number
from minti.cli.yaml_files import read_yaml
from minti.formats.concept import Concept
from tools.make_tiny import names
from tools.make_tiny.concepts import object_picture
from tools.make_tiny.data import to_pixels
from tools.make_tiny.draw import sheet
from tools.make_tiny.kinds import KINDS
from tools.make_tiny.probe import KNOWN_NAMES, Probe, probe_of, shares
from tools.make_tiny.score import NEW_PLACES, table
from tools.make_tiny.words import fitted_vectors, meaning, name_ids
from tools.make_tiny.world import named_thing

SETS = {"things": names.held_out_things, "combinations": names.held_out_combinations}


def learn(chosen: dict[str, names.Named], checkpoint: Path, out: Path, steps: int) -> None:
    """Photos, a recipe, and the words, all learned in one run; from the word for the kind."""
    entries = []
    for name, thing in chosen.items():
        folder = out / "photos" / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(6):
            Image.fromarray(object_picture(named_thing(thing), i)).save(folder / f"{i + 1}.png")
        word = KINDS[thing.kind].words[0]
        entries.append({"name": name, "images": str(folder), "placeholder": f"<{name}>", "init_word": word})
    # As the recipe `tiny-all` has it, but for the words.
    options = read_yaml(Path(minti.__file__).parent / "recipes" / "tiny-all.yaml")
    options |= {"checkpoint": str(checkpoint), "steps": steps, "sample_every": 0, "concepts": entries}
    recipe = out / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(options))
    if not all((out / "run" / name / "learned_embeds.safetensors").is_file() for name in chosen):
        train.main(["--config", str(recipe), "--out", str(out / "run"), "--device", "cpu"])


def paint(
    sd: minti.StableDiffusion, probe: Probe, words: dict[str, names.Named]
) -> tuple[list[dict[str, str]], list[dict[str, str]], list[np.ndarray]]:
    """What pictures of things, each by its word, should show; what the probe reads; the pictures, each row
    behind one that was drawn."""
    truths, readings, pictures = [], [], []
    for word, thing in words.items():
        images = sd.sample([place.format(word) for place in NEW_PLACES], steps=25, guidance_scale=4.0)
        shown = [np.asarray(image) for image in images]
        look = {"color": thing.color, "color2": thing.color2 or "", "pattern": thing.pattern}
        truths += [{"noun": thing.name} | look | asked for asked in NEW_PLACES.values()]
        with torch.no_grad():
            readings += probe.read(to_pixels(np.stack(shown)))
        pictures += [object_picture(named_thing(thing), 0), *shown]
    return truths, readings, pictures


def placed(sd: minti.StableDiffusion, things: dict[str, names.Named]) -> None:
    """Give a model words for things, not learned but put where their meanings belong."""
    known = sd.text_encoder.token_embedding.weight[name_ids(sd.tokenizer)]
    means = torch.from_numpy(np.stack([meaning(thing) for thing in things.values()]))
    for name, vector in zip(things, fitted_vectors(means, known), strict=True):
        sd.add_concept(Concept(f"<{name}>", vector[None]))


def main(argv: Sequence[str] | None) -> None:
    parser = Parser(prog="python tools/make_tiny/density.py", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for photos, words and pictures")
    parser.add_argument("--count", type=number(int, 1), default=50, help="things of either set")
    parser.add_argument("--at-once", type=number(int, 1), default=10, help="words learned in one run")
    parser.add_argument("--steps", type=number(int, 0), default=300, help="0: do not learn words")
    args = parser.parse_args(argv)
    probe, rows, shown = probe_of(args.checkpoint), {}, []
    args.out.mkdir(parents=True, exist_ok=True)

    def record(row: str, sd: minti.StableDiffusion, words: dict[str, names.Named]) -> None:
        found = paint(sd, probe, words)
        rows[row] = [a + b for a, b in zip(rows.get(row, ([], [])), found, strict=False)]
        shown.extend(found[2])
        sheet(shown, 2 * (1 + len(NEW_PLACES)), 1).save(args.out / "sheet.png")
        print(table({row: shares(*rows[row]) for row in rows}), flush=True)

    sd = minti.load(args.checkpoint, device="cpu", dtype="float32")
    record("names that training knows", sd, {n: names.trained()[n] for n in KNOWN_NAMES[: args.count]})
    for which, of_set in SETS.items():
        things = dict(list(of_set().items())[: args.count])
        placed(sd, things)
        record(f"{which}, vectors put in their places", sd, {f"<{n}>": t for n, t in things.items()})
        for start in range(0, len(things) if args.steps else 0, args.at_once):
            chosen = dict(list(things.items())[start : start + args.at_once])
            out = args.out / f"{which}-{start}"
            learn(chosen, args.checkpoint, out, args.steps)
            for name in chosen:
                path = out / "run" / name / "learned_embeds.safetensors"
                sd.add_concept(Concept.load(path, placeholder=f"<{name}-learned>"))
            words = {f"<{n}-learned>": t for n, t in chosen.items()}
            record(f"{which}, learned from six pictures", sd, words)


if __name__ == "__main__":
    run_command("make_tiny/density", main)
