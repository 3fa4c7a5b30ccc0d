"""A training run that is killed, interrupted or out of space loses nothing and ends as if nothing were."""

import csv
import errno
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from minti import Concept, InputError, StableDiffusion, report, train
from minti.cli import work_folder
from minti.cli.command import run_command
from minti.formats.atomic import write_atomically
from minti.runs import trainer
from minti.runs.options import options, parse_run
from minti.runs.stop import Stop

from .oracles import save_folder
from .processes import ENVIRONMENT, ROOT, Server

STEPS = 24


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, and photos."""
    base = tmp_path_factory.mktemp("durable")
    save_folder(base / "model", "small")
    for name, seed in (("photos", 0), ("others", 1)):
        (base / name).mkdir()
        for i in range(2):
            pixels = np.random.default_rng([seed, i]).integers(0, 256, (16, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(base / name / f"{i}.png")
    return base


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def arguments(base: Path, out: Path, *more: str, steps: int = STEPS) -> list[str]:
    argv = ["--checkpoint", base / "model", "--images", base / "photos", "--placeholder", "<toy>"]
    argv += ["--init-word", "red toy", "--num-vectors", 2, "--out", out, "--device", "cpu"]
    argv += ["--steps", steps, "--batch-size", 2, "--save-every", 5, "--eval-every", 3, "--eval-size", 2]
    argv += ["--sample-every", 8, "--sample-steps", 1, "--keep", "best"]
    return [*map(str, argv), *more]


def results(out: Path) -> dict[str, bytes | list]:
    """Every file a run leaves, with log.csv without its column of seconds.

    Without the report and config.yaml, which say how long it took and where it is.
    """
    files = {k: v for k, v in snapshot(out).items() if Path(k).name not in ("report.html", "config.yaml")}
    for name in [name for name in files if Path(name).name == "log.csv"]:
        files[name] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows(out / name)]
    return files


def snapshot(folder: Path) -> dict[str, bytes]:
    """All files, apart from hidden ones: what was being written when the process was killed."""
    files = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["step"] != "0"]


def assert_same_results(out: Path, expected: Path) -> None:
    """Those of an interrupted run may have one more copy for each interruption."""
    found, wanted = results(out), results(expected)
    extra = {name for name in found if name.startswith("embeds/")} - wanted.keys()
    assert found.keys() - extra == wanted.keys()
    for name, content in wanted.items():
        assert found[name] == content, name


@pytest.fixture(scope="module")
def uninterrupted(base: Path, server: Server) -> Path:
    out = base / "uninterrupted"
    assert server.run(arguments(base, out), base / "stderr") == 0
    assert {p.name for p in (out / "embeds").iterdir()} == {
        f"step-{step:06d}.safetensors" for step in (5, 10, 15, 20, 24)
    }
    assert len(rows(out / "log.csv")) == STEPS
    return out


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# kill -9
# ----------------------------------------------------------------------------------------------------------


def test_killed_at_random_moments(base: Path, server: Server, uninterrupted: Path, tmp_path: Path) -> None:
    """Five times, wherever it happens to be, then left alone: not a bit is different.

    Where a run comes to its end between two kills, another one is begun.
    """
    out, stderr, rng = tmp_path / "run", tmp_path / "stderr", random.Random(0)
    duration = sum(float(row["seconds"]) for row in rows(uninterrupted / "log.csv"))
    kills = 0
    while kills < 5:
        stderr.write_text("")
        pid = server.start(arguments(base, out, "--resume"), stderr)
        wait_for(lambda: "steps of" in stderr.read_text())  # said before the first step
        time.sleep(rng.uniform(0, duration))
        os.kill(pid, signal.SIGKILL)
        code = server.wait()
        assert code in (0, -signal.SIGKILL), stderr.read_text()
        if (out / "state.safetensors").exists():
            assert len(rows(out / "log.csv")) % 5 in (0, STEPS % 5)  # never half a file
            Concept.load(out / "learned_embeds.safetensors")
        kills += code != 0
        if code == 0:
            assert_same_results(out, uninterrupted)
            out = tmp_path / f"run-{kills}"
    assert server.run(arguments(base, out, "--resume"), stderr) == 0, stderr.read_text()
    assert_same_results(out, uninterrupted)


@pytest.mark.parametrize("after", [False, True])
def test_killed_while_writing(
    after: bool, base: Path, server: Server, uninterrupted: Path, tmp_path: Path
) -> None:
    """Before or after each kind of file gets its name, again and again in the same run."""
    out, stderr = tmp_path / "run", tmp_path / "stderr"
    crashes = 0
    # The files are written in the order config, inputs, (embeds, learned, log, state, ...).
    for count in (1, 2, 3, 5, 4, 6) if after else (1, 2, 3, 4, 5, 6, 8, 3):
        code = server.run(arguments(base, out, "--resume"), stderr, crash=-count if after else count)
        assert code in (0, -signal.SIGKILL), stderr.read_text()
        crashes += code != 0
    assert crashes >= 5
    assert server.run(arguments(base, out, "--resume"), stderr) == 0, stderr.read_text()
    assert_same_results(out, uninterrupted)


# Ctrl-C and SIGTERM
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGHUP]
)
def test_interrupted(
    number: signal.Signals, base: Path, server: Server, uninterrupted: Path, tmp_path: Path
) -> None:
    out, stderr = tmp_path / "run", tmp_path / "stderr"
    pid = server.start(arguments(base, out), stderr)
    wait_for((out / "embeds" / "step-000005.safetensors").exists)
    os.kill(pid, number)
    assert server.wait() == 130
    said = stderr.read_text()
    assert said.strip().splitlines()[-1] == "minti.train: interrupted; what was finished is kept"
    assert "Traceback" not in said
    done = len(rows(out / "log.csv"))
    assert 5 <= done < STEPS
    assert (out / "embeds" / f"step-{done:06d}.safetensors").exists()  # saved where it was, not at step 5
    assert (out / "report.html").exists()
    assert server.run(arguments(base, out, "--resume"), stderr) == 0
    assert f"resumed after step {done}" in stderr.read_text()
    assert_same_results(out, uninterrupted)


def test_the_command_is_interrupted(base: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """The real thing, once: `python -m minti.train`, Ctrl-C, and --resume with nothing but --out."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "minti.train"]
    process = subprocess.Popen(
        [*command, *arguments(base, out)], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    wait_for((out / "state.safetensors").exists)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "what was finished is kept" in said
    result = subprocess.run(
        [*command, "--resume", "--out", str(out)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert_same_results(out, uninterrupted)


def test_one_of_two_processes_is_interrupted(base: Path, server: Server, tmp_path: Path) -> None:
    """Both stop after the same step, and both go on from there, bit for bit as if nothing had been."""
    other = Server()

    def run_both(out: Path, interrupt: bool = False) -> tuple[int, int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        argv = arguments(base, out, "--accumulate", "2", "--sample-every", "0", "--resume", steps=12)
        for rank, process in enumerate((server, other)):
            environment = address | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            pid = process.start(argv, tmp_path / f"stderr-{rank}", environment=environment)
        if interrupt:
            wait_for((out / "embeds" / "step-000005.safetensors").exists)
            os.kill(pid, signal.SIGTERM)
        return server.wait(), other.wait()

    try:
        expected, out = tmp_path / "expected", tmp_path / "run"
        assert run_both(expected) == (0, 0), (tmp_path / "stderr-0").read_text()
        assert run_both(out, interrupt=True) == (130, 130), (tmp_path / "stderr-0").read_text()
        assert 5 <= len(rows(out / "log.csv")) < 12
        assert run_both(out) == (0, 0), (tmp_path / "stderr-0").read_text()
    finally:
        other.close()
    assert_same_results(out, expected)


# Going on
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than a short run."""
    monkeypatch.setattr(trainer, "write_report", lambda *_: None)


@pytest.fixture
def run_to(base: Path, tmp_path: Path, no_report: None) -> Callable[..., Path]:
    """A short run in this process."""

    def run_to(*more: str, steps: int = 4, out: Path | None = None) -> Path:
        out = out or tmp_path / "run"
        train.main(arguments(base, out, "--sample-every", "0", *more, steps=steps))
        return out

    return run_to


@pytest.fixture(scope="module")
def finished(base: Path, server: Server) -> Path:
    out = base / "finished"
    assert server.run(arguments(base, out, "--sample-every", "0", steps=4), base / "stderr") == 0
    return out


@pytest.fixture
def done(finished: Path, tmp_path: Path) -> Path:
    """The folder of a short run that is finished, to play with; `run_to` works in the same."""
    return shutil.copytree(finished, tmp_path / "run")


def test_resume_without_a_run_starts_one(run_to: Callable, tmp_path: Path) -> None:
    assert_same_results(run_to("--resume"), run_to(out=tmp_path / "other"))


def test_resume_of_a_finished_run_changes_nothing(run_to: Callable, done: Path) -> None:
    before = results(done)
    run_to("--resume")
    assert results(done) == before


def test_resume_of_a_run_that_was_moved(run_to: Callable, tmp_path: Path) -> None:
    out = run_to()
    out.rename(tmp_path / "moved")
    run_to("--resume", out=tmp_path / "moved")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--lr", "0.1"], "lr was 0.005, now it is 0.1"),
        (["--steps", "3"], "steps was 4, now it is 3"),
        (["--seed", "1"], "seed was 0, now it is 1"),
        (["--placeholder", "<b>"], "placeholder was '<toy>', now it is '<b>'"),
        (["--no-flip"], "flip was True, now it is False"),
        (["--max-norm", "2"], "max_norm was None, now it is 2.0"),
        (["--progressive", "2"], "progressive was [], now it is [2]"),
        (["--dtype", "bfloat16"], "dtype was 'auto', now it is 'bfloat16'"),
        (["--set", "keep=last"], "keep was 'best', now it is 'last'"),
    ],
)
def test_resume_as_another_run(
    change: list[str], message: str, run_to: Callable, done: Path, base: Path
) -> None:
    before = snapshot(done)
    if change[0] == "--set":  # which flags go before
        argv = ["--out", str(done), "--resume", *change]
        with pytest.raises(InputError) as error:
            train.main(argv)
    else:
        with pytest.raises(InputError) as error:
            run_to("--resume", *change)
    assert f"{done / 'config.yaml'}: {message}" in str(error.value)
    assert "leave that as it was, or give another --out" in str(error.value)
    assert snapshot(done) == before


def test_what_does_not_touch_the_vectors_may_change(
    run_to: Callable, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How often it is saved and previewed, where photos and checkpoint are, and for how long it goes on."""
    expected = run_to("--eval-every", "0", "--keep", "last", steps=6, out=tmp_path / "expected")
    argv = ["--eval-every", "0", "--keep", "last"]
    out = run_to(*argv)
    for name in ("model", "photos"):
        shutil.copytree(base / name, tmp_path / "moved" / name)
    moved = ["--checkpoint", f"{tmp_path}/moved/model/", "--images", f"{tmp_path}/moved/photos/"]
    run_to(*argv, "--resume", "--save-every", "2", "--sample-prompt", "{} there", *moved, steps=6)
    assert torch.equal(*(Concept.load(folder).vectors for folder in (out, expected)))
    found, wanted = (load_file(folder / "state.safetensors") for folder in (out, expected))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert yaml.safe_load((out / "config.yaml").read_text())["images"] == f"{tmp_path}/moved/photos/"
    with pytest.raises(InputError, match="steps was 6, now it is 5"):
        run_to(*argv, "--resume", steps=5)


def test_more_steps_than_a_schedule_was_made_for(run_to: Callable) -> None:
    run_to("--lr-schedule", "cosine")
    with pytest.raises(
        InputError, match="steps was 4, now it is 6, but the learning rate has fallen to zero"
    ):
        run_to("--lr-schedule", "cosine", "--resume", steps=6)


def test_more_steps_after_an_average(run_to: Callable) -> None:
    run_to("--average", "2")
    with pytest.raises(InputError, match="now it is 6, but the vectors have been averaged"):
        run_to("--average", "2", "--resume", steps=6)


@pytest.mark.parametrize("reason", ["memory", "file"])
def test_a_preview_that_fails(
    reason: str,
    run_to: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Costs the preview, and one warning; what was learned by then has been saved before."""
    out = tmp_path / "run"

    def fail(*args: object, **options: object) -> None:
        assert (out / "embeds" / "step-000002.safetensors").exists()
        raise torch.OutOfMemoryError("CUDA out of memory")

    if reason == "memory":
        monkeypatch.setattr(StableDiffusion, "sample", fail)
    else:
        out.mkdir()
        run_to()
        (out / "samples").write_text("")
    more = ["--sample-every", "1", "--save-every", "1", "--resume"]
    run_to(*(more if reason == "file" else ["--sample-every", "2", "--save-every", "2"]), steps=6)
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "--sample-every 0 leaves them out" in warnings[0]
    assert Concept.load(out).metadata["step"] == "6"


def test_a_report_of_a_run_that_was_killed(done: Path, capsys: pytest.CaptureFixture) -> None:
    (done / "report.html").unlink()
    report.main([str(done)])
    assert "<h1>&lt;toy&gt;</h1>" in (done / "report.html").read_text()
    assert capsys.readouterr().out.strip() == str(done / "report.html")
    with pytest.raises(InputError, match="is not the folder of a run"):
        report.main([str(done.parent)])


@pytest.mark.parametrize("damage", ["gone", "shape", "kind", "negative", "best"])
def test_a_state_that_does_not_fit(damage: str, run_to: Callable, done: Path) -> None:
    path = done / "state.safetensors"
    state = load_file(path)
    if damage == "gone":
        del state["0.0.exp_avg"]
    if damage == "shape":
        state["0.0.exp_avg_sq"] = state["0.0.exp_avg_sq"][:1].clone()
    if damage == "kind":
        state["0.0.rows"] = state["0.0.rows"].double()
    if damage == "negative":
        state["step"] = torch.tensor(-3)
    if damage == "best":
        del state["best_loss.0"]
    save_file(state, path)
    before = snapshot(done)
    with pytest.raises(InputError, match=str(done)):
        run_to("--resume")
    assert snapshot(done) == before


def test_a_link_out_of_the_folder(run_to: Callable, done: Path, tmp_path: Path) -> None:
    shutil.move(done / "embeds", tmp_path / "elsewhere")
    (done / "embeds").symlink_to(tmp_path / "elsewhere")
    before = snapshot(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="embeds: is a link; nothing is written outside --out"):
        run_to("--resume", steps=6)
    run_to("--overwrite")
    assert snapshot(tmp_path / "elsewhere") == before
    assert not (done / "embeds").is_symlink()


@pytest.mark.parametrize("change", ["picture", "caption", "templates"])
def test_resume_with_other_photos(
    change: str, run_to: Callable, done: Path, base: Path, tmp_path: Path
) -> None:
    """The folder is the same, what is in it is not."""
    shutil.copytree(base / "photos", tmp_path / "photos")
    (templates := tmp_path / "templates.txt").write_text("a photo of {}")
    argv = ["--images", str(tmp_path / "photos"), "--templates", str(templates)]
    run_to(*argv, "--overwrite")
    run_to(*argv, "--resume")
    before = snapshot(done)
    picture = min(tmp_path.glob("photos/*.png"))
    if change == "picture":
        Image.new("RGB", (20, 20), "teal").save(picture)
    else:
        path = templates if change == "templates" else picture.with_suffix(".txt")
        path.write_text("a drawing of {}")
    message = "the run began with other photos, captions or templates of '<toy>'"
    with pytest.raises(InputError, match=message):
        run_to(*argv, "--resume")
    assert snapshot(done) == before


def test_resume_with_another_checkpoint(run_to: Callable, done: Path, base: Path, tmp_path: Path) -> None:
    """In the same place."""
    shutil.copytree(base / "model", model := tmp_path / "model")
    run_to("--checkpoint", str(model), "--overwrite")
    before = snapshot(done)
    (path,) = (model / "unet").glob("*.safetensors")
    weights = load_file(path)
    save_file(weights | {"conv_out.bias": weights["conv_out.bias"] + 1}, path, {"format": "pt"})
    with pytest.raises(InputError, match="the run began with another checkpoint in") as error:
        run_to("--checkpoint", str(model), "--resume")
    assert str(model) in str(error.value)
    assert snapshot(done) == before


def test_resume_with_another_number_of_processes(run_to: Callable, done: Path) -> None:
    state = load_file(done / "state.safetensors")
    assert state["world"] == 1
    save_file(state | {"world": torch.tensor(2)}, done / "state.safetensors")
    with pytest.raises(InputError, match="the run began with 2 processes, not 1"):
        run_to("--resume")


@pytest.mark.parametrize("what", ["changed", "longer", "gone"])
def test_resume_without_the_file_it_started_from(
    what: str, run_to: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What matters of it is in the state."""
    old = tmp_path / "old.safetensors"
    Concept("<old>", torch.linspace(-0.1, 0.1, 64).view(2, 32)).save(old)
    argv = ["--init", "file", "--init-word", str(old), "--regularization", "1"]
    expected = run_to(*argv, out=tmp_path / "expected")
    monkeypatch.setattr(Stop, "anywhere", lambda self, world: True)
    with pytest.raises(KeyboardInterrupt):
        run_to(*argv)
    monkeypatch.setattr(Stop, "anywhere", lambda self, world: False)
    if what == "gone":
        old.unlink()
    else:
        Concept("<old>", torch.ones(2 + (what == "longer"), 32)).save(old)
    assert_same_results(run_to(*argv, "--resume"), expected)


@pytest.mark.parametrize("name", ["state.safetensors", "config.yaml", "log.csv"])
@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty", "gone"])
def test_resume_of_a_damaged_run(
    name: str, damage: str, run_to: Callable, done: Path, capsys: pytest.CaptureFixture
) -> None:
    """One line that names the file, no traceback; or it starts again, where there is nothing to resume."""
    path = done / name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"garbage": b"\x93[garbage", "truncated": content[:60], "empty": b""}[damage])
    before = snapshot(done)
    capsys.readouterr()

    def again(argv: None) -> None:
        run_to("--resume")

    with pytest.raises(SystemExit) as status:
        run_command("minti.train", again)
    said = capsys.readouterr().err
    if (name, damage) == ("state.safetensors", "gone"):
        assert status.value.code == 0  # killed before it saved anything
    else:
        assert status.value.code == 2, said
        assert len(said.strip().splitlines()) == 1
        assert str(done) in said
        assert snapshot(done) == before


# What is there already
# ----------------------------------------------------------------------------------------------------------


def test_an_existing_run_is_refused(run_to: Callable, done: Path) -> None:
    before = snapshot(done)
    with pytest.raises(InputError, match="exists already; give another --out, or --resume, or --overwrite"):
        run_to()
    assert snapshot(done) == before


def test_an_empty_folder_will_do(run_to: Callable, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run_to()


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("flag", ["--resume", "--overwrite", "--flip"])
def test_what_is_no_run_is_refused(kind: str, flag: str, run_to: Callable, tmp_path: Path) -> None:
    out = tmp_path / "run"
    if kind == "folder":
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
    else:
        out.write_text("years of work")
    with pytest.raises(InputError, match=r"holds something that minti\.train did not make") as error:
        run_to(flag)
    assert str(out) in str(error.value)
    assert (out if kind == "file" else out / "thesis.txt").read_text() == "years of work"


def test_overwrite(run_to: Callable, tmp_path: Path) -> None:
    """The files of the run before are replaced, also those that the new one does not write."""
    run_to("--seed", "1", "--save-every", "1", steps=6)
    run_to("--overwrite")
    assert_same_results(tmp_path / "run", run_to(out=tmp_path / "fresh"))
    assert len(list((tmp_path / "run" / "embeds").iterdir())) == 1


@pytest.mark.parametrize("killed_by", ["unlink", "write"])
def test_killed_while_overwriting(
    killed_by: str, run_to: Callable, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can be overwritten again, and nothing goes on from what is half cleared away."""

    def kill(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if killed_by == "write":
            patch.setattr(work_folder, "write_atomically", kill)
        else:
            patch.setattr(shutil, "rmtree", kill)
        with pytest.raises(KeyboardInterrupt):
            run_to("--overwrite", "--lr", "0.01")
    assert (done / "config.yaml").exists()
    # Nothing is removed before the new config is on the disk; then the state goes first.
    assert (done / "state.safetensors").exists() == (killed_by == "write")
    run_to("--overwrite", "--lr", "0.01")
    assert_same_results(done, run_to("--lr", "0.01", out=tmp_path / "fresh"))


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_what_was_being_written_is_cleared_away(flag: str, run_to: Callable, done: Path) -> None:
    names = [".log.csv.a1b2c3d4", "embeds/.step-000004.safetensors.a1b2c3d4", ".config.yaml.a1b2c3d4"]
    for name in (*names, ".mine"):
        (done / name).write_text("half")
    run_to(flag)
    assert not any((done / name).exists() for name in names)
    assert (done / ".mine").exists()


FOREIGN = [
    {"references": "photos", "placeholder": "<toy>"},
    {"made_by": "minti.evaluate 0.1.0", "init_word": "toy", "save_every": 1, "eval_size": 1},
    {"concepts": ["a", "b"]},
    {"init_word": "toy", "save_every": 1, "eval_size": 1, "concepts": ["a", "b"]},
    {"init_word": "toy", "save_every": 1, "eval_size": 1, "concepts": [{"name": "../other"}]},
]


@pytest.mark.parametrize("config", FOREIGN, ids=str)
def test_the_config_of_something_else(config: dict, run_to: Callable, tmp_path: Path) -> None:
    for name in ("run/samples", "other/samples"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "mine.png").write_text("mine")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    before = snapshot(tmp_path)
    with pytest.raises(
        InputError, match=r"holds something that minti\.train did not make|not those of a run of minti\.train"
    ):
        run_to("--overwrite")
    assert snapshot(tmp_path) == before


def test_what_would_be_read_and_cleared_away(run_to: Callable, done: Path) -> None:
    before = snapshot(done)
    for start in (done, done / "learned_embeds.safetensors"):
        with pytest.raises(InputError, match=f"{re.escape(str(start))}: is in --out, which is to be"):
            run_to("--overwrite", "--init", "file", "--init-word", str(start))
    with pytest.raises(InputError, match="samples: is in --out"):
        run_to("--overwrite", "--images", str(done / "samples"))
    assert snapshot(done) == before


def test_resume_and_overwrite_contradict_each_other(run_to: Callable, done: Path) -> None:
    before = snapshot(done)
    with pytest.raises(InputError, match="--resume continues what is in --out and --overwrite removes it"):
        run_to("--resume", "--overwrite", "--lr", "0.1")
    assert snapshot(done) == before


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="typo: holds no run to resume; check --out"):
        train.main(["--resume", "--out", str(tmp_path / "typo")])


def test_a_folder_that_cannot_be_written(run_to: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before the work."""
    monkeypatch.setattr(StableDiffusion, "__init__", None)
    monkeypatch.setattr(work_folder.os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match="run: cannot be written; give another --out"):
        run_to()


def test_overwrite_spares_what_is_not_of_the_run(run_to: Callable, base: Path, tmp_path: Path) -> None:
    out = run_to()
    (out / "notes.txt").write_text("mine")
    (out / "pictures").mkdir()
    (out / "pictures" / "inputs.png").write_text("mine too")
    run_to(out=out / "another")
    before = snapshot(out / "another")
    run_to("--overwrite", "--seed", "1")
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "pictures" / "inputs.png").read_text() == "mine too"
    assert snapshot(out / "another") == before


def concepts(base: Path, tmp_path: Path, *names: str) -> Path:
    config = tmp_path / "config.yaml"
    entries = [{"name": n, "images": str(base / "photos"), "placeholder": f"<{n}>"} for n in names]
    config.write_text(yaml.safe_dump({"concepts": entries}))
    return config


def test_overwrite_of_several_words(run_to: Callable, base: Path, tmp_path: Path) -> None:
    run_to("--config", str(concepts(base, tmp_path, "a", "b")))
    (tmp_path / "run" / "b" / "log.csv").unlink()  # as if killed before it was first saved
    run_to("--config", str(concepts(base, tmp_path, "c")), "--overwrite")
    files = set(snapshot(tmp_path / "run"))
    assert {path.split("/")[0] for path in files} == {"config.yaml", "state.safetensors", "c"}


BAD = [
    ["--images", "no/such/folder"],
    ["--checkpoint", "no/such/model"],
    ["--size", "13"],
    ["--templates", "no such list"],
    ["--placeholder", "cat"],
    ["--init-word", ""],
    ["--progressive", "3", "--num-vectors", "4"],
    ["--lr-schedule", "linear"],
    ["--sample-prompt", "a photo without its word"],
    ["--sample-prompt", "{} " + "cat " * 80 + "{}"],
]


@pytest.mark.parametrize("bad", BAD, ids=[" ".join(b)[:40] for b in BAD])
def test_bad_input_leaves_everything_as_it_was(
    bad: list[str], run_to: Callable, done: Path, tmp_path: Path
) -> None:
    """Nothing is cleared away for a run that cannot be, and nothing begun."""
    before = snapshot(done)
    with pytest.raises(InputError):
        run_to("--overwrite", *bad)
    assert snapshot(done) == before
    with pytest.raises(InputError):
        run_to(*bad, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


# A full disk
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["write", "fsync"])
def test_a_full_disk(
    where: str,
    run_to: Callable,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
) -> None:
    """Whatever cannot be written leaves what was there whole, and the run can go on where it was saved."""
    reference = run_to("--save-every", "2", steps=6, out=tmp_path / "reference")
    out, saved = tmp_path / "run", {}
    state = out / "state.safetensors"

    def fail() -> None:
        if state.exists():  # the first saving is complete
            saved.update(saved or snapshot(out))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "fsync":
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda handle: fail() or fsync(handle))
    else:
        original = Path.open

        def broken(path: Path, mode: str = "r", **options: object) -> IO:
            if mode == "xb":
                fail()
            return original(path, mode, **options)

        monkeypatch.setattr(Path, "open", broken)

    with pytest.raises(SystemExit) as status:
        run_command("minti.train", lambda _: run_to("--save-every", "2", steps=6))
    assert status.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "No space left on device; free some space" in said
    assert len(rows(out / "log.csv")) == 2
    monkeypatch.undo()
    monkeypatch.setattr(trainer, "write_report", lambda *_: None)
    found = snapshot(out)
    assert {name: found[name] for name in saved} == saved
    assert found.keys() == saved.keys()
    run_to("--save-every", "2", "--resume", steps=6)
    assert_same_results(out, reference)


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        write_atomically(tmp_path / "file" / "below", b"content")
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("warp: 9", "option 'warp' is unknown; the run was begun by minti.train 0.1"),
        ("attention: auto", "argument --attention: invalid choice: 'auto'"),
        ("steps: many", "argument --steps: "),
    ],
)
def test_the_config_of_another_version(text: str, words: str, tmp_path: Path) -> None:
    """What this version cannot do is said in one line with the file, and the version that could."""
    (tmp_path / "config.yaml").write_text(f"made_by: minti.train 0.1\n{text}\n")
    with pytest.raises(InputError) as error:
        parse_run(options(), ["--resume", "--out", str(tmp_path)])
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'config.yaml'}: ") and words in message
    assert "the run was begun by minti.train 0.1" in message and "\n" not in message
