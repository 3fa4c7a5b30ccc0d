"""The lesson of the method's README, run as it stands there but for the number of steps."""

import os
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "minti" / "inversion" / "README.md").read_text(encoding="utf-8")


def test_the_lesson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.splitlines()) <= 30
    os.symlink(ROOT / "weights", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code.replace("STEPS = 150", "STEPS = 2").replace("steps=25", "steps=2"), names)
    assert Image.open("imp.png").size == (64, 64)
    assert names["step"] == 1
    moved = (names["v"].detach() - names["word"].init).abs()
    assert torch.all(moved > 0) and moved.max() < 0.011  # two steps of AdamW at 5e-3
    parameters = [p for part in ("text_encoder", "unet") for p in getattr(names["sd"], part).parameters()]
    assert [id(p) for p in parameters if p.requires_grad] == [id(names["v"])]


def test_the_files_and_functions_of_the_equations_exist() -> None:
    for path, name in re.findall(r"\| `(minti/[\w/]+\.py)` \| `([\w.]+)` \|", README):
        text = (ROOT / path).read_text(encoding="utf-8")
        for part in name.split("."):
            assert re.search(rf"^ *(def|class) {part}\b", text, re.MULTILINE), (path, name)
