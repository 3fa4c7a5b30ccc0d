"""Files of tensors, opened safely and read piece by piece.

Whatever its format, a file is first asked for the names and shapes it holds; the tensors are then mapped from
disk. Where they have to be converted, the pages already read are given back after every few tensors, so that
loading never holds much more than the result.
"""

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import InputError
from .kinds import kind_of_head
from .pickles import Inert, Module, read_torch
from .reading import check_regular, naming

CHUNK = 128 * 2**20  # bytes read before the pages of a file that is converted are given back

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
}


class WeightFile:
    """One file of named tensors: safetensors, what `torch.save` wrote, or a TorchScript archive.

    Attributes:
        shapes: name -> shape of every tensor in it.
        nbytes: name -> size in bytes.
        dtypes: name -> number format.
        metadata: the free text of a safetensors file.
        is_script: it is a TorchScript archive, among whose tensors are constants of its programs.

    Raises:
        InputError: the file is missing, truncated, not a file of weights, or a pickle that wants to run code.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.metadata, self.is_script = path, read_metadata(path), False
        self._memory: mmap.mmap | None = None
        self._mapped: dict[str, Tensor] | None = None  # None: safetensors are mapped when they are read
        if is_safetensors(path):
            tensors = _peek_safetensors(path)
        else:
            content, self._memory = read_torch(path)
            self.is_script = isinstance(content, Module)
            tensors = self._mapped = _tensors_of(content, path)
        if not tensors:
            raise InputError(f"{path}: holds no tensors; is it a file of weights?")
        self.shapes = {key: tuple(t.shape) for key, t in tensors.items()}
        self.nbytes = {key: t.numel() * t.element_size() for key, t in tensors.items()}
        self.dtypes = {key: t.dtype for key, t in tensors.items()}

    def read(self, keys: Sequence[str], *, copied: bool) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor) for each of the keys; the tensors are views into the file, read when they are used.

        Args:
            copied: the caller keeps converted copies rather than the views themselves.
        """
        for chunk in self._chunks(keys) if copied else [keys]:
            tensors = _map_safetensors(self.path, chunk) if self._mapped is None else dict(self._mapped)
            for key in chunk:
                yield key, tensors.pop(key)
            if copied and self._memory and hasattr(mmap, "MADV_DONTNEED"):
                self._memory.madvise(mmap.MADV_DONTNEED)

    def _chunks(self, keys: Sequence[str]) -> Iterator[list[str]]:
        chunk, size = [], 0
        for key in keys:
            if chunk and size + self.nbytes[key] > CHUNK:
                yield chunk
                chunk, size = [], 0
            chunk.append(key)
            size += self.nbytes[key]
        yield chunk


def is_safetensors(path: Path) -> bool:
    """Whether a file is safetensors (else of torch), going by its content. InputError for other kinds."""
    check_regular(path)
    with naming(path, "a file that can be read"), path.open("rb") as file:
        head = file.read(512)
    # The first eight bytes are the length of the header; those of a text would be a number beyond all sizes.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return True
    if head.startswith((b"PK", b"\x80")):
        return False
    raise InputError(f"{path}: {kind_of_head(path, head)}")


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    with naming(path, "a whole safetensors file"), safe_open(path, framework="pt") as file:
        yield file


def _peek_safetensors(path: Path) -> dict[str, Tensor]:
    with _opened(path) as file:
        views = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return {
            # Whatever other types there are (of quantised models) are refused later, where they are needed.
            key: torch.empty(view.get_shape(), dtype=DTYPES.get(view.get_dtype(), torch.int8), device="meta")
            for key, view in views.items()
        }


def read_metadata(path: Path) -> dict[str, str]:
    """The free-text metadata of a safetensors file; nothing for other formats."""
    if not is_safetensors(path):
        return {}
    with _opened(path) as file:
        return file.metadata() or {}


def _map_safetensors(path: Path, keys: Sequence[str]) -> dict[str, Tensor]:
    with _opened(path) as file:
        tensors = {key: file.get_tensor(key) for key in keys}
    # Old files put their data wherever the header happened to end.
    return {key: t.clone() if t.data_ptr() % t.element_size() else t for key, t in tensors.items()}


def read_nested(path: Path) -> Any:
    """All that a file holds, for files that are more than a list of tensors: dictionaries in dictionaries,
    with numbers and text beside the tensors; or a tensor by itself.

    Raises:
        InputError: as for `WeightFile`.
    """
    if not is_safetensors(path):
        return read_torch(path)[0]
    file = WeightFile(path)
    return dict(file.read(list(file.shapes), copied=False))


def _tensors_of(content: Any, path: Path) -> dict[str, Tensor]:
    """The named tensors of what a pickle holds: at its top, or in the one place where trainers put them."""
    if isinstance(content, Module):
        return content.tensors()
    for _ in range(8):  # a hostile file may hold itself
        if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
            break
        content = content["state_dict"]
    if not isinstance(content, dict):
        what = "Python object" if isinstance(content, Inert) else type(content).__name__
        raise InputError(
            f"{path}: holds a {what}, not a dictionary of weights; save the model's state_dict()"
        )
    tensors = {key: t for key, t in content.items() if isinstance(key, str) and isinstance(t, Tensor)}
    if not tensors and (inside := [key for key, value in content.items() if isinstance(value, dict)]):
        raise InputError(f"{path}: holds its tensors under {inside[0]!r}; save what is in there alone")
    return tensors
