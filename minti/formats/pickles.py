"""Files of `torch.save` and of TorchScript, read without running code: only tensors and containers come out.

All of them are pickles that name storages, beside the raw bytes of these storages:

    zip          since torch 1.6: a member `data.pkl` and one member `data/KEY` for each storage
    legacy       before: five pickles in a row, of which the fourth is the content, then the storages
    TorchScript  a zip whose `data.pkl` is a tree of modules; the programs beside it are left alone

A pickle is a program that names functions and classes, calls them, and sets the state of objects. Here every
name stands for a class of this module, never for what it says, and these classes cannot be written to. State
can therefore only be set on objects that the file itself made.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import InputError
from .reading import naming

PICKLE_LIMIT = 256 * 2**20  # bytes of `data.pkl`; that of Stable Diffusion has 0.2 million
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
Storage = Callable[[str, torch.dtype, int], Tensor]  # key, dtype, number of elements -> (n,)

DTYPES = {"Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16, "Double": torch.float64}
DTYPES |= {"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8}
DTYPES |= {"Byte": torch.uint8, "Bool": torch.bool, "Untyped": torch.uint8}


class Sealed(type):
    """The class of all classes that a pickle may name: they cannot be written to."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"it writes to {cls.__name__}")


def sealed(function: Callable[..., Any]) -> type:
    """A class that is called like a function and cannot be written to."""
    return Sealed("Function", (), {"__new__": lambda cls, *args: function(*args)})


class Inert(metaclass=Sealed):
    """Stands for an object of any other class. It accepts everything that a pickle does, and does nothing."""

    __slots__ = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return super().__new__(cls)

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return self

    def _ignore(self, *args: Any) -> None: ...

    __setstate__ = __setitem__ = append = extend = add = _ignore


class Dictionary(dict, metaclass=Sealed):
    """Stands for OrderedDict, and for torch's ParameterDict and ParameterList, whose tensors it takes."""

    def __setstate__(self, state: Any) -> None:
        parameters = state.get("_parameters") if isinstance(state, dict) else None
        if isinstance(parameters, dict):
            self.update(parameters)


class Module(metaclass=Sealed):
    """A module of a TorchScript archive, whatever its class: its attributes."""

    __slots__ = ("attributes",)

    def __new__(cls, *args: Any) -> Module:
        module = super().__new__(cls)
        module.attributes = {}
        return module

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors under the names of its `state_dict()`, and constants of its programs among them."""
        found, seen, waiting = {}, {id(self)}, [("", self)]
        while waiting:
            prefix, module = waiting.pop()
            for key, value in module.attributes.items():
                if isinstance(value, Tensor):
                    found[f"{prefix}{key}"] = value
                elif isinstance(value, Module) and id(value) not in seen:  # a hostile module may hold itself
                    seen.add(id(value))
                    waiting.append((f"{prefix}{key}.", value))
        return found


def _strided(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    if math.prod(size) > max(len(storage), 2**20):
        raise InputError(f"a tensor of size {tuple(size)} repeats {len(storage)} numbers")
    return storage.as_strided(size, stride, offset)


NAMES = {
    "collections.OrderedDict": Dictionary,
    "torch.nn.modules.container.ParameterDict": Dictionary,
    "torch.nn.modules.container.ParameterList": Dictionary,
    "torch._utils._rebuild_tensor": sealed(_strided),
    "torch._utils._rebuild_tensor_v2": sealed(_strided),
    "torch._utils._rebuild_parameter": sealed(lambda data, *_: data),
    "torch._utils._rebuild_parameter_with_state": sealed(lambda data, *_: data),
    "torch._tensor._rebuild_from_type_v2": sealed(lambda function, kind, args, *_: function(*args)),
    "torch.Size": sealed(lambda size=(): tuple(size)),
}
SUSPECT = "os posix nt subprocess sys shutil io _io socket pty runpy importlib ctypes"
SUSPECT_BUILTINS = "eval exec compile open getattr setattr __import__ breakpoint input"


# Python's own unpickler, since the one in C allocates as much memory as a pickle names places in it.
class Unpickler(pickle._Unpickler):
    """Builds tensors and plain containers; everything else is inert. An obvious attack is reported."""

    def __init__(self, file: BinaryIO, storage: Storage) -> None:
        super().__init__(file, encoding="latin1")
        read = self._file_read  # which would reserve as much memory as a damaged length asks for
        self._file_read = lambda size: read(min(size, PICKLE_LIMIT))
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        builtin = module in ("builtins", "__builtin__")
        if module.partition(".")[0] in SUSPECT.split() or (builtin and name in SUSPECT_BUILTINS.split()):
            raise InputError(
                f"wants to run {module}.{name}, as no weights do; it looks malicious, do not use it"
            )
        if module.partition(".")[0] == "__torch__":
            return Module
        if module.partition(".")[0] == "torch" and name.removesuffix("Storage") in DTYPES:
            return DTYPES[name.removesuffix("Storage")]
        return NAMES.get(f"{module}.{name}", Inert)

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, *rest = pid
        if kind == "module":  # of the legacy format: a class, with its source code
            return dtype
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(rest[1]) is not int or rest[1] < 0:
            raise InputError("it names a storage of an unknown kind")
        storage = self._storage(str(key), dtype, rest[1])
        _, start, count = rest[2] if len(rest) > 2 and rest[2] else (None, 0, len(storage))
        return storage[start : start + count]


def read_torch(path: Path) -> tuple[Any, mmap.mmap | None]:
    """What a file of torch holds, its tensors mapped from disk, and the map; see the top of this module.

    The objects are tensors, dictionaries, lists, numbers and text, `Module` for a TorchScript archive, and
    `Inert`. A legacy file is read into memory, and there is no map.

    Raises:
        InputError: the file is damaged, is no file of torch, or wants to run code.
    """
    with naming(path, "a PyTorch file"), path.open("rb") as file:
        if zipfile.is_zipfile(file):
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            return _read_zip(file, memory), memory
        file.seek(0)
        return _read_legacy(file), None


def _read_zip(file: BinaryIO, memory: mmap.mmap) -> Any:
    with zipfile.ZipFile(file) as archive:
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if "data.pkl" not in members:
            raise InputError("is a zip archive of other files; unpack it, and give the folder or file in it")
        if members["data.pkl"].file_size > PICKLE_LIMIT:
            raise InputError(
                f"its data.pkl unpacks to {members['data.pkl'].file_size:,} bytes; do not use it"
            )
        content = archive.read(members["data.pkl"])
        if "byteorder" in members and archive.open(members["byteorder"]).read(8) == b"big":
            raise InputError("was written on a big-endian machine; save it as safetensors there")

    def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
        info = members[f"data/{key}"]
        if info.compress_type != zipfile.ZIP_STORED or info.file_size < count * dtype.itemsize:
            raise InputError(
                f"its member data/{key} is not {count * dtype.itemsize} plain bytes; download it again"
            )
        # Before the data stands a header of 30 bytes, with the lengths of the two fields that follow it.
        header = memory[info.header_offset : info.header_offset + 30]
        fields = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = info.header_offset + 30 + fields
        if not count:
            return torch.empty(0, dtype=dtype)
        tensor = torch.frombuffer(memory, dtype=dtype, count=count, offset=start)
        return tensor.clone() if tensor.data_ptr() % dtype.itemsize else tensor

    return Unpickler(io.BytesIO(content), storage).load()


def _read_legacy(file: BinaryIO) -> Any:
    room = file.seek(0, io.SEEK_END)  # bytes that storages may have
    file.seek(0)
    storages: dict[str, Tensor] = {}

    def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
        nonlocal room
        if key not in storages:
            room -= count * dtype.itemsize
            if room < 0 or count < 0:
                raise InputError(
                    "truncated or damaged, it names more numbers than it holds; download it again"
                )
            storages[key] = torch.empty(count, dtype=dtype)
        return storages[key]

    if Unpickler(file, storage).load() != LEGACY_MAGIC:
        raise InputError("is a pickle, but none of torch.save; save its weights as safetensors")
    _, _, content, keys = (Unpickler(file, storage).load() for _ in range(4))
    if sorted(keys) != sorted(storages):
        raise InputError(
            "truncated or damaged, it does not hold the numbers that it names; download it again"
        )
    for key in keys:
        tensor = storages[str(key)]
        count = int.from_bytes(file.read(8), "little")
        buffer = memoryview(tensor.view(torch.uint8).numpy())
        if count != len(tensor) or file.readinto(buffer) != len(buffer):
            raise InputError("is truncated; download it again")
    return content
