"""Folders that a command works in: what they were begun with, and whether they can be gone on with."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError
from ..formats.atomic import write_atomically
from .yaml_files import read_yaml


def to_yaml(args: argparse.Namespace) -> bytes:
    """Options as a config file that gives them again, but never replaces anything."""
    once = ("resume", "overwrite")
    values = {key: value for key, value in vars(args).items() if value is not None and key not in once}
    values |= {key: "x".join(map(str, value)) for key, value in values.items() if isinstance(value, tuple)}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode()


def check_unchanged(saved: Path, args: argparse.Namespace, may_differ: Sequence[str]) -> None:
    """Raises InputError, naming the first difference, unless options are those of an earlier run."""
    before, now = _flat(read_yaml(saved)), _flat(yaml.safe_load(to_yaml(args)))
    for key in sorted({*before, *now} - set(may_differ)):
        if before.get(key) != now.get(key):
            change = f"{key} was {before.get(key)!r}, now it is {now.get(key)!r}"
            raise InputError(f"{saved}: {change}; a run can only be resumed as it was")


def prepare_out(
    out: Path, args: argparse.Namespace, what: str, key: str, made: Sequence[str], may_differ: Sequence[str]
) -> None:
    """Make ready a folder whose work is begun, or gone on with: nothing else in it is ever lost.

    Args:
        what: what such a folder holds, as in "an evaluation".
        key: the option that tells its `config.yaml` from those of other commands.
        made: names in it that are cleared away, with --overwrite, before the work begins anew.
        may_differ: options that may change between a beginning and its continuation.

    Raises:
        InputError: it holds something else; or was begun with other options.
    """
    saved = out / "config.yaml"
    before = read_yaml(saved) if saved.exists() else {}
    visible = not out.is_dir() or any(not path.name.startswith(".") for path in out.iterdir())
    if out.exists() and visible and key not in before:
        raise InputError(f"{out}: holds something that is not {what}; give another --out")
    if before and not args.overwrite:
        check_unchanged(saved, args, may_differ)
        return
    for path in (out / name for name in made):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    write_atomically(saved, to_yaml(args))


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """The entries of a config, with those of tables in it as `table: entry`."""
    tables = {key: value for key, value in config.items() if isinstance(value, dict)}
    entries = {f"{key}: {name}": value for key, table in tables.items() for name, value in table.items()}
    return {key: value for key, value in config.items() if key not in tables} | entries
