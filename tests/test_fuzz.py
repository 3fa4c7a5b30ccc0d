"""The fuzzer: it finds nothing in a short run, and it notices everything that it should."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("resource", reason="the fuzzer limits its child processes as only POSIX can")

import minti
from tools.fuzzing.damage import damage
from tools.fuzzing.inputs import make_words

ROOT = Path(minti.__file__).parents[1]

# A program that runs the fuzzer on readers that each do one thing, right or wrong.
PLANTED = """
import itertools, os, sys, time
from pathlib import Path
from minti.errors import InputError
from tools import fuzz
from tools.fuzzing import inputs, kinds

def accepted(): Path("out/file").write_bytes(b"")
def refused(): raise InputError("one line")
def traceback(): os.listdir("out")[0]
def silent(): raise InputError(" ")
def waiting(): time.sleep(100)
def working(): all(itertools.count(1))
def memory(): bytearray(3 * 2**30)
def crash(): os.kill(os.getpid(), 11)
def outside(): Path("model/model_index.json").write_bytes(b"")
def program(): os.system("true")
def process(): os.environ["LANG"] = "x"

steps = [accepted, refused, traceback, silent, waiting, working, memory, crash, outside, program, process]
todo = dict(enumerate(steps))
mutate, fuzz.PATIENCE = fuzz.mutate, 1

def mutate_and_tell(world, seed, index, kind):
    kinds.KINDS[kind] = kinds.Kind(inputs.make_model, lambda path: [todo[index]])
    return mutate(world, seed, index, kind)

fuzz.mutate = mutate_and_tell
limits = ["--seconds", "1", "--memory", "1"]
sys.exit(fuzz.main(["--mutations", str(len(steps)), "--kinds", "model", *limits, "--out", sys.argv[1]]))
"""


def run(*argv: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=ROOT, env=environment)


def test_every_kind_of_finding_is_noticed_and_kept(tmp_path: Path) -> None:
    done = run("-c", PLANTED, str(tmp_path))
    assert done.returncode == 1, done.stderr
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines() if line.startswith("model-"))
    expected = {
        2: "IndexError",
        3: "a message of 0 characters",
        4: "does not come to an end",
        5: "more than 1 s of work",
        6: "MemoryError",
        7: "the process ended with -11",
        8: "outside of the output folder: open",
        9: "outside of the output folder: os.system",
        10: "the process has another environment",
    }
    assert said.keys() == {f"model-0-{i}" for i in expected}
    for index, text in expected.items():
        assert text in said[f"model-0-{index}"]
        kept = json.loads((tmp_path / f"model-0-{index}" / "finding.json").read_text(encoding="utf-8"))
        assert text in kept["text"]
    assert done.stdout.splitlines()[-1].split() == ["all", "11", "1", "1", "9"]


# The fuzzer on a minti whose reader of tokenizers lacks the boundary for damaged files.
FAULT = """
import contextlib, sys
from pathlib import Path
from minti.formats import vocabulary
from tools import fuzz

boundary = vocabulary.naming
vocabulary.naming = lambda path, what: contextlib.nullcontext()
code = fuzz.main(["--mutations", "12", "--kinds", "tokenizers", "--out", sys.argv[1]])
vocabulary.naming = boundary
for path in sorted(Path(sys.argv[1]).iterdir()):
    fuzz.main(["--replay", str(path)])
sys.exit(code)
"""


def test_a_fault_of_a_reader_is_found_and_read_again_when_it_is_mended(tmp_path: Path) -> None:
    done = run("-c", FAULT, str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    found, _, again = done.stdout.partition("\nall ")
    count = found.count("(at vocabulary.py:")
    assert count == again.count("one line: ") == len(list(tmp_path.iterdir())) > 0


def test_a_mutation_depends_on_its_seed_alone(tmp_path: Path) -> None:
    found = []
    for seed in ("0/words/1", "0/words/1", "0/words/2"):
        folder = tmp_path / str(len(found))
        make_words(folder)
        others = sorted(folder.iterdir())
        damage(folder, others, random.Random(seed))
        found.append({path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()})
    assert found[0] == found[1] != found[2]


def test_nothing_is_found_in_a_short_run(tmp_path: Path) -> None:
    done = run("tools/fuzz.py", "--mutations", "24", "--kinds", *SHORT, "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    kind, count, accepted, refused, found = done.stdout.splitlines()[-1].split()
    assert (kind, count, found) == ("all", "24", "0")
    assert int(accepted) > 0
    assert int(refused) > 5


SHORT = ("model", "single", "judge", "tokenizers", "words", "photos")  # those that need no training


@pytest.mark.slow
def test_nothing_is_found_in_a_long_run(tmp_path: Path) -> None:
    done = run("tools/fuzz.py", "--mutations", "2000", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
