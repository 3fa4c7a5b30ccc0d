"""What is installed: the wheel outside of a clone, and an editable install beside one."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from .processes import ROOT

pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools 77")
DOORS = ("train", "sample", "evaluate", "concept", "edit", "tune", "study", "report")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in a folder called minti, as `git clone` makes it."""
    clone = tmp_path_factory.mktemp("parent") / "minti"
    shutil.copytree(ROOT / "minti", clone / "minti", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone / name)
    return clone


def build(clone: Path, kind: str, out: Path) -> Path:
    code = f"import sys; from setuptools import build_meta as b; b.build_{kind}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=clone, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(out)
    return out


def run(code: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_the_wheel(clone: Path, tmp_path: Path) -> None:
    out = build(clone, "wheel", tmp_path / "wheel")
    files = {path.relative_to(out / "minti") for path in (out / "minti").rglob("*") if path.is_file()}
    assert files == {p.relative_to(clone / "minti") for p in (clone / "minti").rglob("*") if p.is_file()}
    (scripts,) = out.glob("*.dist-info/entry_points.txt")
    for door in DOORS:
        module = f"{door}.__main__" if door in ("study", "edit", "tune") else door
        assert f"minti-{door} = minti.{module}:command" in scripts.read_text()
    code = (
        f"import sys; sys.path.insert(0, {str(out)!r}); sys.argv = ['minti-train']; import minti.train as t; "
    )
    result = run(code + "print(t.__file__); t.command()", tmp_path)
    assert str(out) in result.stdout
    assert result.returncode == 2
    assert "weights/tiny comes with the repository, not with the package" in result.stderr


def test_an_editable_install_from_the_parent_of_the_clone(clone: Path, tmp_path: Path) -> None:
    """There the folder of the clone would do as a namespace package of the same name."""
    out = build(clone, "editable", tmp_path / "editable")
    # What this install adds goes behind the current folder, and before the minti of the tests themselves.
    code = f"import site, sys; n = len(sys.path); site.addsitedir({str(out)!r}); "
    code += "sys.path = [*sys.path[:1], *sys.path[n:], *sys.path[1:n]]; import minti; "
    result = run(code + "print(minti.load.__module__, minti.__file__)", clone.parent)
    assert result.stdout.split() == ["minti.formats.checkpoint", str(clone / "minti" / "__init__.py")], (
        result.stderr
    )


def test_every_door_has_a_command() -> None:
    import importlib

    for door in DOORS:
        module = importlib.import_module(
            f"minti.{door}.__main__" if door in ("study", "edit", "tune") else f"minti.{door}"
        )
        assert callable(module.command)
