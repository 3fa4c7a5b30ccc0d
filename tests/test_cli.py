"""Options, config files, and the exit codes of commands."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minti import __version__
from minti.cli.command import Stream, out_of_memory, run_command
from minti.cli.options import Options, number, path, size
from minti.cli.processes import Processes
from minti.cli.progress import Progress
from minti.cli.work_folder import WorkFolder
from minti.cli.yaml_files import read_yaml
from minti.errors import InputError

from .processes import ENVIRONMENT, ROOT


def options() -> Options:
    opts = Options("minti.test", "A command for tests.")
    opts.add("a", "--steps", 50, type=number(int, 1), help="how many")
    opts.add("a", "--guidance-scale", 7.5, type=number(float, 0, 100), help="how much")
    opts.add("a", "--size", type=size, help="how large")
    opts.add("b", "--prompt", [], help="what")
    opts.add("b", "--negative-prompt", "", help="what not")
    opts.add("b", "--overwrite", False, help="replace")
    opts.add("b", "--flip", True, help="mirror")
    opts.add("b", "--dtype", "auto", choices=["auto", "float32"], help="format")
    return opts


def parse(*argv: str, required: tuple[str, ...] = ()) -> dict:
    return vars(options().parse(list(argv), required))


DEFAULTS = {
    "steps": 50,
    "guidance_scale": 7.5,
    "size": None,
    "prompt": [],
    "negative_prompt": "",
    "overwrite": False,
    "flip": True,
    "dtype": "auto",
}


def test_defaults() -> None:
    assert parse() == DEFAULTS


def test_flags_go_before_set_before_config_before_defaults(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("steps: 10\nguidance_scale: 3\noverwrite: true\nsize: 64x32\n")
    expected = DEFAULTS | {"steps": 10, "guidance_scale": 3.0, "overwrite": True, "size": (64, 32)}
    assert parse("--config", str(config)) == expected
    expected |= {"steps": 20}
    assert parse("--config", str(config), "--set", "steps=20") == expected
    expected |= {"steps": 30, "overwrite": False}
    argv = ["--config", str(config), "--set", "steps=20", "--steps", "30", "--no-overwrite"]
    assert parse(*argv) == expected


def test_the_order_of_flags_and_set_does_not_matter() -> None:
    assert parse("--steps", "30", "--set", "steps=20")["steps"] == 30
    assert parse("--set", "steps=20", "--set", "steps=25")["steps"] == 25
    assert parse("--steps", "30", "--steps", "31")["steps"] == 31


def test_lists(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("prompt: [a cat, a dog]\n")
    assert parse("--config", str(config))["prompt"] == ["a cat", "a dog"]
    assert parse("--config", str(config), "--prompt", "x", "--prompt", "y")["prompt"] == ["x", "y"]
    assert parse("--set", "prompt=a cat")["prompt"] == ["a cat"]
    assert parse("--set", "prompt=a", "--set", "prompt=b")["prompt"] == ["b"]
    config.write_text("prompt: just one\n")
    assert parse("--config", str(config))["prompt"] == ["just one"]


def test_values_may_look_like_options(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("prompt: ['--steps', '-x', '=', '']\nnegative_prompt: '--overwrite'\n")
    values = parse("--config", str(config))
    assert values["prompt"] == ["--steps", "-x", "=", ""]
    assert values["negative_prompt"] == "--overwrite"
    assert values["steps"] == 50


def test_dashes_and_underscores() -> None:
    assert parse("--set", "guidance-scale=2")["guidance_scale"] == 2
    assert parse("--set", "guidance_scale=2")["guidance_scale"] == 2
    assert parse("--set", "flip=false")["flip"] is False
    assert parse("--no-flip")["flip"] is False


@pytest.mark.parametrize(
    ("text", "value"), [("512", 512), ("768x512", (768, 512)), ("8X16", (8, 16)), (" 64 ", 64)]
)
def test_size(text: str, value: object) -> None:
    assert parse("--size", text)["size"] == value


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--stepz", "3"], ["--stepz"]),
        (["--set", "stepz=3"], ["unknown option 'stepz'", "did you mean 'steps'?"]),
        (["--set", "xyzzy=3"], ["unknown option 'xyzzy'"]),
        (["--set", "steps"], ["--set steps: write KEY=VALUE"]),
        (["--steps", "0"], ["--steps", "0 should be at least 1"]),
        (["--steps", "1.5"], ["--steps", "1.5"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--steps"], ["--steps"]),
        (["--set", "steps=-1"], ["--steps", "-1 should be at least 1"]),
        (["--set", "steps=[1, 0]"], ["--steps", "not a single value"]),
        (["--guidance-scale", "nan"], ["--guidance-scale", "nan"]),
        (["--guidance-scale", "101"], ["at least 0 and at most 100"]),
        (["--size", "12x"], ["--size", "12x"]),
        (["--size", "1x2x3"], ["--size", "1x2x3"]),
        (["--dtype", "float8"], ["--dtype", "float8", "float32"]),
        (["--set", "dtype=float8"], ["--dtype", "float8", "float32"]),
        (["stray"], ["stray"]),
    ],
)
def test_one_line_about_a_bad_option(argv: list[str], parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        parse(*argv)
    for part in parts:
        assert part in str(caught.value)


def test_an_unknown_flag_gets_a_suggestion() -> None:
    with pytest.raises(InputError, match="did you mean"):
        parse("--guidance-scal3", "3")
    assert parse("--negative_prompt", "x", "--guidance_scale=2")["guidance_scale"] == 2


@pytest.mark.parametrize("value", ["[a", "{", "'a", "a: b: c", "*x", "@", "{a: b}", "cat: red", "no", "on"])
def test_set_with_text_that_means_something_else_in_yaml(value: str) -> None:
    """It is taken as the text it looks like, or refused in a line that names the option; never changed."""
    for key in ("prompt", "negative_prompt"):
        try:
            result = parse("--set", f"{key}={value}")[key]
        except InputError as error:
            assert key in str(error) or "--" + key.replace("_", "-") in str(error)
        else:
            assert result == ([value] if key == "prompt" else value)


def test_required() -> None:
    with pytest.raises(InputError, match=r"--prompt must be given; see --help"):
        parse(required=("prompt", "steps"))
    with pytest.raises(InputError, match=r"--size and --prompt must be given"):
        parse(required=("size", "prompt"))
    assert parse("--prompt", "", required=("prompt",))["prompt"] == [""]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"a: [", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (b"- a\n- b\n", "should hold lines like"),
        (b"", "should hold lines like"),
        (b"promt: x\n", "did you mean 'prompt'?"),
        (b"config: x.yaml\n", "unknown option 'config'"),
        (b"3: x\n", "unknown option 3"),
        (b"steps: zero\n", "steps"),
        (b"steps: null\nsize: -\n", "size"),
        (b"overwrite: perhaps\n", "overwrite: 'perhaps' should be true or false"),
        (b"steps: true\n", "steps: True is not a single value"),
        (b"steps: {a: 1}\n", "steps: {'a': 1} is not a single value"),
        (b"prompt: [{a: 1}]\n", "prompt"),
        (b"steps: [1, 2]\n", "steps"),
        (b"negative_prompt: 0123\n", "negative-prompt: 83 is no text in YAML; put it between quotes"),
        (b"negative_prompt: 12:30\n", "negative-prompt: 750 is no text in YAML"),
        (b"prompt: [a, 1.10]\n", "is no text in YAML"),
        (b"negative_prompt: 2024-01-02\n", "is no text in YAML"),
        (b"negative_prompt: 2024-13-45\n", "is not valid YAML"),
        (b"steps: !!int x\n", "is not valid YAML"),
        (b'prompt: "a\\0b"\n', "holds characters that are no text"),
        (b'prompt: "\\ud800"\n', "holds characters that are no text"),
        (b"steps: " + b"[" * 3000 + b"]" * 3000, "is not valid YAML"),
        (b"steps: 1" + b"0" * 5000, "is not valid YAML"),
        (
            b"a: &a [x, x, x, x, x, x, x, x, x]\n"
            + b"".join(b"%c: &%c [%s]\n" % (i + 1, i + 1, b",".join([b"*%c" % i] * 9)) for i in b"abcdefgh"),
            "too many for a config file",
        ),
        (b"#" * 2_000_000, "too many for a config file"),
    ],
)
def test_one_line_about_a_bad_config_file(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        parse("--config", str(path))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_config_that_is_no_file(tmp_path: Path) -> None:
    """A named pipe would be waited for for ever."""
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(InputError, match="is not a file; give a YAML file, or the name of a recipe"):
            parse("--config", str(tmp_path / name))


def test_bytes_that_are_no_text() -> None:
    for text in ("caf\udce9 cup", "a\x1b[31m"):
        with pytest.raises(InputError, match="is not text in UTF-8, or holds control characters"):
            parse("--prompt", text)


def test_numbers_have_bounds() -> None:
    for text in ("1e400", "inf", "nan"):
        with pytest.raises(InputError, match="guidance-scale"):
            parse("--guidance-scale", text)
    for flag, text in (
        ("--steps", "1" + "0" * 12),
        ("--size", "100000"),
        ("--size", "0x64"),
        ("--size", "-8"),
    ):
        with pytest.raises(InputError, match=flag):
            parse(flag, text)


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert path("~/photos") == "/home/me/photos"
    assert path("a/~/photos") == "a/~/photos"


def test_version(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--version")
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"minti {__version__}\n"


def test_help_groups_the_options_and_shows_defaults(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "how many (default: 50)" in text
    assert "\na:\n" in text
    assert "\nb:\n" in text


# Exit codes ---


def exit_code(error: BaseException | None, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    def main(argv: object) -> None:
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as caught:
        run_command("minti.test", main)
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 0, ""),
        (InputError("x: is\n  bad"), 2, "minti.test: error: x: is bad\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/out/a.png"),
            2,
            "minti.test: error: /out/a.png: No space left on device; free some space\n",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/out"),
            2,
            "minti.test: error: /out: Permission denied; check the path and its permissions\n",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried ..."),
            2,
            "minti.test: error: out of memory; try --batch-size 1 or a smaller --size\n",
        ),
    ],
)
def test_exit_codes(error: BaseException | None, code: int, line: str, capsys: pytest.CaptureFixture) -> None:
    assert exit_code(error, capsys) == (code, line)


def test_interruption(capsys: pytest.CaptureFixture) -> None:
    code, text = exit_code(KeyboardInterrupt(), capsys)
    assert code == 130
    assert text.strip() == "minti.test: interrupted; what was finished is kept"


def test_mistakes_in_the_program_are_not_dressed_up() -> None:
    """Only what the user can mend is one line; a bug keeps its traceback."""

    def main(argv: object) -> None:
        raise AssertionError("a bug")

    with pytest.raises(AssertionError):
        run_command("minti.test", main)


def test_the_advice_fits_what_ran_out() -> None:
    for error in (MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")):
        with pytest.raises(InputError, match=r"^out of memory; buy more$"), out_of_memory("buy more"):
            raise error
    with pytest.raises(RuntimeError, match="a bug"), out_of_memory("buy more"):
        raise RuntimeError("a bug")


def test_a_stream_that_cannot_be_written() -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    stream = Stream(Closed())
    print("nobody reads this", file=stream, flush=True)
    assert stream.error.errno == errno.EIO
    print("nor this", file=Stream(None))


def test_control_characters_do_not_reach_the_terminal() -> None:
    print("\x1b[31m<toy>\x9b\tred", file=Stream(text := io.StringIO()))
    assert text.getvalue() == "\\x1b[31m<toy>\\x9b\tred\n"


@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        (">/dev/full", 2, "error: standard output: No space left on device; free some space"),
        ("2>/dev/full", 0, ""),
        pytest.param("2>&-", 0, "", marks=pytest.mark.slow),
        (">&- 2>&-", 0, ""),
        ("| true", 0, ""),
    ],
)
def test_help_that_nobody_can_read(redirection: str, code: int, said: str) -> None:
    command = f"set -o pipefail; {sys.executable} -m minti.report --help {redirection}"
    result = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (result.returncode, "Traceback" in result.stderr) == (code, False), result.stderr
    assert said in result.stderr


# Several processes ---


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "banana"}, "WORLD_SIZE is 'banana'; unset it, or use torchrun"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
        ({"RANK": "5"}, "RANK is 5 and WORLD_SIZE is 1"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
    ],
)
def test_odd_variables(variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        Processes.from_environment()


LEAVE = """
import os, torch, torch.distributed as dist
from minti.cli.processes import Processes
def threads():
    return [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
with Processes.from_environment().joined():
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    torch.optim.AdamW([parameter]).step()  # imports what would keep the group alive
    dist.all_reduce(torch.ones(3))
    assert any("gloo" in name for name in threads()), threads()
assert not any("gloo" in name for name in threads()), threads()
os.write(1, b"left %r\\n" % dist.is_initialized())  # both processes write into one pipe
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the names of threads from /proc")
def test_no_thread_is_left_behind() -> None:
    """One that is still there when Python shuts down aborts the process, some of the time."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*command, "--no-python", sys.executable, "-c", LEAVE],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("left False") == 2


# Folders ---


def folder(path: Path, steps: int = 3, command: str = "minti.test", **settings: object) -> WorkFolder:
    settings = {"steps": steps, "device": "cpu"} | settings
    return WorkFolder(
        path,
        command,
        settings,
        defaults={"steps": 50, "device": "auto", "flip": True, "limit": None},
        made=lambda settings: ("result.txt", "pictures"),
        may_differ=("device",),
        signature=("steps", "device"),
    )


def begin(path: Path, *, resume: bool = True, overwrite: bool = False, **settings: object) -> bool:
    with folder(path, **settings) as work:
        continues = work.check(resume=resume, overwrite=overwrite)
        work.begin()
    return continues


def test_a_folder_is_begun_and_continued(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "new" / "out"
    assert not begin(out)
    (out / "result.txt").write_text("dear")
    assert begin(out, device="cuda")  # which may differ
    assert (out / "result.txt").read_text() == "dear"
    text = (out / "config.yaml").read_text()
    assert f"made_by: minti.test {__version__}" in text and "device: cuda" in text
    with pytest.raises(InputError, match=r"config\.yaml: steps was 3, now it is 4; leave that as it was"):
        begin(out, steps=4)
    with pytest.raises(InputError, match="exists already; give another --out, or --resume, or --overwrite"):
        begin(out, resume=False)


def test_a_folder_of_another_version(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An option that it lacks has its default, which is said; one that it should not have is named."""
    caplog.set_level("INFO")
    (tmp_path / "config.yaml").write_text("steps: 3\ndevice: cpu\n")  # before `made_by` was written
    with pytest.raises(InputError, match="flip was True, now it is False"):
        begin(tmp_path, flip=False)
    with pytest.raises(InputError, match="limit was None, now it is 2"):
        begin(tmp_path, limit=2)
    assert begin(tmp_path)
    assert "lacks options of a later version, which have their defaults: flip is True" in caplog.text
    (tmp_path / "config.yaml").write_text("made_by: minti.test 9.0\nsteps: 3\ndevice: cpu\nwarp: 9\n")
    with pytest.raises(InputError, match="warp was 9, now it is None"):
        begin(tmp_path)
    assert "was begun by minti.test 9.0" in caplog.text


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else(overwrite: bool, tmp_path: Path) -> None:
    for content in (None, "made_by: minti.other 0.1.0\nsteps: 3\ndevice: cpu\n", "steps: 3\n", "mine: 1\n"):
        (tmp_path / "result.txt").write_text("dear")
        if content:
            (tmp_path / "config.yaml").write_text(content)
        with pytest.raises(InputError, match=r"holds something that minti\.test did not make"):
            begin(tmp_path, overwrite=overwrite)
        assert (tmp_path / "result.txt").read_text() == "dear"


def test_overwriting_a_folder(tmp_path: Path) -> None:
    """Removes what the command made there, and no more; a link itself, and not what it leads to."""
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    (other / "precious.png").write_text("dear")
    begin(out)
    for name in ("result.txt", "notes.txt", ".result.txt.a1b2c3d4"):
        (out / name).write_text("old")
    (out / "pictures").symlink_to(other)
    with pytest.raises(InputError, match="pictures: is a link; nothing is written outside --out"):
        begin(out)
    begin(out, overwrite=True, steps=9)
    assert {path.name for path in out.iterdir()} == {"config.yaml", "notes.txt"}
    assert (other / "precious.png").read_text() == "dear"


def test_two_processes_in_one_folder(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with folder(tmp_path / "out") as first, folder(tmp_path / "out") as second:
        first.check(resume=True, overwrite=False)
        second.check(resume=True, overwrite=False)  # neither is there yet
        first.begin()
        with pytest.raises(InputError, match="another process is working in this folder"):
            second.begin()
        with pytest.raises(InputError, match="another process is working in this folder"):
            begin(tmp_path / "out")
    assert begin(tmp_path / "out")


# Progress ---


def test_progress_prints_few_lines_and_the_last(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = Progress(20, "step")
    for _ in range(20):
        now[0] += 1.0
        progress.step("loss 0.5")
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "5/20 steps, 1.00/s, 0:15 left, loss 0.5",
        "10/20 steps, 1.00/s, 0:10 left, loss 0.5",
        "15/20 steps, 1.00/s, 0:05 left, loss 0.5",
        "20/20 steps, 1.00/s, 0:00 left, loss 0.5",
    ]


@pytest.mark.parametrize("text", ["steps: 3\nsteps: 4\n", "words: [{a: 1, b: 2, a: 1}]\n"])
def test_a_key_that_is_there_twice(text: str, tmp_path: Path) -> None:
    """PyYAML takes the last one without a word."""
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=r"c\.yaml: is not valid YAML \('(steps|a)' is there twice\)"):
        read_yaml(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("base: &x {a: 1}\nmore: {<<: *x, a: 2}\n")
    assert read_yaml(tmp_path / "c.yaml")["more"] == {"a": 2}
