"""Flags that several verbs share, said once: a verb takes a dataclass of them as one argument.

typer reads a function's signature, one parameter a flag. `takes_flags` gives it that signature and hands the verb the
dataclasses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from inspect import Parameter, Signature, signature
from typing import Any, get_type_hints


def takes_flags(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with every dataclass among its parameters replaced by that dataclass's fields."""
    hints = get_type_hints(verb, include_extras=True)
    groups: dict[str, Any] = {}
    flat: dict[str, Parameter] = {}
    for name, parameter in signature(verb).parameters.items():
        kind = hints[name]
        if is_dataclass(kind):
            groups[name] = kind
            own = get_type_hints(kind, include_extras=True)
            flat |= {f.name: _flag(f.name, own[f.name], f.default) for f in fields(kind)}
        else:
            flat[name] = _flag(name, kind, parameter.default)

    def run(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{f.name: given.pop(f.name) for f in fields(kind)})
        verb(**given)

    run.__name__, run.__doc__, run.__module__ = verb.__name__, verb.__doc__, verb.__module__
    run.__annotations__ = {name: parameter.annotation for name, parameter in flat.items()}
    vars(run)["__signature__"] = Signature(list(flat.values()))
    return run


def _flag(name: str, annotation: Any, default: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
