"""Folders that a command works in: what work in them was begun with, and whether it can be continued."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError
from ..formats.atomic import write_atomically
from ..version import __version__
from .yaml_files import read_yaml

try:
    import fcntl
except ImportError:  # Windows has no such locks; two processes in one folder go unnoticed there.
    fcntl = None

log = logging.getLogger(__name__)

ONCE = ("resume", "overwrite")  # options that say what to do with a folder, and are not kept in it
# Options that name files to read; those of words may have a name in front, `<toy>=FILE`.
INPUTS = ("checkpoint", "tokenizer", "vae", "unet", "text_encoder", "clip", "clip_tokenizer", "templates")
INPUTS += ("images", "image", "mask", "init_image", "image_prompt", "samples", "concept")


def to_yaml(settings: Mapping[str, Any], command: str) -> bytes:
    """The options of a command as a config file that gives them again, but never replaces anything."""
    values = {key: value for key, value in settings.items() if value is not None and key not in ONCE}
    values |= {key: "x".join(map(str, value)) for key, value in values.items() if isinstance(value, tuple)}
    values = {"made_by": f"{command} {__version__}"} | values
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode()


class WorkFolder:
    """A folder that a command works in, and in which it can continue later.

    The file `config.yaml` in it holds the settings and says which command made it. Nothing is written into a
    folder that holds anything else, and only one process at a time can work in it. Use it as a context:

        with WorkFolder(path, "minti.evaluate", ...) as folder:
            continuing = folder.check(resume=True, overwrite=args.overwrite)
            ...  # see that all input is good
            folder.begin()
            ...  # write into it

    Args:
        path: the folder, which need not exist.
        command: the command, such as "minti.train".
        settings: all options, resolved.
        defaults: the default of each option, which holds for a folder whose `config.yaml` lacks the option,
            since the version of minti that began it had no such option.
        made: a function from settings to the names, relative to the folder, of all files and folders that the
            command makes with these settings; `--overwrite` removes these and no others.
        may_differ: options that may change between the beginning and a continuation.
        signature: options that tell the `config.yaml` of this command from those of the others, where it was
            written by a version of minti that did not write `made_by`.
        active: False for all but one of several processes: they check and write nothing.
    """

    def __init__(
        self,
        path: str | Path,
        command: str,
        settings: Mapping[str, Any],
        *,
        defaults: Mapping[str, Any],
        made: Callable[[Mapping[str, Any]], Iterable[str]],
        may_differ: Sequence[str] = (),
        signature: Sequence[str] = (),
        active: bool = True,
    ) -> None:
        self.path, self.command, self.active = Path(path), command, active
        self.saved = self.path / "config.yaml"
        self.may_differ, self._made, self._signature = tuple(may_differ), made, set(signature)
        self._content = to_yaml(settings, command)
        self._settings = yaml.safe_load(self._content)
        self._defaults, self._before, self._continues = dict(defaults), {}, False
        self._handle: int | None = None

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(self, *error: object) -> None:
        if self._handle is not None:
            os.close(self._handle)  # which also unlocks the folder
            self._handle = None

    def before(self) -> dict[str, Any]:
        """The settings that the work in the folder was begun with, {} where none was begun.

        Raises:
            InputError: the folder holds something that this command did not make.
        """
        config = read_yaml(self.saved) if self.saved.exists() else {}
        by = str(config.get("made_by", "")).partition(" ")[0]
        if config and (by == self.command if by else self._signature <= config.keys()):
            return config
        # A process that was killed while it wrote the very first file has left a hidden one.
        if config or (self.path.exists() and (not self.path.is_dir() or any(_visible(self.path)))):
            raise InputError(
                f"{self.path}: holds something that {self.command} did not make; give another --out"
            )
        return {}

    def check(self, *, resume: bool, overwrite: bool) -> bool:
        """See that the work can begin or continue, and that nothing would be lost; writes nothing.

        Args:
            resume: continue what is there.
            overwrite: begin anew, whatever this command has made there.

        Returns:
            Whether there is work to continue.

        Raises:
            InputError: the folder is in use or holds something else, or was begun with other settings.
        """
        if not self.active:
            return False
        above = next(path for path in self.path.absolute().parents if path.exists())
        if not above.is_dir():
            raise InputError(f"{above}: is a file, and no folder; give another --out")
        if not os.access(self.path if self.path.exists() else above, os.W_OK):
            raise InputError(f"{self.path}: cannot be written; give another --out")
        self._lock()
        self._before = before = self.before()
        self._continues = bool(before) and not overwrite
        if self._continues and not resume:
            remedy = "give another --out, or --resume, or --overwrite"
            raise InputError(f"{self.path}: exists already; {remedy}")
        if self._continues:
            self._compare(before)
        names = {*self._made(before), *self._made(self._settings)} if before else ()
        if before and overwrite:
            self._refuse_lost_inputs(names)
        for name in names:
            path = self.path / name
            inside = [path, *(parent for parent in path.parents if self.path in parent.parents)]
            for link in inside[overwrite:]:  # a link that is to be removed does no harm
                if link.is_symlink():
                    raise InputError(f"{link}: is a link; nothing is written outside --out, so remove it")
        return self._continues

    def begin(self) -> None:
        """Make the folder, remove what is to be overwritten, and write `config.yaml`.

        The new one is complete on the disk before anything is removed, and takes its name after that. So a
        full disk loses nothing, and a process that is killed at any moment can be started again.

        Raises:
            InputError: another process has begun to work in the folder since `check`.
        """
        if not self.active:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock()
        if self.before() != self._before:
            raise InputError(f"{self.path}: another process has begun to work in it; give another --out")
        names = [*self._made(self._before)] if self._before else []
        for name in ["config.yaml", *names]:
            path = self.path / name  # remove what was being written when a process was killed
            for temporary in [*path.parent.glob(f".{path.name}.*"), *path.rglob(".*.*")]:
                temporary.unlink(missing_ok=True)
        if self._continues or not names:
            write_atomically(self.saved, self._content)
            return
        new = self.saved.with_name(".config.yaml.new")
        write_atomically(new, self._content)
        for path in [self.path / name for name in names]:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        os.replace(new, self.saved)

    def _refuse_lost_inputs(self, names: Iterable[str]) -> None:
        """Raises InputError if something that is to be read is among what `--overwrite` removes."""
        out = self.path.resolve()
        removed = {out / name for name in names}
        for given in _inputs(self._settings):
            path = Path(given).resolve()
            if path == out or removed & {path, *path.parents}:
                raise InputError(f"{given}: is in --out, which is to be replaced; copy it elsewhere first")

    def _compare(self, before: Mapping[str, Any]) -> None:
        """Raises InputError, naming the first difference, unless the settings are those of `before`."""
        if (by := before.get("made_by")) not in (None, self._settings["made_by"]):
            log.info("%s: was begun by %s; this is %s", self.path, by, __version__)
        lacking = {key: value for key, value in self._defaults.items() if key not in before}
        for path, was, now in _differences(lacking | before, self._defaults | self._settings):
            if path[0] in ("made_by", *self.may_differ) or path == ("made_of",):  # which an older one lacks
                continue
            if path[0] == "concepts" and path[-1] in self.may_differ:
                continue
            change = f"{': '.join(path)} was {was!r}, now it is {now!r}"
            remedy = "leave that as it was, or give another --out, or begin anew with --overwrite"
            if path[0] == "made_of":
                change = f"{path[-1]}: has changed since this was begun"
            raise InputError(f"{self.saved}: {change}; {remedy}")
        new = {k: v for k, v in lacking.items() if v not in (None, [], "") and k not in self.may_differ}
        if told := ", ".join(f"{key} is {value}" for key, value in new.items() if key not in ONCE):
            log.info("%s: lacks options of a later version, which have their defaults: %s", self.saved, told)

    def _lock(self) -> None:
        """Keep other processes out of the folder, until this one ends, whatever ends it."""
        if fcntl is None or self._handle is not None or not self.path.is_dir():
            return
        self._handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            remedy = "wait until it ends, or give another --out"
            raise InputError(f"{self.path}: another process is working in this folder; {remedy}") from None
        except OSError:
            pass  # a file system without locks


def _inputs(settings: Mapping[str, Any]) -> Iterator[str]:
    """The paths of all that settings say is to be read, of a word also without the name in front."""
    for value in map(settings.get, INPUTS):
        for text in value if isinstance(value, list) else filter(None, [value]):
            yield from (text, *filter(None, [text.partition("=")[2]]))
    if settings.get("init") == "file":
        yield settings["init_word"]
    entries = settings.get("concepts")
    for entry in entries if isinstance(entries, list) else ():
        yield from _inputs({"init": settings.get("init"), "init_word": settings.get("init_word"), **entry})


def _visible(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if not path.name.startswith("."))


def _differences(was: Any, now: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Where two nested tables differ: the keys that lead there, and both values, None for a lacking one."""
    was, now = _as_table(was), _as_table(now)
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted({*was, *now}):
            yield from _differences(was.get(key), now.get(key), *path, key)
    elif was != now:
        yield path, was, now


def _as_table(value: Any) -> Any:
    """A list of tables, such as the `concepts` of a training run, as a table by name."""
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        return {str(entry.get("name", i)): entry for i, entry in enumerate(value)}
    return value
