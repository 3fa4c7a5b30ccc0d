"""Config files and the recipes that come with minti."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError

RECIPES = Path(__file__).parents[1] / "recipes"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A config file, or the recipe of that name."""
    if not Path(path).exists() and (RECIPES / f"{path}.yaml").exists():
        path = RECIPES / f"{path}.yaml"
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        recipes = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.yaml")))
        raise InputError(f"{path}: cannot be read ({error.strerror}); recipes are {recipes}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: should hold lines like `steps: 50`")
    return config
