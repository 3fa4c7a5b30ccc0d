"""Options, config files, and the exit codes of commands."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from minti.cli.command import run_command
from minti.cli.options import Options, number, size
from minti.cli.progress import Progress
from minti.errors import InputError


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
    with pytest.raises(InputError, match="did you mean"):
        parse("--negative_prompt", "x")


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
    ],
)
def test_one_line_about_a_bad_config_file(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        parse("--config", str(path))
    assert message in str(caught.value)


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
            "minti.test: error: out of memory; try --batch-size 1, --dtype float16 or a smaller --size\n",
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
