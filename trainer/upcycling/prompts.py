"""Prompts by which a router's experts are told apart (`router_init: hidden-state`), from a file.

One entry for each row of the router, in YAML or JSON:

    - positive: ["def main():", "import numpy"]
      negative: ["Once upon a time"]
    - positive: ["Dear Sir or Madam,"]

Shapes: S tokens, T tokens of all sequences, H hidden_size, E rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.model import Model
from ckptbridge.converters.upcycling.spec import MIXTURE_METHODS, PARTITIONS, UpcycleSpec
from ckptbridge.trainer.text_ids import tokenized, tokenizer_folder

_KEYS = ("positive", "negative")


@dataclass(frozen=True, slots=True)
class ExpertPrompts:
    """Token ids [S] of texts that one row of the router shall answer to, and of texts that it shall not."""

    positive: tuple[Tensor, ...]
    negative: tuple[Tensor, ...] = ()


def rows_of_router(spec: UpcycleSpec) -> int:
    """How many rows a resolved spec has to be given: one for each group of experts, of a partition one an expert."""
    return spec.num_experts if spec.method in PARTITIONS else spec.groups


def refuse_unused_prompts(path: Path, spec: UpcycleSpec) -> None:
    """Raise BadInputError for a resolved spec whose router does not come from prompts."""
    if spec.method in MIXTURE_METHODS:
        raise BadInputError(f"{path}: prompts are given, which method {spec.method} does not use; leave --prompts out")
    if spec.router_init != "hidden-state":
        raise BadInputError(
            f"{path}: prompts are given, which router_init {spec.router_init} does not use; add --router-init "
            "hidden-state, or leave --prompts out"
        )


def read_prompts(path: Path, models: Sequence[Model], spec: UpcycleSpec) -> list[ExpertPrompts]:
    """The prompts of each row, through the first model's tokenizer that there is; none gets a BOS.

    Raises BadInputError naming the file and the entry, what was expected and what is there.
    """
    entries = _entries(path)
    expected = rows_of_router(spec.resolved())
    if len(entries) != expected:
        what = "expert" if expected == spec.num_experts else f"group of {spec.granularity} experts"
        raise BadInputError(f"{path}: holds {len(entries)} entries, expected {expected}: one for each {what}")
    folder = tokenizer_folder(models)
    if folder is None:
        raise BadInputError(f"{path}: {models[0].path} has no tokenizer beside it, so no prompts can be given")
    made: list[ExpertPrompts] = []
    for number, entry in enumerate(entries):
        texts = _texts(entry, f"{path}: entry {number}")
        ids = {key: tuple(tokenized(folder, text, models[0].config.vocab_size) for text in texts[key]) for key in _KEYS}
        for key in _KEYS:
            if empty := [text for text, found in zip(texts[key], ids[key], strict=True) if not len(found)]:
                raise BadInputError(f"{path}: entry {number}: {key}: {empty[0]!r} has no tokens; leave it out")
        made.append(ExpertPrompts(ids["positive"], ids["negative"]))
    return made


def _entries(path: Path) -> list[Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInputError(f"{path}: there is no such file of prompts") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path}: the prompts cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise BadInputError(f"{path}: neither YAML nor JSON: {error}") from error
    if not isinstance(found, list):
        raise BadInputError(f"{path}: expected a list with an entry for each group, found {type(found).__name__}")
    return found


def _texts(entry: Any, where: str) -> dict[str, list[str]]:
    if not isinstance(entry, dict):
        raise BadInputError(f"{where}: expected positive and negative lists of texts, found {type(entry).__name__}")
    if unknown := [key for key in entry if key not in _KEYS]:
        raise BadInputError(f"{where}: unknown key {unknown[0]!r}, known are positive and negative")
    made: dict[str, list[str]] = {}
    for key in _KEYS:
        texts = entry.get(key) or []
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise BadInputError(f"{where}: {key}: expected a list of texts, found {texts!r}")
        made[key] = texts
    if not made["positive"]:
        raise BadInputError(f"{where}: positive: expected at least one text, found none")
    return made


def rows_by_prompts(prompts: Sequence[ExpertPrompts], input_TH: Tensor, std: float) -> Tensor:
    """Rows of a router [E, H]: the mean input of the positive prompts' tokens less that of the negative ones'.

    `input_TH` is what a layer's MLP saw of all prompts in order, each entry's positive ones first. Each row is scaled
    to the root mean square `std`, so that it is as decided as a drawn one; one that is zero stays zero.
    """
    rows: list[Tensor] = []
    parts = iter(input_TH.split([len(ids_S) for ids_S in prompt_sequences(prompts)]))
    for entry in prompts:
        means = [torch.cat([next(parts) for _ in texts]).mean(0) for texts in (entry.positive, entry.negative) if texts]
        row = means[0] if len(means) == 1 else means[0] - means[1]
        rows.append(row * (std / row.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)))
    return torch.stack(rows)


def prompt_sequences(prompts: Sequence[ExpertPrompts]) -> list[Tensor]:
    """All prompts in the order of `rows_by_prompts`."""
    return [ids_S for entry in prompts for ids_S in (*entry.positive, *entry.negative)]
