"""Recipes: LLaMA-Factory YAML, read and checked before anything heavy starts. No torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tunescope.errors import UserError

# Keys by which a recipe would run code that came with a model, or hide what is measured.
_REFUSED = {"trust_remote_code": "code inside a checkpoint would run on your machine"}
_OVERRIDE_CURE = "write it as in a recipe, with '=': lora_rank=8"


def recipe_folder() -> Path:
    """The project's LLaMA-Factory/ folder, beside src/."""
    return Path(__file__).resolve().parents[3] / "LLaMA-Factory"


def load_recipe(path: Path) -> dict[str, Any]:
    """The recipe as a dict. Raises UserError for a missing file, foreign YAML or a refused setting."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no recipe {path}", cure=f"the project's own are in {recipe_folder()}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"{path} is not readable as YAML: {' '.join(str(error).split())}",
            cure="see the recipes in LLaMA-Factory/",
        ) from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(
            f"{path} is not a recipe: it must be 'key: value' lines",
            cure="see the recipes in LLaMA-Factory/",
        )
    return check_recipe(content, str(path))


def check_recipe(recipe: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns the recipe, or raises UserError where it asks for what this project refuses."""
    for key, reason in _REFUSED.items():
        if recipe.get(key):
            raise UserError(
                f"{where} sets {key}: true, which tunescope refuses",
                cause=reason,
                cure=f"remove {key}; architectures in transformers and in tunescope need none of it",
            )
    return recipe


def with_overrides(recipe: Mapping[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The recipe with `key=value` pairs from the command line, values read as YAML. Raises UserError."""
    changed = dict(recipe)
    for item in overrides:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise UserError(f"override {item!r} is not key=value", cure=_OVERRIDE_CURE)
        try:
            changed[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(
                f"override {item!r} is not readable as YAML: {' '.join(str(error).split())}", cure=_OVERRIDE_CURE
            ) from None
    return check_recipe(changed, "the command line")
