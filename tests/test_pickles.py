"""Every place where a pickle may be read, with every kind of payload: nothing runs or changes."""

import collections
import contextlib
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minti.errors import InputError
from minti.formats import pickles
from minti.formats.clip_checkpoint import load_clip
from minti.formats.concept import Concept
from minti.formats.single_file import plan_single_file
from minti.formats.weightfile import WeightFile, read_nested

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.float16)}

# Payloads: programs for the stack machine, which leave one object on the stack.


def name(module: str, attribute: str) -> bytes:
    """The opcode that names a function or class."""
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def build(target: bytes, state: bytes) -> bytes:
    return target + state + b"b"


DEFAULTS = b"(N}(S'__defaults__'\n(I1\ntS'__name__'\nS'evil'\nut"  # (None, {...}): the state of slots
ATTRIBUTE = b"}(S'evil'\nI1\nu"  # a dictionary: the state of __dict__
TARGETS = {
    "rebuild": name("torch._utils", "_rebuild_tensor_v2"),
    "rebuild parameter": name("torch._utils", "_rebuild_parameter"),
    "OrderedDict": name("collections", "OrderedDict"),
    "Size": name("torch", "Size"),
    "ParameterDict": name("torch.nn.modules.container", "ParameterDict"),
    "storage": name("torch", "FloatStorage"),
    "dtype": name("torch", "float32"),
    "device": name("torch", "device"),
    "unknown": name("some.module", "Thing"),
    "script module": name("__torch__", "Net"),
    "ours": name("minti.formats.pickles", "Inert"),
    "unpickler": name("pickle", "Unpickler"),
    "int": name("builtins", "int"),
}
PAYLOADS = {
    f"{kind} of {target}": build(opcode, state)
    for target, opcode in TARGETS.items()
    for kind, state in (("slots", DEFAULTS), ("attributes", ATTRIBUTE))
}
PAYLOADS |= {f"item of {target}": opcode + b"S'x'\nI1\ns" for target, opcode in TARGETS.items()}
PAYLOADS |= {f"append to {target}": opcode + b"I1\na" for target, opcode in TARGETS.items()}
PAYLOADS |= {
    f"run {module}.{function}": name(module, function) + b"(S'touch MARKER'\ntR"
    for module, function in (
        ("os", "system"),
        ("posix", "system"),
        ("subprocess", "call"),
        ("builtins", "exec"),
        ("builtins", "eval"),
        ("torch.utils.cpp_extension", "load"),
        ("torch.serialization", "load"),
        ("torch.hub", "load"),
        ("pathlib", "Path.touch"),
        ("numpy", "load"),
    )
}


def bytes_of(payload: bytes) -> bytes:
    """A pickle of {"state_dict": {...}, "x": what the payload makes}, without any tensor."""
    return b"\x80\x02}(S'state_dict'\n}S'a'\nI1\nsS'x'\n" + payload + b"u."


# Places


def bare(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def zipped(path: Path, content: bytes, folder: str = "archive") -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{folder}/data.pkl", content)
        archive.writestr(f"{folder}/version", "3\n")


def inner(path: Path, content: bytes) -> None:
    zipped(path, content, "some/folder")


def script(path: Path, content: bytes) -> None:
    zipped(path, content)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/constants.pkl", b"\x80\x02).")


def legacy(path: Path, content: bytes) -> None:
    head = pickle.dumps(pickles.LEGACY_MAGIC, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    path.write_bytes(head + content + pickle.dumps([], 2))


def legacy_head(path: Path, content: bytes) -> None:
    path.write_bytes(pickle.dumps(pickles.LEGACY_MAGIC, 2) + content)


def legacy_keys(path: Path, content: bytes) -> None:
    head = pickle.dumps(pickles.LEGACY_MAGIC, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    path.write_bytes(head + pickle.dumps({}, 2) + content)


WRITERS = [bare, zipped, inner, script, legacy, legacy_head, legacy_keys]
READERS: dict[str, Callable[[Path], object]] = {
    "weights": lambda path: dict(WeightFile(path).read([], copied=True)),
    "nested": read_nested,
    "checkpoint": lambda path: plan_single_file(path, ema=False),
    "clip": lambda path: load_clip(path, device=torch.device("cpu")),
    "concept": Concept.load_all,
}


def watched() -> dict[str, object]:
    """What payloads aim at, as it is now: attributes of functions and classes."""
    functions = (torch._utils._rebuild_tensor_v2, torch._utils._rebuild_parameter, torch.load, os.system)
    classes = (
        collections.OrderedDict,
        torch.Size,
        torch.nn.ParameterDict,
        torch.device,
        pickle.Unpickler,
        int,
    )
    ours = [thing for thing in vars(pickles).values() if isinstance(thing, type)] + list(
        pickles.NAMES.values()
    )
    seen: dict[str, object] = {}
    for thing in (*functions, *classes, *ours, torch.FloatStorage):
        key = f"{thing!r} {id(thing)}"
        seen[f"{key} dict"] = (
            {k: v for k, v in vars(thing).items() if k != "__doc__"} if hasattr(thing, "__dict__") else None
        )
        seen[f"{key} defaults"] = getattr(thing, "__defaults__", None)
        seen[f"{key} name"] = getattr(thing, "__name__", None)
    seen["dtype"] = dir(torch.float32)
    return seen


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
@pytest.mark.parametrize("reader", READERS)
def test_no_payload_changes_the_process(
    reader: str, writer: Callable[[Path, bytes], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = watched()
    for number, (kind, payload) in enumerate(PAYLOADS.items()):
        path = tmp_path / f"{number}.pt"
        writer(path, bytes_of(payload.replace(b"MARKER", str(tmp_path / "marker").encode())))
        try:
            READERS[reader](path)
        except InputError as error:
            assert path.name in str(error) and "\n" not in str(error), kind
        path.unlink()
        assert watched() == before, kind
        assert not list(tmp_path.iterdir()), kind
    torch.save(TENSORS, tmp_path / "good.pt")
    read = dict(WeightFile(tmp_path / "good.pt").read(list(TENSORS), copied=True))
    assert all(torch.equal(read[key], tensor) for key, tensor in TENSORS.items())


def test_the_payloads_of_this_test_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Python's own unpickler they write to functions, so that the test above can fail."""

    def victim(a: object = 0) -> object: ...

    monkeypatch.setattr(torch._utils, "_rebuild_tensor_v2", victim)
    pickle.loads(bytes_of(PAYLOADS["slots of rebuild"]))
    pickle.loads(bytes_of(PAYLOADS["attributes of rebuild"]))
    assert victim.__defaults__ == (1,) and victim.evil == 1


# Tensors


@pytest.mark.parametrize("zipped", [True, False])
def test_everything_torch_saves_is_read(zipped: bool, tmp_path: Path) -> None:
    base = torch.arange(24.0)
    dtypes = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
    content = {kind: torch.arange(4).to(getattr(torch, kind)) for kind in dtypes}
    content |= {"view": base[4:12].view(2, 4), "transposed": base.view(4, 6).T, "scalar": torch.tensor(3.0)}
    content |= {"empty": torch.empty(0, 3), "parameter": torch.nn.Parameter(torch.ones(3)), "shared": base}
    content |= {"expanded": torch.arange(3.0).expand(2, 3)}
    path = tmp_path / "w.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    read = read_nested(path)
    for key, tensor in content.items():
        assert read[key].dtype == tensor.dtype and torch.equal(read[key], tensor.detach()), key
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    torch.save(
        module.state_dict(), path, _use_new_zipfile_serialization=zipped
    )  # has an attribute, _metadata
    assert all(torch.equal(read_nested(path)[key], t) for key, t in module.state_dict().items())
    words = torch.nn.ParameterDict({"*": torch.ones(2)})
    torch.save({"string_to_param": words}, path, _use_new_zipfile_serialization=zipped)
    assert torch.equal(read_nested(path)["string_to_param"]["*"], torch.ones(2))
    torch.save(module, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"holds a Python object, not a dictionary of weights; .*state_dict"):
        WeightFile(path)


def test_a_file_that_holds_itself(tmp_path: Path) -> None:
    content: dict = {}
    content["state_dict"] = content
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"holds no tensors|under 'state_dict'"):
        WeightFile(tmp_path / "w.pt")


def test_weights_under_another_name(tmp_path: Path) -> None:
    torch.save({"module": TENSORS, "epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(InputError, match="holds its tensors under 'module'"):
        WeightFile(tmp_path / "w.pt")


# Bombs


def refused(path: Path) -> str:
    for read in (WeightFile, read_nested):
        with pytest.raises(InputError) as caught:
            read(path)
    return str(caught.value)


def test_a_zip_that_unpacks_to_very_much(tmp_path: Path) -> None:
    """Its sizes are looked at before it is unpacked: here 300 MiB of zeros."""
    path = tmp_path / "bomb.pt"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("archive/data.pkl", "w", force_zip64=True) as member,
    ):
        for _ in range(300):
            member.write(bytes(2**20))
    assert "unpacks to" in refused(path)


def test_a_compressed_storage_is_not_unpacked(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(2**20)}, tmp_path / "w.pt")
    with (
        zipfile.ZipFile(tmp_path / "w.pt") as old,
        zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    assert "plain bytes" in refused(tmp_path / "z.pt")


def storage(count: str, size: str, stride: str) -> bytes:
    """A pickle of {"x": tensor}, whose storage claims to have so many numbers."""
    pid = b"(S'storage'\n" + name("torch", "FloatStorage") + f"S'0'\nS'cpu'\nI{count}\ntQ".encode()
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    arguments = (
        b"(" + pid + f"I0\n({size}t({stride}tI00\n".encode() + name("collections", "OrderedDict") + b")RtR"
    )
    return b"\x80\x02}S'x'\n" + rebuild + arguments + b"s."


@pytest.mark.parametrize(
    ("count", "size", "stride"),
    [
        ("10000000000", "I10000000000\n", "I1\n"),
        ("4", "I1000000000\nI1000000\n", "I0\nI0\n"),
        ("-1", "I4\n", "I1\n"),
        ("4", "I5\n", "I1\n"),
        ("4", "I-4\n", "I1\n"),
        ("4", "I2\n", "I-1\n"),
        ("9", "I2\n", "I1\n"),
    ],
)
def test_more_numbers_than_there_are(count: str, size: str, stride: str, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    zipped(path, storage(count, size, stride))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", struct.pack("4f", 1, 2, 3, 4))
    refused(path)
    legacy(path, storage(count, size, stride))
    refused(path)
    zipped(path, storage("4", "I4\n", "I1\n"))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", struct.pack("4f", 1, 2, 3, 4))
    assert read_nested(path)["x"].tolist() == [1, 2, 3, 4]  # so that the cases above can fail


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02" + b"r\xff\xff\xff\x7f".join([b"}", b"."]),  # a memo of two thousand million places
        b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.",  # a text of 2^63 bytes
        b"\x80\x02I" + b"9" * 10**5 + b"\n.",
        b"\x80\x02" + b"]" * 10**4 + b".",
        b"\x80\x02(" + b"(" * 10**4,
        b"",
    ],
)
def test_pickles_that_ask_for_much(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    for writer in WRITERS:
        writer(path, content)
        with pytest.raises(InputError):
            WeightFile(path)
        with contextlib.suppress(InputError):  # a list of lists may be read
            read_nested(path)


def test_a_script_module_that_holds_itself(tmp_path: Path) -> None:
    module = name("__torch__", "Net") + b")\x81q\x00}(S'a'\nh\x00S'b'\nh\x00ub."
    script(tmp_path / "w.pt", b"\x80\x02" + module)
    with pytest.raises(InputError, match="holds no tensors"):
        WeightFile(tmp_path / "w.pt")


def test_pipes_and_devices_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), Path("/dev/stdin"), tmp_path):
        assert "cannot be read" in refused(path)


def test_archives_of_other_things(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("unet/config.json", "{}")
    assert "is a zip archive of other files; unpack it" in refused(tmp_path / "model.zip")
    buffer = io.BytesIO()
    torch.save(TENSORS, buffer)
    damaged = bytearray(buffer.getvalue())
    locator = damaged.rindex(b"PK\x06\x07")
    damaged[locator + 16 : locator + 20] = b"\x02\0\0\0"  # the number of disks, of a zip in several parts
    (tmp_path / "disks.pt").write_bytes(bytes(damaged))
    refused(tmp_path / "disks.pt")


def test_a_damaged_length_asks_for_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    path.write_bytes(b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b"abc")  # BINBYTES8
    with pytest.raises(InputError, match=r"old\.pt: truncated or damaged"):
        pickles.read_torch(path)
