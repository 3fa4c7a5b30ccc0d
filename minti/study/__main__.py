"""python -m minti.study RECIPE: a grid of words, learned together, all of them evaluated, in one report."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..cli.command import run_command
from ..cli.model_options import load_model
from ..cli.options import Options, number
from ..cli.processes import Processes
from ..cli.progress import Progress
from ..cli.work_folder import WorkFolder
from ..cli.yaml_files import RECIPES, read_yaml
from ..errors import InputError
from ..formats.concept import Concept
from ..formats.photos import load_photos
from ..judge.benchmark import word_jobs
from ..judge.picture_jobs import Job, Store, make_all, models
from ..judge.scorer import Scorer, choose_clip
from ..model.stable_diffusion import StableDiffusion
from .classifier import Judge
from .learn import Learner
from .output import score, write_results
from .plan import RECIPE, Ask, Plan, make_plan
from .variants import Variant, group_words

log = logging.getLogger(__name__)


# Between a study and its continuation.
MAY_DIFFER = (
    "recipe",
    "out",
    "overwrite",
    "attention",
    "device",
    "compile",
    "repeats",
    "sample_batch_size",
    "words_at_once",
    "title",
    "about",
    "claims",
)


def options() -> Options:
    """The command line."""
    opts = Options("minti.study", "Learn a grid of words and compare them, as a recipe has it.")
    at_least_1 = number(int, 1)
    group = "what to study"
    opts.add(
        group, "recipe", nargs="?", metavar="RECIPE", help=f"YAML file, or one of {', '.join(shipped())}"
    )
    opts.add(group, "--out", metavar="DIR", help="folder for everything; by default runs/study/RECIPE")
    opts.add(group, "--overwrite", False, help="begin anew, whatever is finished in --out")
    opts.add(group, "--quick", False, help="few steps, pictures, prompts; one concept: minutes, not hours")
    text = "concepts: a set (final, development), or names with commas between"
    opts.add(group, "--choose", "final", metavar="SET|NAMES", help=text)
    text = "learn every word so many times, with other seeds; intervals then count that, too"
    opts.add(group, "--repeats", 1, type=at_least_1, metavar="N", help=text)
    opts.add(group, "--words-at-once", 8, type=at_least_1, metavar="N", help="words learned in one batch")
    group = "pictures to be scored"
    opts.add(group, "--num-images", 24, type=at_least_1, metavar="N", help="pictures of each prompt")
    opts.add(group, "--sample-steps", 25, type=at_least_1, help="DDIM steps")
    opts.add(group, "--guidance-scale", 5.0, type=number(float, 0), help="how closely to follow prompts")
    opts.add(group, "--sample-seed", 0, type=number(int, 0, 2**62), help="seed of each first picture")
    opts.add(group, "--sample-batch-size", 8, type=at_least_1, help="pictures at a time")
    opts.add_judge("the judge")
    opts.add_model()
    for key in RECIPE:
        opts.file_only(key)
    return opts


def shipped() -> list[str]:
    """The names of the recipes that come with minti."""
    return sorted(path.stem for path in (RECIPES / "study").glob("*.yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe: a YAML file, or one that is shipped. Raises InputError."""
    if not Path(name).exists() and name in shipped():
        return read_yaml(RECIPES / "study" / f"{name}.yaml")
    if not Path(name).exists():
        raise InputError(f"recipe {name!r}: neither a file, nor one of {', '.join(shipped())}")
    return read_yaml(name)


def digest(images: Path) -> str:
    """What tells photos apart that lie, or lay, in the same folder."""
    found = hashlib.sha256()
    for photo in load_photos(images):
        image = photo.open()
        mask = photo.open_mask(image.size).tobytes() if photo.mask_path else b""
        found.update(repr((image.size, photo.caption)).encode() + image.tobytes() + mask)
    return found.hexdigest()[:12]


def learn_all(learner: Learner, plan: Plan, together: int, processes: Processes) -> None:
    """Learn every word that is not there yet; every process takes its share of the batches."""
    groups = []
    # By repeats, so that more of them leave the batches of the others as they were.
    for repeat in sorted({ask.repeat for ask in plan.asks}):
        variants = [ask.variant for ask in plan.asks if ask.variant and ask.repeat == repeat]
        share = -(-len({variant.run for variant in variants}) // processes.world)  # nobody is left idle
        groups += group_words(variants, min(together, share))
    todo = [group for group in groups if not learner.is_done(group)]
    words = sum(len(group.runs) for group in groups)
    log.info("%d words in %d batches, %d of which are still to be learned", words, len(groups), len(todo))
    mine = processes.share(todo)
    progress = Progress(sum(learner.steps_left(group) for group in mine), "step")
    try:
        for i, group in enumerate(mine, 1):
            note = f"batch {i} of {len(mine)}: {len(group.runs)} words"
            learner.learn(group, partial(progress.step, note))
    finally:
        progress.close()
    processes.wait()


def add_words(
    sd: StableDiffusion, learner: Learner, asks: Sequence[Ask]
) -> dict[Variant, tuple[str, Concept]]:
    """Teach the model every learned word under a name of its own. Returns the names."""
    words: dict[Variant, tuple[str, Concept]] = {}
    for ask in asks:
        if ask.variant and ask.variant not in words:
            concept = Concept.load(learner.path(ask.variant.run, ask.variant.settings.steps))
            name = f"<{ask.target.name}#{len(words)}>"
            sd.add_concept(Concept(name, concept.vectors))
            words[ask.variant] = name, concept
    return words


def jobs_of(sd: StableDiffusion, scorer: Scorer, plan: Plan, ask: Ask, word: str) -> dict[str, Job]:
    """The pictures that an ask needs. Those of "prompt only" are the same for all concepts."""
    name = ask.variant.key if ask.variant else ask.text or ask.name
    return word_jobs(sd, scorer, plan.prompts[ask.target.name], word, plan.protocol, name=name)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, learn, make pictures, judge them, and leave a report."""
    opts = options()
    recipe = opts.parse(argv, required=[]).recipe
    if recipe is None:
        raise InputError(f"a recipe must be given: a YAML file, or one of {', '.join(shipped())}")
    args = opts.parse(argv, required=["checkpoint"], base=read_recipe(recipe))
    plan = make_plan(args)
    name = Path(recipe).stem + "-quick" * args.quick
    out = Path(args.out or f"runs/study/{name}")
    clip = choose_clip(args.clip, args.checkpoint)
    processes = Processes.from_environment()
    with processes.joined(for_barriers=True):
        args.device = processes.device(args.device)
        sd = load_model(args)
        sd.check_weights()
        sd.schedule.timesteps(plan.protocol.steps)
        scorer = Scorer.load(clip, device=sd.device, tokenizer=args.clip_tokenizer)
        judge = Judge.load(Path(args.checkpoint))
        for target in plan.targets if judge else ():
            judge.check(target.facts, target.name)
        learner, store = Learner(sd, out, args.compile), Store(out / "pictures")
        for ask in plan.asks:
            if ask.variant:
                learner.check(ask.variant)
            else:
                jobs_of(sd, scorer, plan, ask, ask.text)
        args.made_of = models(sd, scorer) | {f"photos of {t.name}": digest(t.images) for t in plan.targets}
        # Only now, with everything in order, is anything written or an old study cleared away.
        made = ("words", "learning", "pictures", "strips", "study.json", "report.html")
        folder = WorkFolder(
            out,
            "minti.study",
            vars(args),
            defaults=opts.defaults,
            made=lambda settings: made,
            may_differ=MAY_DIFFER,
            signature=("setups",),
            active=processes.rank == 0,
        )
        with folder:
            folder.check(resume=True, overwrite=args.overwrite)
            folder.begin()
            processes.wait()
            learn_all(learner, plan, args.words_at_once, processes)
            words = add_words(sd, learner, plan.asks)
            if args.compile:
                sd.compile()
            jobs = [
                jobs_of(sd, scorer, plan, a, words[a.variant][0] if a.variant else a.text) for a in plan.asks
            ]
            make_all([job for some in jobs for job in some.values()], scorer, store, processes)
            if processes.rank == 0:
                outcomes = []
                for target in plan.targets:
                    own = [
                        (ask, job) for ask, job in zip(plan.asks, jobs, strict=True) if ask.target is target
                    ]
                    outcomes += score(sd, scorer, judge, store, plan, own, words)
                write_results(args, out, store, plan, jobs, outcomes, clip, judge)


if __name__ == "__main__":
    run_command("minti.study", main)
