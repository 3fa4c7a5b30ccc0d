"""python tools/make_tiny/density.py --checkpoint DIR --work DIR: can a word carry what was never shown?

Takes things that training never showed, 50 drawn like the others and 50 with a combination of choices of
their own, learns a word for each from six pictures with the defaults of `minti.train`, paints it in new
places, and asks the probe how often their shape, colours and pattern are there.
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
from minti import cli, train
from minti.concept import Concept
from tools.make_tiny import names
from tools.make_tiny.concepts import object_picture
from tools.make_tiny.data import to_pixels
from tools.make_tiny.draw import sheet
from tools.make_tiny.kinds import KINDS
from tools.make_tiny.probe import load, shares
from tools.make_tiny.score import NEW_PLACES, table
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
    options = {"checkpoint": str(checkpoint), "steps": steps, "batch_size": 4, "lr": 5e-3, "sample_every": 0}
    recipe = out / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(options | {"concepts": entries}))
    if not all((out / "run" / name / "learned_embeds.safetensors").is_file() for name in chosen):
        train.main(["--config", str(recipe), "--out", str(out / "run"), "--device", "cpu"])


def main(argv: Sequence[str] | None) -> None:
    parser = cli.Parser(prog="python tools/make_tiny/density.py", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of the stages, with the probe")
    parser.add_argument("--count", type=cli.number(int, 1), default=50, help="things of either set")
    parser.add_argument("--at-once", type=cli.number(int, 1), default=10, help="words learned in one run")
    parser.add_argument("--steps", type=cli.number(int, 1), default=800)
    args = parser.parse_args(argv)
    probe, places, rows, pictures = load(args.work), list(NEW_PLACES), {}, []
    for which, of_set in SETS.items():
        truths, readings, items = [], [], list(of_set().items())[: args.count]
        for start in range(0, len(items), args.at_once):
            chosen = dict(items[start : start + args.at_once])
            out = args.work / "density" / f"{which}-{start}"
            learn(chosen, args.checkpoint, out, args.steps)
            sd = minti.load(args.checkpoint, device="cpu", dtype="float32")
            for name, thing in chosen.items():
                path = out / "run" / name / "learned_embeds.safetensors"
                sd.add_concept(Concept.load(path, placeholder=f"<{name}>"))
                images = sd.sample([p.format(f"<{name}>") for p in places], steps=25, guidance_scale=4.0)
                shown = [np.asarray(image) for image in images]
                look = {"color": thing.color, "color2": thing.color2 or "", "pattern": thing.pattern}
                truths += [{"noun": name} | look | NEW_PLACES[place] for place in places]
                with torch.no_grad():
                    readings += probe.read(to_pixels(np.stack(shown)))
                pictures += [object_picture(named_thing(thing), 0), *shown]
            print(table({which: shares(truths, readings)}), flush=True)
        rows[f"{len(items)} {which} never shown"] = shares(truths, readings)
    sheet(pictures, 2 * (1 + len(places)), 1).save(args.work / "density" / "sheet.png")
    print(table(rows))


if __name__ == "__main__":
    cli.run("make_tiny/density", main)
