"""Config files and the recipes that come with minti."""

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError

RECIPES = Path(__file__).parents[1] / "recipes"
MAX_BYTES, MAX_ENTRIES = 2**20, 50_000  # of a config file; aliases count as often as they are used

# PyYAML raises these beside its own errors, for instance for the date 2024-13-45 and for `!!int x`.
DAMAGED = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A key that is there twice is an error; PyYAML takes the last one without a word."""
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if keys and keys.most_common(1)[0][1] > 1:
            raise yaml.YAMLError(f"{keys.most_common(1)[0][0]!r} is there twice")
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A config file, or the recipe of that name.

    Raises:
        InputError: there is no such file, or it is not a table of plain values.
    """
    if not Path(path).is_file() and (RECIPES / f"{path}.yaml").exists():
        path = RECIPES / f"{path}.yaml"
    if Path(path).exists() and not Path(path).is_file():
        raise InputError(f"{path}: is not a file; give a YAML file, or the name of a recipe")
    try:
        content = Path(path).read_bytes()
        if len(content) > MAX_BYTES:
            raise InputError(f"{path}: has {len(content)} bytes, too many for a config file")
        config = yaml.load(content.decode("utf-8-sig"), _Loader)
    except OSError as error:
        recipes = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.yaml")))
        raise InputError(f"{path}: cannot be read ({error.strerror}); recipes are {recipes}") from None
    except InputError:
        raise
    except DAMAGED as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: is not valid YAML ({reason}); correct it") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: should hold lines like `steps: 50`")
    _check(config, path)
    return config


def _check(config: dict[str, Any], path: str | Path) -> None:
    """Raises InputError unless all entries are of moderate number and their text can be printed."""
    waiting: list[Any] = [config]
    for _ in range(MAX_ENTRIES):
        if not waiting:
            return
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str) and not is_text(value):
            raise InputError(f"{path}: {value[:40]!r} holds characters that are no text; remove them")
    raise InputError(f"{path}: has over {MAX_ENTRIES} entries, too many for a config file")


def is_text(value: str) -> bool:
    """Whether a string holds no control characters but tabs and ends of lines, and no lone surrogates."""
    return not any((c < " " and c not in "\t\n\r") or "\ud800" <= c <= "\udfff" for c in value)
