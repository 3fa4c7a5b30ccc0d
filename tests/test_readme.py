"""What the READMEs say: every command in them is understood, every file that they name is there."""

import argparse
import importlib
import os
import re
import shlex
from pathlib import Path

import pytest

import minti
from minti import sample, train
from minti.cli.options import Options

ROOT = Path(__file__).resolve().parents[1]
READMES = sorted(
    [
        ROOT / "README.md",
        ROOT / "weights/README.md",
        ROOT / "tools/README.md",
        *ROOT.glob("minti/*/README.md"),
    ]
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a README that are in a language; "" for commands."""
    return [text for kind, text in BLOCK.findall(path.read_text(encoding="utf-8")) if kind == language]


def commands(path: Path) -> list[list[str]]:
    """The commands in a README, each as a list of words, without those that install something."""
    lines = [line for block in blocks(path, "") for line in block.replace("\\\n", " ").splitlines()]
    parts = [part for line in lines for part in line.split(" && ")]
    words = [shlex.split(part, comments=True) for part in parts]
    return [w for w in words if w and w[0] in ("python", "torchrun")]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


CASES = [(path, command) for path in READMES if path.exists() for command in commands(path)]


class Parsed(Exception):
    """Raised in place of the work of a command, once its options have been understood."""


@pytest.fixture
def only_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands stop when their options have been parsed without an error."""

    def stopping(parse):
        def wrapper(*args: object, **kwargs: object) -> None:
            parse(*args, **kwargs)
            raise Parsed

        return wrapper

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stopping(argparse.ArgumentParser.parse_args))
    monkeypatch.setattr(Options, "parse", stopping(Options.parse))


def split(command: list[str]) -> tuple[str, list[str]]:
    """The module that a command runs, and the arguments that it is given."""
    words = list(command)
    program = words.pop(0)
    if program == "torchrun":
        while words[0].startswith("--"):
            words = words[1:] if "=" in words[0] or words[0] in ("--standalone", "--") else words[2:]
    if words[0] == "-m":
        return words[1], words[2:]
    script = Path(words[0])
    assert (ROOT / script).exists(), script
    return ".".join(
        (script / "__main__" if (ROOT / script).is_dir() else script.with_suffix("")).parts
    ), words[1:]


@pytest.mark.parametrize(
    ("readme", "command"), CASES, ids=[f"{name(p)}: {' '.join(c)[:60]}" for p, c in CASES]
)
def test_commands_are_understood(
    readme: Path, command: list[str], only_parsing: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module, argv = split(command)
    if module == "pytest":
        return
    for word in argv:  # config files that a README spells out
        if word.endswith(".yaml") and not (ROOT / word).exists():
            for text in blocks(readme, "yaml"):
                (tmp_path / word).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [module, *argv])
    main = importlib.import_module(
        f"{module}.__main__" if module in ("minti.study", "minti.edit", "minti.tune") else module
    ).main
    with pytest.raises(Parsed):
        main() if main.__code__.co_argcount == 0 else main(argv)


def test_the_quick_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The very first command, with fewer steps, in a folder that has nothing but the weights."""
    first = [split(command) for command in commands(ROOT / "README.md")[:2]]
    assert [module for module, _ in first] == ["minti.train", "minti.sample"]
    (tmp_path / "weights").mkdir()
    os.symlink(ROOT / "weights" / "tiny", tmp_path / "weights" / "tiny")
    monkeypatch.chdir(tmp_path)
    assert first[0][1] == []
    train.main(["--config", "tiny", "--steps", "2", "--sample-every", "0", "--eval-every", "0"])
    sample.main([*first[1][1], "--steps", "1", "--num-images", "1"])
    out = first[1][1][first[1][1].index("--out") + 1]
    assert (tmp_path / "runs/imp/report.html").exists() and (tmp_path / out / "grid.png").exists()


def test_the_python_example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first example in Python, with fewer steps."""
    (tmp_path / "weights").mkdir()
    os.symlink(ROOT / "weights" / "tiny", tmp_path / "weights" / "tiny")
    monkeypatch.chdir(tmp_path)
    code = re.sub(r"steps=\d+", "steps=2", blocks(ROOT / "README.md", "python")[0])
    exec(compile(code, "README.md", "exec"), {})
    assert minti.Concept.load(next(tmp_path.glob("*.safetensors"))).placeholder == "<imp>"


@pytest.mark.parametrize("readme", [path for path in READMES if path.exists()], ids=name)
def test_links_lead_somewhere(readme: Path) -> None:
    text = BLOCK.sub("", readme.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (readme.parent / target).exists(), target
    for code in blocks(readme, "python"):
        compile(code, name(readme), "exec")


def test_the_readme_is_short_and_counts_right() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    rows = re.findall(r"^\| `(minti/\S+\.py)` \| (\d+) \|", text, re.MULTILINE)
    assert len(rows) >= 10
    for file, lines in rows:
        real = len((ROOT / file).read_text(encoding="utf-8").splitlines())
        assert abs(real - int(lines)) <= max(5, 0.1 * real), f"{file} has {real} lines"
