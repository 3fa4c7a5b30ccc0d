"""Damage every kind of file that minti reads, and see what it says: python tools/fuzz.py --mutations 1000

Each mutation damages one good file and has minti read it, in a child process with limits of time and memory.
Two outcomes are right: the file is accepted, or it is refused in one line. Everything else is a finding: a
traceback, a lack of time or memory, the end of the process, an error of several lines, a change of the
process itself, or something written outside the output folder. What is done depends on --seed and on the
number of the mutation alone. The damaged file of a finding is kept, and read again by `--replay FOLDER`. The
exit code is 1 if there are findings.
"""

import argparse
import gc
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run in a clone that is not installed

import torch

from minti.cli.progress import Progress
from minti.errors import InputError
from tools.fuzzing.damage import damage
from tools.fuzzing.guard import Guard, snapshot, work_done
from tools.fuzzing.kinds import KINDS, TRAINED

OUTCOMES = ("accepted", "one line", "finding")
LONGEST = 3000  # characters of a line that a user is shown, at most
BATCH = 40  # mutations of one child process
PATIENCE = 5  # seconds; a process that does not work for twice as long waits for ever


@dataclass(frozen=True)
class Outcome:
    """What became of a mutation: one of OUTCOMES, and what was said, of a finding where it came from, too."""

    index: int
    kind: str
    outcome: str
    text: str = ""


@dataclass(frozen=True)
class Limits:
    """CPU seconds of one mutation, and GiB beside what the process has before it reads anything."""

    seconds: int = 30
    memory: float = 2.0


def make_world(world: Path, kinds: Sequence[str]) -> None:
    """Make the good files of these kinds, and of those before them, which some of them need."""
    os.chdir(world)
    last = max(list(KINDS).index(kind) for kind in kinds)
    for name in list(KINDS)[: last + 1]:
        if name in kinds or not KINDS[name].written:
            if not KINDS[name].written:
                Path(name).mkdir()
            KINDS[name].make(Path(name))


def lay_out(world: Path, kind: str) -> None:
    """Fill the working directory: links to the good files, and a copy of those of one kind."""
    for path in Path().iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for path in world.iterdir():
        shutil.copytree(path, path.name) if path.name == kind else Path(path.name).symlink_to(path)
    Path("out").mkdir()


def mutate(world: Path, seed: int, index: int, kind: str) -> Path:
    """Lay out mutation `index` in the working directory. Returns the path of what is damaged."""
    lay_out(world, kind)
    others = sorted(path for path in world.rglob("*") if path.is_file() and path.stat().st_size < 2**16)
    return damage(Path(kind), others, random.Random(f"{seed}/{kind}/{index}"))


def attempt(step: Callable[[], object]) -> tuple[str, str]:
    """Do one step of reading: (outcome, text)."""
    try:
        step()
    except InputError as error:
        text = str(error)
        if not text.strip() or "\n" in text.strip() or len(text) > LONGEST:
            return "finding", f"a message of {len(text)} characters: {text!r:.500}"
        return ("finding" if "out of memory" in text else "one line"), text
    except KeyboardInterrupt:
        return "finding", "asked to stop"
    except OSError as error:  # commands say these in one line, with the path
        if error.filename and error.strerror:
            return "one line", f"{error.filename}: {error.strerror}"
        return "finding", where(error)
    except BaseException as error:
        return "finding", where(error)
    return "accepted", ""


def where(error: BaseException) -> str:
    """An exception, and the lines of minti that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "minti" in Path(f.filename).parts]
    return f"{type(error).__name__}: {error!s:.300} (at {' '.join(ours[-4:])})"


def read(kind: str, path: Path, guard: Guard) -> tuple[str, str]:
    """Have minti read what was damaged: (outcome, text)."""
    folders = ["out", *([kind] if KINDS[kind].written else [])]
    before, results = snapshot(), []
    guard.allowed, guard.found = [os.path.realpath(folder) for folder in folders], []
    for step in KINDS[kind].read(path):
        results.append(attempt(step))
    guard.allowed = []
    if guard.found:
        return "finding", f"outside of the output folder: {guard.found[0]}"
    if (after := snapshot()) != before:
        gc.collect()  # what is open may only wait for that
        after = snapshot()
    if changed := [name for name, value in before.items() if after.get(name) != value]:
        return "finding", f"the process has another {', '.join(changed)}"
    return max(results, key=lambda result: OUTCOMES.index(result[0]))


def limit(limits: Limits) -> None:
    """Let this process end if the next mutation takes more than its share of time."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + limits.seconds + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def child(
    world: Path, work: Path, seed: int, jobs: Sequence[tuple[int, str]], limits: Limits, out: int
) -> None:
    """Do mutations one after the other, and write a line of JSON for each; stop after a finding."""
    os.chdir(work)
    silent = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silent, stream)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = size + int(limits.memory * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    guard = Guard()
    for index, kind in jobs:
        path = mutate(world, seed, index, kind)
        limit(limits)
        outcome, text = read(kind, path, guard)
        os.write(out, (json.dumps(asdict(Outcome(index, kind, outcome, text))) + "\n").encode())
        if outcome == "finding":
            return


def run_batch(
    world: Path, work: Path, seed: int, jobs: Sequence[tuple[int, str]], limits: Limits
) -> list[Outcome]:
    """The outcomes of the first mutations of a list, up to the first finding."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        code = 70
        try:
            os.close(reading)
            child(world, work, seed, jobs, limits, writing)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    done, rest, ticks = [], b"", ""
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while True:
            if select.select([pipe], [], [], PATIENCE)[0]:
                if not (more := pipe.read(2**16)):
                    break
                *lines, rest = (rest + more).split(b"\n")
                done += [Outcome(**json.loads(line)) for line in lines]
            elif ticks and ticks == work_done(pid):
                os.kill(pid, signal.SIGKILL)
                break
            else:
                ticks = work_done(pid)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status and len(done) < len(jobs):
        ends = {
            -signal.SIGXCPU: f"more than {limits.seconds} s of work",
            -signal.SIGKILL: "does not come to an end",
        }
        index, kind = jobs[len(done)]
        done.append(Outcome(index, kind, "finding", ends.get(status, f"the process ended with {status}")))
    return done


def keep(outcome: Outcome, world: Path, work: Path, seed: int, folder: Path) -> Path:
    """Keep the input of a finding, to be read again by `replay`."""
    os.chdir(work)
    path = mutate(world, seed, outcome.index, outcome.kind)
    kept = folder / f"{outcome.kind}-{seed}-{outcome.index}"
    kept.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        shutil.copy(path, kept / path.name)
    about = asdict(outcome) | {"seed": seed, "path": str(path)}
    (kept / "finding.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    return kept


def replay(folder: Path, world: Path, work: Path) -> None:
    """Read what was kept again, without limits, and let whatever it raises pass."""
    about = json.loads((folder / "finding.json").read_text(encoding="utf-8"))
    os.chdir(work)
    path = mutate(world, about["seed"], about["index"], about["kind"])
    if (folder / path.name).is_file():
        lay_out(world, about["kind"])
        path = Path(about["path"])
        shutil.copy(folder / path.name, path)
    print(f"{path}: {about['text']}")
    for step in KINDS[about["kind"]].read(path):
        try:
            step()
        except InputError as error:
            print(f"one line: {error}")


def table(outcomes: Sequence[Outcome]) -> str:
    """How often each outcome came, for each kind of file."""
    counts = Counter((outcome.kind, outcome.outcome) for outcome in outcomes)
    lines = [f"{'':12}{'mutations':>10}" + "".join(f"{name:>10}" for name in OUTCOMES)]
    for kind in [*KINDS, "all"]:
        row = [
            sum(n for (k, o), n in counts.items() if kind in (k, "all") and o == name) for name in OUTCOMES
        ]
        lines += [f"{kind:12}{sum(row):>10}" + "".join(f"{n:>10}" for n in row)] if sum(row) else []
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, do the mutations, print the report; 1 if there are findings, else 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--mutations", type=int, default=1000, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, metavar="INDEX", help="number of the first mutation")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--seconds", type=int, default=Limits.seconds, help="CPU seconds of a mutation")
    parser.add_argument("--memory", type=float, default=Limits.memory, help="GiB of a mutation")
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"), help="folder for findings")
    parser.add_argument("--replay", type=Path, metavar="FOLDER", help="read a finding again")
    args = parser.parse_args(argv)
    out, home = args.out.absolute(), os.getcwd()
    kept, outcomes = args.replay and args.replay.absolute(), []
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        world, work = Path(folder) / "world", Path(folder) / "work"
        world.mkdir(), work.mkdir()
        try:
            kinds = [json.loads((kept / "finding.json").read_text())["kind"]] if kept else args.kinds
            make_world(world, kinds)
            if kept:
                replay(kept, world, work)
                return 0
            if not TRAINED.isdisjoint(kinds):
                torch.optim.AdamW([torch.zeros(1)])  # imports much, once for all child processes
            jobs = [(i, kinds[i % len(kinds)]) for i in range(args.first, args.first + args.mutations)]
            limits, progress = Limits(args.seconds, args.memory), Progress(len(jobs), "mutation")
            while jobs:
                done = run_batch(world, work, args.seed, jobs[:BATCH], limits)
                jobs, outcomes = jobs[len(done) :], [*outcomes, *done]
                for outcome in done:
                    progress.step(outcome.kind)
                    if outcome.outcome == "finding":
                        path = keep(outcome, world, work, args.seed, out)
                        print(f"{path.name}: {outcome.text}", flush=True)
        finally:
            os.chdir(home)
    print(table(outcomes), flush=True)
    return int(any(outcome.outcome == "finding" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
