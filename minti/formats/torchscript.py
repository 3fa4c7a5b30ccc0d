"""TorchScript archives, as OpenAI published CLIP in, read for their weights without running a line of them.

Such a file is a zip of programs and of a pickle, `data.pkl`: a tree of modules whose attributes are weights,
constants and further modules. The pickle is read by an unpickler that knows such trees and nothing else, and
the programs are left alone.
"""

from __future__ import annotations

import io
import mmap
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .weightfile import RestrictedUnpickler, WeightFile

DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def is_torchscript(path: Path) -> bool:
    """Whether a file is such an archive: torch tells them by this member, too."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


class TorchScriptFile(WeightFile):
    """The weights of a TorchScript archive under the names that its `state_dict()` would have.

    Constants of the programs are among them, since only the programs could tell them apart.

    Raises:
        InputError: the archive is damaged or not what torch writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._tensors = dict(_walk(_read(path), ""))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except Exception as error:  # a damaged pickle can fail in any way whatever
            reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
            raise InputError(f"{path}: damaged TorchScript archive ({reason}); download it again") from None
        if not self._tensors:
            raise InputError(f"{path}: holds no tensors; is it a file of weights?")
        self.shapes = {key: tuple(t.shape) for key, t in self._tensors.items()}
        self.nbytes = {key: t.numel() * t.element_size() for key, t in self._tensors.items()}
        self.dtypes = {key: t.dtype for key, t in self._tensors.items()}

    def read(self, keys: Sequence[str], *, copied: bool) -> Iterator[tuple[str, Tensor]]:
        """As of `WeightFile`: the tensors are views into the file."""
        return ((key, self._tensors[key]) for key in keys)


class _Module:
    """A module of the archive, whatever its class: its attributes."""

    def __init__(self, *args: Any) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


def _walk(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, _Module):
        for key, child in value.attributes.items():
            yield from _walk(child, f"{name}.{key}" if name else key)


def _read(path: Path) -> Any:
    """What `data.pkl` describes, its tensors mapped from disk."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

        def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
            info = members[f"data/{key}"]
            size = count * dtype.itemsize
            if info.compress_type != zipfile.ZIP_STORED or info.file_size < size:
                raise InputError(f"its member data/{key} is not {size} plain bytes; download it again")
            # Before the data stands a header of 30 bytes, with the lengths of the two fields that follow it.
            header = memory[info.header_offset : info.header_offset + 30]
            fields = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the memory cannot be written to, where it cannot
                offset = info.header_offset + 30 + fields
                return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)

        return _Unpickler(io.BytesIO(archive.read(members["data.pkl"])), storage).load()


class _Unpickler(RestrictedUnpickler):
    def __init__(self, file: io.BytesIO, storage: Any) -> None:
        super().__init__(file)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: storage.as_strided(size, stride, offset)
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise InputError(f"holds a {kind!r} of an unknown type")
        return self._storage(key, dtype, count)
