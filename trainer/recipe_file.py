"""Recipes from YAML and from the command line, through one door that names what is wrong and what was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from ckptbridge.converters.disk import write_file
from ckptbridge.converters.errors import BadInputError
from ckptbridge.trainer.recipe import Recipe

S = TypeVar("S", bound=BaseModel)


class _RepeatedKeyError(yaml.YAMLError):
    """A key that stands twice, of which YAML would silently drop the first with all below it."""


class _Yaml(yaml.SafeLoader):
    """YAML 1.1 reads `3e-5` as a string, since it asks for a dot; here it is the number that was meant.

    A key may stand once in a section.
    """

    yaml_implicit_resolvers = deepcopy(yaml.SafeLoader.yaml_implicit_resolvers)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Raises _RepeatedKeyError naming both lines. Keys that `<<` brings may be replaced, as it is meant for."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise _RepeatedKeyError(
                    f"key {key.value!r} stands on line {lines[name]} and again on line {line}, and YAML would drop "
                    "the first; put all that belongs to it under one of them"
                )
            lines[name] = line
        return node


_Yaml.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe, apply `a.b=c` overrides and check the result.

    Raises BadInputError naming every wrong key and value at once, with the nearest key that exists.
    """
    return parse_recipe(with_overrides(read_values(path), overrides), where=str(path))


def read_values(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file, not checked. Raises BadInputError if it is none."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Yaml)
    except FileNotFoundError as error:
        raise BadInputError(f"{path}: there is no such recipe") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path}: the recipe cannot be read: {error}") from error
    except _RepeatedKeyError as error:
        raise BadInputError(f"{path}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as a date without such a day
        raise BadInputError(f"{path}: not YAML: {error}") from error
    if not isinstance(values, dict):
        raise BadInputError(f"{path}: expected keys and values, found {type(values).__name__}")
    return values


def parse_recipe(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """Check a recipe's values. Raises BadInputError with every problem at once."""
    return parse_section(Recipe, values, where)


def parse_section(kind: type[S], values: Mapping[str, Any], where: str) -> S:
    """Check the values of a section that stands by itself. Raises BadInputError with every problem at once."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = "\n  ".join(_problem(kind, details) for details in error.errors())
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
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise BadInputError(f"--set {override}: {text!r} is not YAML: {error}") from error
        *parents, last = key.split(".")
        section: Any = values
        for parent in parents:
            if section.get(parent) is None:  # missing, or null as a saved recipe says of a section that is not there
                section[parent] = {}
            section = section[parent]
            if not isinstance(section, dict):
                raise BadInputError(f"--set {override}: {parent} is a value, not a section")
        section[last] = value
    return values


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe, defaults included, as YAML."""
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_file(path, text.encode())


def _problem(kind: type[BaseModel], details: Any) -> str:
    location = [str(part) for part in details["loc"]]
    name = ".".join(location)
    if details["type"] == "extra_forbidden":
        return f"unknown key {name}{_suggestion(kind, location)}"
    if details["type"] == "missing":
        return f"{name} is missing"
    if details["type"] == "value_error":
        return f"{name}: {details['ctx']['error']}" if name else str(details["ctx"]["error"])
    return f"{name}: {details['msg'][:1].lower()}{details['msg'][1:]}, found {details['input']!r}"


def _suggestion(kind: type[BaseModel], location: Sequence[str]) -> str:
    """What the unknown key was probably meant to be: a key of its section, or the same key in another one."""
    section = kind
    for part in location[:-1]:
        field = _sections(section).get(part)
        if field is None:
            return ""
        section = field
    wrong = location[-1]
    if near := difflib.get_close_matches(wrong, section.model_fields, n=1):
        return f", did you mean {'.'.join([*location[:-1], near[0]])}?"
    everywhere = {key: f"{name}.{key}" for name, field in _sections(kind).items() for key in field.model_fields}
    everywhere |= {name: name for name in kind.model_fields}
    if near := difflib.get_close_matches(wrong, everywhere, n=1):
        return f", did you mean {everywhere[near[0]]}?"
    return f"; known are {', '.join(section.model_fields)}"


def _sections(kind: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The fields of a section that are sections themselves, those that may be left out among them."""
    found: dict[str, type[BaseModel]] = {}
    for name, field in kind.model_fields.items():
        for option in (field.annotation, *get_args(field.annotation)):
            if isinstance(option, type) and issubclass(option, BaseModel):
                found[name] = option
    return found
