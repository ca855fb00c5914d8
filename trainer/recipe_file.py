"""Recipes from YAML and from the command line, through one door that names what is wrong and what was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ckptbridge.converters.disk import write_file
from ckptbridge.converters.errors import BadInputError
from ckptbridge.trainer.recipe import Recipe


class _Yaml(yaml.SafeLoader):
    """YAML 1.1 reads `3e-5` as a string, since it asks for a dot; here it is the number that was meant."""

    yaml_implicit_resolvers = deepcopy(yaml.SafeLoader.yaml_implicit_resolvers)


_Yaml.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe, apply `a.b=c` overrides and check the result.

    Raises BadInputError naming every wrong key and value at once, with the nearest key that exists.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Yaml)
    except FileNotFoundError as error:
        raise BadInputError(f"{path}: there is no such recipe") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path}: the recipe cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise BadInputError(f"{path}: not YAML: {error}") from error
    if not isinstance(values, dict):
        raise BadInputError(f"{path}: expected keys and values, found {type(values).__name__}")
    return parse_recipe(with_overrides(values, overrides), where=str(path))


def parse_recipe(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """Check a recipe's values. Raises BadInputError with every problem at once."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = "\n  ".join(_problem(details) for details in error.errors())
        raise BadInputError(f"{where}: the recipe is not valid:\n  {problems}") from None


def with_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of the values with each `a.b=c` set, where c is read as YAML (`3e-5`, `[a, b]`, `null`, text)."""
    values = deepcopy(values)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise BadInputError(f"--set {override}: expected section.key=value, such as optimizer.lr=3e-5")
        try:
            value = yaml.load(text, _Yaml)
        except yaml.YAMLError as error:
            raise BadInputError(f"--set {override}: {text!r} is not YAML: {error}") from error
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise BadInputError(f"--set {override}: {parent} is a value, not a section")
        section[last] = value
    return values


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe, defaults included, as YAML."""
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_file(path, text.encode())


def _problem(details: Any) -> str:
    location = [str(part) for part in details["loc"]]
    name = ".".join(location)
    if details["type"] == "extra_forbidden":
        return f"unknown key {name}{_suggestion(location)}"
    if details["type"] == "missing":
        return f"{name} is missing"
    if details["type"] == "value_error":
        return f"{name}: {details['ctx']['error']}" if name else str(details["ctx"]["error"])
    return f"{name}: {details['msg'][:1].lower()}{details['msg'][1:]}, found {details['input']!r}"


def _suggestion(location: Sequence[str]) -> str:
    """What the unknown key was probably meant to be: a key of its section, or the same key in another one."""
    section: type[BaseModel] = Recipe
    for part in location[:-1]:
        field = section.model_fields[part].annotation
        if not isinstance(field, type):
            return ""
        section = field
    wrong = location[-1]
    if near := difflib.get_close_matches(wrong, section.model_fields, n=1):
        return f", did you mean {'.'.join([*location[:-1], near[0]])}?"
    everywhere = {
        key: f"{name}.{key}"
        for name, field in Recipe.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        for key in field.annotation.model_fields
    }
    everywhere |= {name: name for name in Recipe.model_fields}
    if near := difflib.get_close_matches(wrong, everywhere, n=1):
        return f", did you mean {everywhere[near[0]]}?"
    return f"; known are {', '.join(section.model_fields)}"
