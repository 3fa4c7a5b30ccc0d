"""Files of tensors, opened safely and read piece by piece.

Whatever its format, a file is first asked for the names and shapes it holds; the tensors are then mapped from
disk. Where they have to be converted, the file is opened anew for every few of them, so that the pages
already read are given back and loading never holds much more than the result.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InputError

CHUNK = 128 * 2**20  # bytes read between two openings of a file that is converted


class WeightFile:
    """One file of named tensors: safetensors, or what `torch.save` wrote.

    Attributes:
        shapes: name -> shape of every tensor in it.
        nbytes: name -> size in bytes.
        dtypes: name -> number format.

    Raises:
        InputError: the file is missing, truncated, not a file of weights, or a pickle that wants to run code.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_safetensors = _is_safetensors(path)
        tensors = _peek_safetensors(path) if self._is_safetensors else _load_torch(path, "meta")
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
        can_reopen = self._is_safetensors or zipfile.is_zipfile(self.path)
        for chunk in self._chunks(keys) if copied and can_reopen else [keys]:
            tensors = (
                _map_safetensors(self.path, chunk) if self._is_safetensors else _load_torch(self.path, "cpu")
            )
            for key in chunk:
                yield key, tensors.pop(key)

    def _chunks(self, keys: Sequence[str]) -> Iterator[list[str]]:
        chunk, size = [], 0
        for key in keys:
            if chunk and size + self.nbytes[key] > CHUNK:
                yield chunk
                chunk, size = [], 0
            chunk.append(key)
            size += self.nbytes[key]
        yield chunk


def _is_safetensors(path: Path) -> bool:
    """Whether a file is safetensors (else a pickle of torch), going by its content, not by its name."""
    if path.is_symlink() and not path.exists():
        raise InputError(
            f"{path}: is a link to a file that is not there; the download did not finish, repeat it"
        )
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    if head.startswith(b"version https://git-lfs"):
        raise InputError(
            f"{path}: is a git-LFS pointer, not the weights; run `git lfs pull` or download the file"
        )
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise InputError(f"{path}: is a web page, not the weights; use the site's download link")
    if head[8:9] == b"{":
        return True
    if head.startswith((b"PK", b"\x80")):
        return False
    raise InputError(f"{path}: is neither safetensors nor a PyTorch file, or is damaged; download it again")


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{path}: truncated or damaged safetensors file ({error}); download it again"
        ) from None


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
}


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
    if not _is_safetensors(path):
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
    if not _is_safetensors(path):
        return _unpickle(path, "cpu")
    file = WeightFile(path)
    return dict(file.read(list(file.shapes), copied=False))


def _unpickle(path: Path, device: str) -> Any:
    options = {"map_location": device, "mmap": device == "cpu" and zipfile.is_zipfile(path)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles made by other versions
            try:
                return torch.load(path, weights_only=True, **options)
            except pickle.UnpicklingError:
                # Training frameworks leave objects of their own beside the weights. Read again with an
                # unpickler that can build tensors and nothing else.
                return torch.load(path, weights_only=False, pickle_module=_RESTRICTED, **options)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle can fail in any way whatever
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise InputError(f"{path}: truncated or damaged PyTorch file ({reason}); download it again") from None


def _load_torch(path: Path, device: str) -> dict[str, Tensor]:
    content = _unpickle(path, device)
    while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a dictionary of weights")
    return {
        key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)
    }


class _Inert:
    """Stands for any object of an unknown class in a pickle. Does nothing, whatever is done to it."""

    dump_patches = False  # asked for of modules in files of the oldest format

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return self

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...


class _Parameters(dict):
    """Stands for a ParameterDict or ParameterList of torch: nothing but a dictionary of the tensors in it."""

    dump_patches = False

    def __setstate__(self, state: Any) -> None:
        parameters = state.get("_parameters") if isinstance(state, dict) else None
        if isinstance(parameters, dict):
            self.update(parameters)


class RestrictedUnpickler(pickle.Unpickler):
    """Builds tensors and plain containers; all else is inert. An obvious attack is reported."""

    ALLOWED = frozenset(
        {
            ("collections", "OrderedDict"),
            ("torch._utils", "_rebuild_tensor"),
            ("torch._utils", "_rebuild_tensor_v2"),
            ("torch._utils", "_rebuild_parameter"),
            ("torch", "Size"),
            ("torch", "device"),
        }
    )
    SUSPECT = frozenset(
        {
            "os",
            "posix",
            "nt",
            "subprocess",
            "sys",
            "shutil",
            "io",
            "_io",
            "socket",
            "pty",
            "runpy",
            "importlib",
        }
    )
    SUSPECT_BUILTINS = frozenset({"eval", "exec", "compile", "__import__", "breakpoint", "input"})

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        if module == "torch.nn.modules.container" and name in ("ParameterDict", "ParameterList"):
            return _Parameters
        builtin = module in ("builtins", "__builtin__")
        if module.partition(".")[0] in self.SUSPECT or (builtin and name in self.SUSPECT_BUILTINS):
            raise InputError(
                f"wants to run {module}.{name}, as no weights do; it looks malicious, do not use it"
            )
        return _Inert


# What torch.load expects of a pickle module.
_RESTRICTED = SimpleNamespace(
    Unpickler=RestrictedUnpickler,
    load=lambda file, **options: RestrictedUnpickler(file, **options).load(),
    UnpicklingError=pickle.UnpicklingError,
    __name__="restricted_pickle",
)
