"""How good a word is after how many steps: minti's ways of learning beside the recipe of diffusers' example.

The concepts are things of the world of `weights/tiny` that neither training nor the final evaluations have
seen, drawn anew (`make_tiny/names.py`), and the prompts are those for choosing defaults. A run of minti with
N steps is a run of its own, since its learning rate falls to zero by the last step; the peer's rate is
constant, so that its word after N steps is one of its words on the way.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import minti
from minti.cli.yaml_files import read_yaml
from minti.formats.concept import Concept
from minti.formats.photos import load_photos
from minti.formats.views import make_views
from minti.inversion.batches import Settings, Word, sample_batch
from minti.inversion.inversion import Inversion
from minti.inversion.latents import encode_views
from minti.inversion.learn import diffusion_loss
from minti.inversion.optimizers import vocabulary_norm
from minti.inversion.shares import loss_inputs
from minti.inversion.start import initial_rows
from minti.judge.benchmark import Benchmark
from minti.judge.prompts import fill, load_prompts
from minti.judge.scorer import Scorer
from minti.model.fitting import prepare
from minti.study.classifier import Judge
from tools.make_tiny import names
from tools.make_tiny.concepts import object_picture
from tools.make_tiny.kinds import KINDS
from tools.make_tiny.world import named_thing

from .jobs import PEER, Job

TINY = Path(__file__).resolve().parents[2] / "weights" / "tiny"
PEER_LR = 2e-3  # 5e-4 for each of a batch of 4, as the example's README has it with --scale_lr
MINTI = "minti"
WAYS: dict[str, dict[str, Any]] = {
    MINTI: {},
    "direction": {"optimizer": "direction", "lr": 0.1},
    "context 0.1": {"context_weight": 0.1},
    "direction, context 0.1": {"optimizer": "direction", "lr": 0.1, "context_weight": 0.1},
    "t from 400": {"t_min": 400},
    "t to 700": {"t_max": 700},
    "average of 100": {"average": 100},
    "output": {"init": "output"},
    "2e-2": {"lr": 2e-2},
    "5e-3": {"lr": 5e-3},
    "2e-3": {"lr": 2e-3},
    "per layer": {"per_layer": True},
    "output embedding": {"output_embedding": True},
}
"""Ways to learn a word, by what they change in the recipe `tiny`."""
SCORES = ("loss", "kept", "followed", "clip_i", "clip_t", "length")
HIGHER = ("kept", "followed", "clip_i", "clip_t")  # is better


@dataclass(frozen=True)
class Measured:
    """A word after some steps.

    Attributes:
        seconds: what the steps took, without the measurements.
        loss: on fixed samples.
        kept: the share of facts of the concept (shape, colours, pattern) in pictures that only name it.
        followed: the share of what the other prompts ask for.
        length: of its vectors, in mean lengths of the vocabulary's.
    """

    way: str
    concept: str
    seed: int
    steps: int
    seconds: float
    loss: float
    kept: float
    followed: float
    clip_i: float
    clip_t: float
    length: float


class Yardstick:
    """Measures words for one thing.

    Args:
        thing: what the word is for.
        folder: where its photos are written.
        samples: in the loss.
        num_images: pictures of each prompt; four times as many of the one for reconstruction.
        sample_steps: of DDIM.
    """

    def __init__(
        self, thing: names.Named, folder: Path, samples: int, num_images: int, sample_steps: int
    ) -> None:
        folder.mkdir(parents=True)
        for i in range(6):
            Image.fromarray(object_picture(named_thing(thing), i)).save(folder / f"{i + 1}.png")
        self.name, self.folder, self.init_word = thing.name, folder, KINDS[thing.kind].words[0]
        sd, self.judge = minti.load(TINY, device="cpu"), Judge.load(TINY)
        self.scorer, photos = Scorer.load(TINY), load_photos(folder)
        prompts = load_prompts("tiny-development")
        self.benchmark = Benchmark.make(self.scorer, [photo.open() for photo in photos], prompts)
        self.facts = {"noun": thing.name, "color": thing.color, "pattern": thing.pattern}
        self.facts |= {"color2": thing.color2} if thing.color2 else {}
        self.latents = encode_views(sd, make_views(photos, size=64, flip=True))
        self.num_images, self.sample_steps = num_images, sample_steps
        self.start = Concept("<it>", initial_rows(sd, "word", self.init_word))
        self.word = Word("<it>", self.start.vectors, self.latents)
        total = sd.schedule.config.num_train_timesteps
        self.batch = sample_batch(self.word, Settings(), total, samples, "quality")

    @torch.no_grad()
    def measure(self, word: Concept) -> dict[str, float]:
        """The SCORES of a word."""
        sd = minti.load(TINY, device="cpu")  # anew, since words of different special kinds exclude each other
        rows = sd.add_concept(dataclasses.replace(word, placeholder="<it>"))
        inputs = loss_inputs(sd, [self.word], [self.batch])
        parts = zip(*(x.split(32) for x in inputs), strict=True)
        losses = torch.cat([diffusion_loss(sd, *part) for part in parts])
        readings, embeddings, reconstruction = {}, {}, self.benchmark.prompts.reconstruction
        for template in self.benchmark.prompts.templates:
            count = self.num_images * (4 if template == reconstruction else 1)
            how = {"steps": self.sample_steps, "guidance_scale": 4.0, "num_images": count, "batch_size": 8}
            images = sd.sample(fill(template, "<it>"), **how)
            readings[template] = self.judge.read(images)
            embeddings[template] = self.scorer.measure(images)
        truth = self.judge.truth(readings, self.facts, reconstruction)
        scores = self.benchmark.score(embeddings, self.name)
        found = (truth.kept, truth.followed, scores.clip_i, scores.clip_t)
        length = rows.norm(dim=1).mean().item() / vocabulary_norm(sd)
        return dict(
            zip(SCORES, (losses.mean().item(), *(score.value for score in found), length), strict=True)
        )


def learn_with_minti(
    yard: Yardstick, changes: dict[str, Any], seed: int, steps: int
) -> tuple[Concept, float]:
    """A word after a run of so many steps, and the seconds these took."""
    recipe = read_yaml(Path(minti.__file__).parent / "recipes" / "tiny.yaml") | changes
    sd = minti.load(TINY, device="cpu")
    kind = {key: recipe.get(key, False) for key in ("per_layer", "output_embedding")}
    sd.text_encoder = prepare(sd.text_encoder, sd.unet, **kind)
    start = initial_rows(sd, recipe.get("init", "word"), yard.init_word)
    keys = [f.name for f in dataclasses.fields(Settings) if f.name in recipe]
    settings = Settings(**{key: recipe[key] for key in keys} | {"steps": steps})
    inversion = Inversion(sd, [Word("<it>", start, yard.latents, lr=recipe["lr"], seed=seed)], settings)
    before = time.perf_counter()
    for _ in range(steps):
        inversion.step()
    return inversion.concept(0), time.perf_counter() - before


def learn_with_peer(yard: Yardstick, seed: int, at: Sequence[int]) -> Iterator[tuple[int, Tensor, float]]:
    """Steps, rows and seconds of diffusers' example at each of these numbers of steps."""
    from .theirs import Training

    job = Job("tiny", str(TINY), str(yard.folder), "cpu", "float32", batch_size=4, size=64, steps=0)
    peer = Training(dataclasses.replace(job, lr=PEER_LR, init_word=yard.init_word))
    torch.manual_seed(seed)
    seconds, done = 0.0, 0
    for steps in at:
        before = time.perf_counter()
        for _ in range(steps - done):
            peer.step()
        seconds, done = seconds + time.perf_counter() - before, steps
        yield steps, peer.rows(), seconds


def compare(
    work: Path,
    *,
    ways: Sequence[str],
    concepts: int,
    seeds: int,
    at: Sequence[int],
    peer_steps: int,
    samples: int = 512,
    num_images: int = 2,
    sample_steps: int = 20,
    record: Callable[[Measured], None],
) -> None:
    """Learn words in all these ways, for so many concepts and seeds, and record what each measures.

    Args:
        work: an empty folder for photos.
        ways: of WAYS, and the peer's.
        at: the numbers of steps; with `peer_steps` for the peer.
    """
    for thing in list(names.held_out_things().values())[:concepts]:
        yard = Yardstick(thing, work / thing.name, samples, num_images, sample_steps)
        for seed in range(seeds):
            row = partial(Measured, concept=thing.name, seed=seed)
            if not seed:
                record(row(way="start", steps=0, seconds=0.0, **yard.measure(yard.start)))
            for way in ways:
                if way == PEER:
                    every = sorted({*(n for n in at if n < peer_steps), peer_steps})
                    for steps, rows, seconds in learn_with_peer(yard, seed, every):
                        scores = yard.measure(Concept("<it>", rows))
                        record(row(way=way, steps=steps, seconds=seconds, **scores))
                    continue
                for steps in at:
                    word, seconds = learn_with_minti(yard, WAYS[way], seed, steps)
                    record(row(way=way, steps=steps, seconds=seconds, **yard.measure(word)))


def to_markdown(found: Sequence[Measured]) -> str:
    """A line for each way and number of steps: means over concepts and seeds, with standard errors."""
    lines = ["| way | steps | s | loss | kept | followed | CLIP-I | CLIP-T | length |", "|" + " --- |" * 9]
    for way, steps in dict.fromkeys((m.way, m.steps) for m in found):
        group = [m for m in found if (m.way, m.steps) == (way, steps)]
        cells = [f"{statistics.mean(m.seconds for m in group):.1f}"]
        for score in SCORES:
            values, digits = [getattr(m, score) for m in group], {"loss": 4, "length": 1}.get(score, 3)
            cell = f"{statistics.mean(values):.{digits}f}"
            if len(values) > 1:
                cell += f" ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"
            cells.append(cell)
        lines.append(f"| {way} | {steps} | {' | '.join(cells)} |")
    return "\n".join(lines)


def overtakes(found: Sequence[Measured]) -> str:
    """For each way the first number of steps whose mean is as good as the peer's last, by score."""
    last = max((m.steps for m in found if m.way == PEER), default=0)
    theirs = [m for m in found if m.way == PEER and m.steps == last]
    lines = []
    for way in dict.fromkeys(m.way for m in found if theirs and m.way not in (PEER, "start")):
        for score in SCORES[:-1]:
            aim, reached = statistics.mean(getattr(m, score) for m in theirs), "never"
            for steps in sorted({m.steps for m in found if m.way == way}):
                ours = [m for m in found if (m.way, m.steps) == (way, steps)]
                mean = statistics.mean(getattr(m, score) for m in ours)
                if mean >= aim if score in HIGHER else mean <= aim:
                    seconds = [statistics.mean(m.seconds for m in group) for group in (ours, theirs)]
                    reached = f"after {steps} steps, {seconds[0]:.1f} s"
                    reached += f" ({last / steps:.0f} and {seconds[1] / seconds[0]:.0f} times less)"
                    break
            lines.append(f"{way}: {score} of the peer after {last} steps ({aim:.4f}): {reached}")
    return "\n".join(lines)
