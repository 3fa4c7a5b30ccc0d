"""Files of tensors: every format gives the same tensors, damage is noticed, and no pickle runs code."""

import json
import os
import pickle
import struct
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from minti.errors import InputError
from minti.formats import weightfile
from minti.formats.weightfile import WeightFile, read_metadata

TENSORS = {
    "a.weight": torch.randn(5, 3, generator=torch.Generator().manual_seed(1)),
    "b": torch.arange(7, dtype=torch.float16),
    "c": torch.randn(2, 2, 3, 3).to(torch.bfloat16),
    "steps": torch.tensor([3]),
}


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch):
    """An instance of a class whose module vanishes before the file is read."""
    module = types.ModuleType("pytorch_lightning_like")
    cls = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = cls
    monkeypatch.setitem(sys.modules, module.__name__, module)
    instance = cls()
    instance.monitor = "val/loss"
    return instance


def write(path: Path, kind: str) -> Path:
    if kind == "safetensors":
        save_file(TENSORS, path)
    elif kind == "zip":
        torch.save(TENSORS, path)
    elif kind == "legacy":
        torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    elif kind == "state_dict":
        torch.save({"epoch": 3, "state_dict": TENSORS}, path)
    elif kind == "nested":
        torch.save({"state_dict": {"state_dict": TENSORS}}, path)
    elif kind == "legacy state_dict":
        torch.save({"state_dict": TENSORS, "lr": 0.1}, path, _use_new_zipfile_serialization=False)
    elif kind == "parameters":
        torch.save(
            {k: torch.nn.Parameter(t, requires_grad=t.is_floating_point()) for k, t in TENSORS.items()}, path
        )
    return path


KINDS = ["safetensors", "zip", "legacy", "state_dict", "nested", "legacy state_dict", "parameters"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied", [True, False])
def test_every_format_gives_the_same_tensors(kind: str, copied: bool, tmp_path: Path) -> None:
    # The name says nothing: formats are told apart by content.
    file = WeightFile(write(tmp_path / "weights.bin", kind))
    assert file.shapes == {key: tuple(t.shape) for key, t in TENSORS.items()}
    assert file.nbytes == {key: t.nbytes for key, t in TENSORS.items()}
    assert file.dtypes == {key: t.dtype for key, t in TENSORS.items()}
    read = dict(file.read(list(TENSORS), copied=copied))
    assert list(read) == list(TENSORS)
    for key, tensor in TENSORS.items():
        assert read[key].dtype == tensor.dtype
        assert torch.equal(read[key], tensor)


@pytest.mark.parametrize("kind", ["safetensors", "zip"])
def test_reading_in_small_pieces_gives_the_same(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weightfile, "CHUNK", 50)
    file = WeightFile(write(tmp_path / "w", kind))
    keys = ["c", "b", "a.weight"]
    assert len(list(file._chunks(keys))) == 3  # 72, 14 and 60 bytes: no two of them fit into 50
    read = dict(file.read(keys, copied=True))
    assert all(torch.equal(read[key], TENSORS[key]) for key in read)
    assert list(read) == ["c", "b", "a.weight"]


@pytest.mark.parametrize("extra", range(8))
def test_misaligned_data_of_old_safetensors_files_is_read(extra: int, tmp_path: Path) -> None:
    content = save({"x": torch.arange(6.0), "h": torch.arange(3.0).half()})
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].rstrip() + b" " * extra  # old writers did not pad to multiples of 8
    path = tmp_path / "old.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    for copied in (True, False):
        read = dict(WeightFile(path).read(["x", "h"], copied=copied))
        assert torch.equal(read["x"], torch.arange(6.0))
        assert torch.equal(read["h"], torch.arange(3.0).half())
        assert all(t.data_ptr() % t.element_size() == 0 for t in read.values())


def test_metadata(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "m.safetensors", {"step": "500"})
    assert read_metadata(tmp_path / "m.safetensors") == {"step": "500"}
    assert read_metadata(write(tmp_path / "m.bin", "zip")) == {}
    assert read_metadata(write(tmp_path / "n.safetensors", "safetensors")) == {}


# Pickles ---


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_of_unknown_classes_beside_the_weights_are_passed_over(
    zipped: bool, foreign: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {
        "state_dict": TENSORS,
        "callbacks": {type(foreign): {"best": foreign, "scores": [foreign, foreign]}},
        "hyper_parameters": foreign,
        "loops": {"names": {"x", "y"}, "size": torch.Size([1, 2]), "big": 2**80},
    }
    path = tmp_path / "model.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "pytorch_lightning_like")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    file = WeightFile(path)
    assert set(file.shapes) == set(TENSORS)
    assert all(torch.equal(t, TENSORS[key]) for key, t in file.read(list(TENSORS), copied=True))
    assert "pytorch_lightning_like" not in sys.modules


class Call:
    """Pickles as the call of any function."""

    def __init__(self, function: object, *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple:
        return self.function, self.args


ATTACKS = {
    "os.system": lambda marker: Call(os.system, f"touch {marker}"),
    "eval": lambda marker: Call(eval, f"open({str(marker)!r}, 'w').close()"),
    "exec": lambda marker: Call(exec, f"open({str(marker)!r}, 'w').close()"),
    "open": lambda marker: Call(open, str(marker), "w"),
    "getattr": lambda marker: Call(Call(getattr, os, "system"), f"touch {marker}"),
    "Path.touch": lambda marker: Call(Path.touch, Path(marker)),
    "Path.write_text": lambda marker: Call(Path.write_text, Path(marker), "x"),
    "os.mkdir": lambda marker: Call(os.mkdir, str(marker)),
    "torch.save": lambda marker: Call(torch.save, {}, str(marker)),
    "torch.load": lambda marker: Call(torch.load, str(marker) + ".pickle"),
    "io.open_code": lambda marker: Call(__import__("io").FileIO, str(marker), "w"),
}


@pytest.mark.parametrize("where", ["beside", "inside", "legacy", "bare"])
@pytest.mark.parametrize("attack", [name for name in ATTACKS if name != "getattr"])
def test_a_pickle_never_runs_code(attack: str, where: str, tmp_path: Path) -> None:
    marker = tmp_path / "was-here"
    path = tmp_path / "evil.ckpt"
    payload = ATTACKS[attack](marker)
    if where == "bare":
        path.write_bytes(pickle.dumps({"state_dict": {"x": payload}}))
    elif where == "inside":
        torch.save({"state_dict": {"x": payload, **TENSORS}}, path)
    else:
        torch.save(
            {"state_dict": TENSORS, "x": payload}, path, _use_new_zipfile_serialization=where != "legacy"
        )
    assert torch.load.__module__.startswith("torch")
    try:  # what is harmless once it is inert may be read; what is not weights may be refused
        file = WeightFile(path)
        tensors = dict(file.read(list(file.shapes), copied=True))
        assert all(torch.equal(t, TENSORS[key]) for key, t in tensors.items())
    except InputError as error:
        assert "evil.ckpt" in str(error)
    assert not marker.exists()


def test_the_attacks_of_these_tests_work(tmp_path: Path) -> None:
    """Without protection they do run, so that the test above can fail."""
    for i, attack in enumerate(("os.system", "eval", "open", "Path.touch", "os.mkdir", "io.open_code")):
        marker = tmp_path / f"marker{i}"
        pickle.loads(pickle.dumps(ATTACKS[attack](marker)))
        assert marker.exists(), attack


@pytest.mark.parametrize("attack", ["os.system", "eval", "exec", "os.mkdir"])
def test_an_obvious_attack_is_reported_as_one(attack: str, tmp_path: Path) -> None:
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": TENSORS, "x": ATTACKS[attack](tmp_path / "marker")}, path)
    with pytest.raises(InputError, match=r"evil\.ckpt: wants to run .*malicious"):
        WeightFile(path)


@pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), 3, "text", None])
def test_content_that_is_no_dictionary(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"w\.pt: holds a .*, not a dictionary"):
        WeightFile(tmp_path / "w.pt")


def test_content_without_tensors(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": 3}}, tmp_path / "w.pt")
    save_file({}, tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        with pytest.raises(InputError, match="holds no tensors"):
            WeightFile(tmp_path / name)


# Damage ---


def damaged(path: Path, content: bytes) -> InputError:
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        file = WeightFile(path)
        dict(file.read(list(file.shapes), copied=True))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value).strip()
    return caught.value


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy", "state_dict"])
@pytest.mark.parametrize("part", [0, 0.01, 0.3, 0.7, 0.95, 0.999])
def test_truncated_files(kind: str, part: float, tmp_path: Path) -> None:
    content = write(tmp_path / "whole", kind).read_bytes()
    damaged(tmp_path / "cut", content[: int(part * len(content))])


def test_bytes_of_a_safetensors_header_changed(tmp_path: Path) -> None:
    content = write(tmp_path / "whole", "safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for change in (
        {"a.weight": header["a.weight"] | {"data_offsets": [0, 10**9]}},
        {"a.weight": header["a.weight"] | {"shape": [500, 300]}},
        {"a.weight": header["a.weight"] | {"dtype": "F99"}},
        {"a.weight": "nothing"},
    ):
        new = json.dumps(header | change).encode()
        damaged(tmp_path / "bad", struct.pack("<Q", len(new)) + new + content[8 + length :])
    damaged(tmp_path / "bad", struct.pack("<Q", 2**62) + content[8:])
    damaged(tmp_path / "bad", content + b"more")


def test_files_that_are_no_weights_are_named_for_what_they_are(tmp_path: Path) -> None:
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265146304\n"
    assert "git-LFS pointer" in str(damaged(tmp_path / "w", lfs))
    assert "web page" in str(damaged(tmp_path / "w", b"<!DOCTYPE html>\n<html><head></head></html>"))
    assert "web page" in str(damaged(tmp_path / "w", b"\n  <html lang=en>"))
    assert "web page" in str(damaged(tmp_path / "w", b"<?xml version='1.0'?><Error>AccessDenied</Error>"))
    for content in (
        b"",
        b"\0" * 1000,
        os.urandom(64).replace(b"{", b"x").replace(b"P", b"x"),
        b"PK",
        b"hello",
    ):
        assert "download it again" in str(damaged(tmp_path / "w", content))


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match="link to a file that is not there"):
        WeightFile(tmp_path / "link")
    with pytest.raises(InputError, match="No such file"):
        WeightFile(tmp_path / "nowhere")
    with pytest.raises(InputError, match="cannot be read"):
        WeightFile(tmp_path)
