"""python -m minti.study RECIPE: learn a grid of words, evaluate all of them, and leave one report."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..cli.command import run_command
from ..cli.model_options import laid_over, load_model
from ..cli.options import Options, Parser, number
from ..cli.processes import Processes
from ..cli.yaml_files import RECIPES, read_yaml
from ..errors import InputError
from ..judge.picture_jobs import Protocol
from ..judge.results import score_table
from ..judge.scorer import Scorer, choose_clip
from ..model.checks import check_weights
from ..version import __version__
from .answers import read_answers
from .classifier import Judge
from .questionnaire import FOLDER, write_questionnaire
from .recipe import KEYS, StudyPlan, make_plan
from .study import Study
from .summary import claim_numbers

MADE = ("words", "learning", "tuned", "pictures", "strips", FOLDER, "study.json", "report.html")
MAY_DIFFER = (  # when a study is continued
    *("recipe", "out", "attention", "device", "compile", "repeats"),
    *("sample_batch_size", "words_at_once", "title", "about", "claims", "answers"),
)


def options() -> Options:
    """The command line."""
    opts = Options("minti.study", "Learn a grid of words and compare them, as a recipe has it.")
    count = number(int, 1, 10_000)
    group = "what to study"
    text = f"YAML file, the folder of a study, or one of {', '.join(shipped())}"
    opts.add(group, "recipe", nargs="?", metavar="RECIPE", help=text)
    opts.add(group, "--out", metavar="DIR", help="folder for everything; by default runs/study/RECIPE")
    opts.add(group, "--overwrite", False, help="begin anew, whatever is finished in --out")
    text = "answers to the questionnaires of this study, for the report; see `questionnaire --help`"
    opts.add(group, "--answers", metavar="DIR", help=text)
    opts.add(group, "--quick", False, help="few steps, pictures, prompts; one concept: minutes, not hours")
    text = "concepts: a set (final, development), or names with commas between"
    opts.add(group, "--choose", "final", metavar="SET|NAMES", help=text)
    text = "learn every word so many times, with other seeds; intervals then count that, too"
    opts.add(group, "--repeats", 1, type=number(int, 1, 1000), metavar="N", help=text)
    opts.add(group, "--words-at-once", 8, type=count, metavar="N", help="words learned in one batch")
    group = "pictures to be scored"
    opts.add(group, "--num-images", 24, type=count, metavar="N", help="pictures of each prompt")
    opts.add(group, "--sample-steps", 25, type=count, help="DDIM steps")
    opts.add(group, "--guidance-scale", 5.0, type=number(float, 0), help="how closely to follow prompts")
    opts.add(group, "--sample-seed", 0, type=number(int, 0, 2**62), help="seed of each first picture")
    opts.add(group, "--sample-batch-size", 8, type=count, help="pictures at a time")
    opts.add_judge("the judge")
    opts.add_model()
    for key in KEYS:
        opts.file_only(key)
    return opts


def shipped() -> list[str]:
    """The names of the recipes that come with minti."""
    return sorted(path.stem for path in (RECIPES / "study").glob("*.yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe: a YAML file, one that is shipped, or that of a study in a folder. Raises InputError."""
    if Path(name).is_dir() and (Path(name) / "config.yaml").is_file():
        saved = read_yaml(Path(name) / "config.yaml")
        if "setups" not in saved:
            raise InputError(f"{name}: is not the folder of a study")
        return saved | {"out": name}
    if not Path(name).exists() and name in shipped():
        return read_yaml(RECIPES / "study" / f"{name}.yaml")
    if not Path(name).exists():
        raise InputError(f"recipe {name!r}: neither a file, nor one of {', '.join(shipped())}")
    return read_yaml(name)


def plan_of(args: argparse.Namespace) -> StudyPlan:
    """What the options and the recipe ask for. Raises InputError."""
    protocol = Protocol(args.num_images, args.sample_steps, args.guidance_scale, seed=args.sample_seed)
    protocol = replace(protocol, batch_size=args.sample_batch_size)
    recipe = {key: getattr(args, key) for key in KEYS}
    return make_plan(recipe, protocol, choose=args.choose, repeats=args.repeats, quick=args.quick)


def ask(argv: Sequence[str]) -> None:
    """Write a questionnaire for a finished study."""
    text = "Write a page in which people rank the pictures of a study; its answers go into the report."
    parser = Parser(prog="python -m minti.study questionnaire", description=text)
    parser.add_argument("study", type=Path, metavar="STUDY", help="the folder of a finished study")
    text = "a setup or caption to compare, repeatable; by default the first five"
    parser.add_argument("--setup", action="append", default=[], metavar="NAME", help=text)
    text = "questions of each kind (default: 10)"
    parser.add_argument("--questions", type=number(int, 1, 1000), default=10, metavar="N", help=text)
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of every order (default: 0)")
    given = parser.parse_args(argv)
    if not (given.study / "study.json").is_file():
        raise InputError(f"{given.study}: has no study.json, so it is no finished study; finish it first")
    base = read_recipe(str(given.study))
    base.pop("recipe", None)
    plan = plan_of(options().parse([], required=[], base=base))
    print(write_questionnaire(given.study, plan, given.setup, given.questions, given.seed))


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, learn, make pictures, judge them, and leave a report."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["questionnaire"]:
        return ask(argv[1:])
    opts = options()
    recipe = opts.parse(argv, required=[]).recipe
    if recipe is None:
        raise InputError(f"a recipe must be given: a YAML file, or one of {', '.join(shipped())}")
    base = read_recipe(recipe)
    recipe = base.pop("recipe", recipe)  # of a study, the recipe that it was begun with
    args = opts.parse(argv, required=["checkpoint"], base=base)
    args.recipe = recipe
    if args.answers and args.overwrite:
        raise InputError("--answers: are of the study that --overwrite removes; leave out one of them")
    args.title = args.title or Path(recipe).stem
    name = f"{Path(recipe).stem}-quick" if args.quick else Path(recipe).stem
    args.out = args.out or f"runs/study/{name}"
    plan, processes = plan_of(args), Processes.from_environment()
    people = read_answers(Path(args.out), Path(args.answers)) if args.answers else None
    args.clip = choose_clip(args.clip, args.checkpoint)
    with processes.joined(for_barriers=True):
        args.device = processes.device(args.device)
        sd = load_model(args)
        check_weights(sd)
        scorer = Scorer.load(args.clip, device=sd.device, tokenizer=args.clip_tokenizer)
        judge = Judge.load(Path(args.checkpoint))
        study = Study(plan, sd, scorer, judge, Path(args.out), compiled=args.compile)
        study.check()
        args.made_of = study.made_of()
        how = {"may_differ": MAY_DIFFER, "signature": ("setups",), "active": processes.rank == 0}
        with opts.folder(args.out, args, MADE, **how) as folder:
            folder.check(resume=True, overwrite=args.overwrite)
            folder.begin()
            processes.wait()
            study.learn(args.words_at_once, processes)
            study.make_pictures(processes)
            if processes.rank == 0:
                keys = ("recipe", "quick", "repeats", "checkpoint", "clip", "base", "setups")
                about = {key: getattr(args, key) for key in keys} | laid_over(args) | {"minti": __version__}
                report = study.report(about, people)
                print(score_table([row.evaluation for row in report.rows]))
                for claim in report.claims:
                    print(f"{claim['verdict']}: {claim['says']} ({claim_numbers(claim, claim['score'])})")


command = partial(run_command, "minti.study", main)

if __name__ == "__main__":
    command()
