"""python -m minti.evaluate: how close a learned word comes to its photos, and how well it follows prompts."""

import argparse
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from .cli.command import run_command
from .cli.model_options import OF_A_MODEL, laid_over, load_model
from .cli.options import Options, number, size
from .cli.processes import Processes
from .errors import InputError
from .formats.atomic import write_atomically
from .formats.checkpoint import choose_device
from .formats.concept import Concept
from .formats.photos import load_photos
from .judge.benchmark import Benchmark, Evaluation, best, with_tradeoffs
from .judge.evaluation_plan import (
    EvaluationPlan,
    Subject,
    add_words,
    choose_prompts,
    find_words,
    list_name,
    plan_generation,
    plan_samples,
)
from .judge.picture_jobs import PictureStore, Protocol, file_name, make_all
from .judge.results import plot, report, score_table, write_sheet
from .judge.scorer import Scorer, choose_clip
from .model import kernels
from .runs.folder import RunRecord
from .version import __version__

log = logging.getLogger(__name__)

MAY_DIFFER = ("out", "device", "batch_size", "compile", "attention")  # when an evaluation is continued
OF_A_RUN = ("checkpoint", "images", "size", *OF_A_MODEL)
MADE = ("pictures", "grids", "evaluation.json", "plot.svg")


def options() -> Options:
    """The command line."""
    opts = Options("minti.evaluate", "Score a learned word: how like its photos, how editable.")
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
    count = number(int, 1, 10_000)
    opts.add(group, "--num-images", 64, type=count, metavar="N", help="pictures of each prompt")
    opts.add(group, "--sample-steps", 50, alias="--steps", type=count, help="DDIM steps")
    opts.add(group, "--guidance-scale", 5.0, type=number(float, 0), help="how closely to follow prompts")
    opts.add(group, "--eta", 0.0, type=number(float, 0, 1), help="0: deterministic, 1: as noisy as DDPM")
    opts.add(group, "--seed", 0, type=number(int, 0, 2**62), help="seed of each prompt's first picture")
    opts.add(group, "--size", type=size, metavar="PX|WxH", help="in pixels; by default the model's own")
    opts.add(group, "--batch-size", 8, type=count, help="pictures at a time")
    opts.add_judge("the judge")
    opts.add_model()
    return opts


def parse(opts: Options, argv: Sequence[str] | None) -> tuple[argparse.Namespace, bool]:
    """The options, completed from the training run that is scored, and whether that run learned a style."""
    args = opts.parse(argv, required=[])
    if len(args.concept) != 1 or not Path(args.concept[0]).is_dir():
        return args, False
    config = RunRecord(Path(args.concept[0])).config
    base = {key: config[key] for key in OF_A_RUN if key in config}
    return opts.parse(argv, required=[], base=base), config.get("templates") == "style"


def make_plan(
    args: argparse.Namespace, words: Sequence[tuple[Path, Concept]], style: bool
) -> tuple[Scorer, EvaluationPlan, dict[str, str]]:
    """The judge, what there is to score, and the models, for the record. Raises InputError."""
    if args.samples and (args.placeholder is None or args.concept or args.caption):
        raise InputError("--samples goes with --placeholder, and without --concept and --caption")
    if not args.samples and (args.checkpoint is None or not (args.concept or args.caption)):
        raise InputError("--checkpoint and --concept must be given (or --samples); see --help")
    clip = choose_clip(args.clip, args.checkpoint)
    judge = {"clip": str(clip), "minti": __version__}
    if args.samples:
        scorer = Scorer.load(clip, device=choose_device(args.device), tokenizer=args.clip_tokenizer)
        plan = plan_samples(scorer, Path(args.samples), args.placeholder, args.reconstruction_prompt)
        return scorer, plan, {"samples": str(args.samples), **judge}
    sd = load_model(args)
    sd.schedule.timesteps(args.sample_steps)
    if args.compile:
        kernels.compile_denoiser(sd.unet)
    scorer = Scorer.load(clip, device=sd.device, tokenizer=args.clip_tokenizer)
    name = list_name(len(sd.tables[0].weight), style) if args.prompts == "auto" else args.prompts
    prompts = choose_prompts(name, args.reconstruction_prompt)
    subjects = add_words(sd, words)
    subjects += [Subject(caption, "caption", caption) for caption in dict.fromkeys(args.caption)]
    if args.references:
        subjects.append(Subject("prompt only", "prompt only", ""))
    how = args.num_images, args.sample_steps, args.guidance_scale, args.eta, args.seed, args.size
    protocol = Protocol(*how, args.batch_size)
    plan = plan_generation(sd, scorer, subjects, prompts, protocol)
    plan.settings["prompts"] = name
    dtype = str(sd.dtype).removeprefix("torch.")
    return scorer, plan, {"checkpoint": str(args.checkpoint), **laid_over(args), "dtype": dtype, **judge}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, make and judge pictures, write down what came out."""
    opts = options()
    args, style = parse(opts, argv)
    words = [(path, Concept.load(path)) for argument in args.concept for path in find_words(argument)]
    if args.images is None:
        raise InputError("--images must be given: the photos that the word was learned from")
    if args.out is None and not (args.samples or args.concept):
        raise InputError("--out must be given, a folder for the results")
    beside = Path(args.samples or (args.concept or ["."])[0])
    out = Path(args.out or (beside if beside.is_dir() else beside.parent) / "evaluation")
    processes = Processes.from_environment()
    with processes.joined(for_barriers=True):
        args.device = processes.device(args.device)
        photos = load_photos(args.images)
        scorer, plan, models = make_plan(args, words, style)
        benchmark = Benchmark.make(scorer, (photo.open() for photo in photos), plan.prompts)
        how = {"may_differ": MAY_DIFFER, "signature": ("references",), "active": processes.rank == 0}
        with opts.folder(out, args, MADE, **how) as folder:
            folder.check(resume=True, overwrite=args.overwrite)
            folder.begin()
            store = PictureStore(out / "pictures")
            processes.wait()
            jobs = [job for of_subject in plan.jobs.values() for job in of_subject.values()]
            make_all(jobs, scorer.measure, store, processes, args.sample_steps)
            if processes.rank == 0:
                evaluations = [
                    benchmark.score({t: store.load(job) for t, job in of.items()}, s.name, s.kind, args.seed)
                    for s, of in plan.jobs.items()
                ]
                references = [benchmark.image_only()] if args.references else []
                evaluations = with_tradeoffs([*evaluations, *references])
                print(score_table(evaluations))
                write_atomically(out / "evaluation.json", report(evaluations, models, plan.settings))
                write_results(out, plan, store, evaluations)


def write_results(
    out: Path, plan: EvaluationPlan, store: PictureStore, evaluations: Sequence[Evaluation]
) -> None:
    """Write plot.svg and grids/."""
    if svg := plot(evaluations):
        write_atomically(out / "plot.svg", svg.encode())
    for subject, jobs in plan.jobs.items():
        pictures = {template: store.thumbnails(job.name) for template, job in jobs.items()}
        write_sheet(out / "grids" / f"{file_name(subject.name)}.png", pictures)
    words = [e for e in evaluations if e.kind == "word"]
    if len(words) > 1 and (chosen := best(evaluations)):
        log.info("best trade-off: %s", chosen.name)
    log.info("evaluation.json, plot.svg and grids are in %s", out)


command = partial(run_command, "minti.evaluate", main)

if __name__ == "__main__":
    command()
