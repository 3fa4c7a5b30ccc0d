"""python -m minti.evaluate: how close a learned word comes to its photos, and how well it takes prompts."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from .cli.command import run_command
from .cli.options import Options, number, size
from .cli.processes import Processes
from .cli.work_folder import WorkFolder
from .errors import InputError
from .formats.atomic import write_atomically
from .formats.photos import load_photos
from .judge.benchmark import Benchmark, Evaluation, best, with_tradeoffs
from .judge.evaluation_plan import Plan, find_words, plan_generation, plan_samples
from .judge.picture_jobs import Store, file_name, make_all
from .judge.results import plot, report, table, write_sheet
from .runs.verdict import Run

log = logging.getLogger(__name__)


# Between a run and its continuation.
MAY_DIFFER = ("out", "overwrite", "device", "batch_size", "compile", "attention")
OF_A_RUN = ("checkpoint", "images", "tokenizer", "variant", "ema", "prediction_type", "size")


def options() -> Options:
    """The command line."""
    opts = Options("minti.evaluate", "Score a learned word: how like its photos, how editable.")
    at_least_1 = number(int, 1)
    group = "what to score"
    text = "a learned word, or the folder of a training run: every saved step; repeatable"
    opts.add(group, "--concept", [], metavar="FILE|RUN", help=text)
    opts.add(group, "--images", metavar="DIR", help="the photos it was learned from; by default the run's")
    opts.add(group, "--caption", [], metavar="TEXT", help="a description to compare it with; repeatable")
    opts.add(group, "--references", True, help="also score Image Only and Prompt Only")
    text = "object, style, tiny, tiny-style, or a text file with one a line; auto: by what is learned on what"
    opts.add(group, "--prompts", "auto", metavar="NAME|FILE", help=text)
    text = "the prompt compared with the photos, instead of the list's"
    opts.add(group, "--reconstruction-prompt", metavar="TEXT", help=text)
    opts.add(group, "--out", metavar="DIR", help="folder for results; by default evaluation/ beside the word")
    opts.add(group, "--overwrite", False, help="begin anew, whatever is finished in --out")
    group = "pictures of other tools, instead of generating"
    opts.add(group, "--samples", metavar="DIR", help="folder of pictures, with prompts.csv: file, prompt")
    opts.add(group, "--placeholder", metavar="WORD", help="the learned word in those prompts")
    group = "how"
    opts.add(group, "--num-images", 64, type=at_least_1, metavar="N", help="pictures of each prompt")
    opts.add(group, "--steps", 50, type=at_least_1, help="DDIM steps")
    opts.add(group, "--guidance-scale", 5.0, type=number(float, 0), help="how closely to follow prompts")
    opts.add(group, "--eta", 0.0, type=number(float, 0, 1), help="0: deterministic, 1: as noisy as DDPM")
    opts.add(group, "--seed", 0, type=number(int, 0, 2**62), help="seed of each prompt's first picture")
    opts.add(group, "--size", type=size, metavar="PX|WxH", help="in pixels; by default the model's own")
    opts.add(group, "--batch-size", 8, type=at_least_1, help="pictures at a time")
    opts.add_judge("the judge")
    opts.add_model()
    return opts


def choose_out(args: argparse.Namespace) -> Path:
    """--out, or a folder beside what is scored."""
    if args.out is None and not (args.samples or args.concept):
        raise InputError("--out must be given, a folder for the results")
    beside = Path(args.samples or (args.concept or ["."])[0])
    return Path(args.out) if args.out else (beside if beside.is_dir() else beside.parent) / "evaluation"


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, make and judge pictures, write down what came out."""
    opts, style = options(), False
    args = opts.parse(argv, required=[])
    if len(args.concept) == 1 and (folder := Path(args.concept[0])).is_dir():
        config = Run(folder).config
        style = config.get("templates") == "style"
        base = {key: config[key] for key in OF_A_RUN if key in config}
        args = opts.parse(argv, required=[], base=base)
    for argument in args.concept:
        find_words(argument)
    if args.images is None:
        raise InputError("--images must be given: the photos that the word was learned from")
    processes = Processes.from_environment()
    with processes.joined(for_barriers=True):
        args.device = processes.device(args.device)
        photos = load_photos(args.images)
        plan = plan_samples(args) if args.samples else plan_generation(args, style)
        benchmark = Benchmark.make(plan.scorer, (photo.open() for photo in photos), plan.prompts)
        out = choose_out(args)
        with WorkFolder(
            out,
            "minti.evaluate",
            vars(args),
            defaults=opts.defaults,
            made=lambda settings: ("pictures", "grids", "evaluation.json", "plot.svg"),
            may_differ=MAY_DIFFER,
            signature=("references",),
            active=processes.rank == 0,
        ) as folder:
            folder.check(resume=True, overwrite=args.overwrite)
            folder.begin()
            store = Store(out / "pictures")
            processes.wait()
            jobs = [job for jobs in plan.jobs.values() for job in jobs.values()]
            make_all(jobs, plan.scorer, store, processes)
            if processes.rank == 0:
                evaluations = score_all(plan, store, benchmark, args)
                print(table(evaluations))
                write_results(out, plan, store, evaluations)


def score_all(plan: Plan, store: Store, benchmark: Benchmark, args: argparse.Namespace) -> list[Evaluation]:
    """Every subject's scores from the embeddings in the store, and the references'."""
    evaluations = []
    for subject, jobs in plan.jobs.items():
        embeddings = {template: job.embed(plan.scorer, store) for template, job in jobs.items()}
        evaluations.append(benchmark.score(embeddings, subject.name, subject.kind, args.seed))
    if args.references:
        evaluations.append(benchmark.image_only())
    return with_tradeoffs(evaluations)


def write_results(out: Path, plan: Plan, store: Store, evaluations: Sequence[Evaluation]) -> None:
    """evaluation.json, plot.svg and grids/, and where they are."""
    write_atomically(out / "evaluation.json", report(evaluations, plan.model, plan.settings))
    if svg := plot(evaluations):
        write_atomically(out / "plot.svg", svg.encode())
    for subject, jobs in plan.jobs.items():
        rows = {template: store.pictures(job) for template, job in jobs.items()}
        write_sheet(out / "grids" / f"{file_name(subject.name)}.png", rows)
    steps = [e for e in evaluations if e.kind == "word"]
    if len(steps) > 1 and (chosen := best(evaluations)):
        log.info("best trade-off: %s", chosen.name)
    log.info("evaluation.json, plot.svg and grids are in %s", out)


if __name__ == "__main__":
    run_command("minti.evaluate", main)
