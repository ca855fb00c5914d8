"""What a run would train, from config.json and headers alone: no weights are fetched, and no model runs."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import constants

from ckptbridge.converters.fields import read_config
from ckptbridge.converters.further_layers import as_saved_by_hf
from ckptbridge.converters.hf_folder import INDEX, PICKLE, PICKLE_INDEX, SINGLE, read_index, read_json
from ckptbridge.converters.hub import source as hub
from ckptbridge.converters.hub.repository import HUB_ID, HubRepository, find_repository
from ckptbridge.converters.model import Model
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.registry import family_of
from ckptbridge.converters.upcycling.branch_train_mix import check_number
from ckptbridge.converters.upcycling.mixtures import changed_config
from ckptbridge.converters.upcycling.semantics import check
from ckptbridge.converters.upcycling.spec import MIXTURE_METHODS
from ckptbridge.converters.upcycling.targets import choose_target
from ckptbridge.trainer.computed import refuse_untrained
from ckptbridge.trainer.recipe import ModelSection
from ckptbridge.trainer.source import source_name
from ckptbridge.trainer.upcycle_recipe import UpcycleSection


def planned_config(options: ModelSection) -> ModelConfig:
    """The config of the model that `open_source` would open, mixtures included.

    Of a Hub id config.json and the index are fetched, and headers of the shards where these do not say enough. Raises
    what `open_source` raises for a model, a key or a mixture that cannot be, but for texts and further models of
    `upcycle`, which are not opened.
    """
    source = _opened(options)
    refuse_untrained(source)
    return source.config if options.upcycle is None else _mixture_config(source, options.upcycle)


def _mixture_config(source: Model, section: UpcycleSection) -> ModelConfig:
    spec = section.spec().resolved()
    check(spec, source.config)
    check_number(spec, 1 + len(section.others))
    return changed_config(source, spec) if spec.method in MIXTURE_METHODS else choose_target(source, spec)[1]


def _opened(options: ModelSection) -> Model:
    name = source_name(options)
    if not Path(name).exists() and HUB_ID.fullmatch(name) and not constants.HF_HUB_OFFLINE:
        repository = find_repository(name, options.revision)
        is_pickled = not {INDEX, SINGLE} & repository.files.keys() and {PICKLE, PICKLE_INDEX} & repository.files.keys()
        if is_pickled:
            return _by_config(repository)
    return hub.open_source(name, "plan", revision=options.revision, hf_config=options.hf_config)


def _by_config(repository: HubRepository) -> Model:
    """A model whose weights are pickles, which have no headers that could be fetched: it has no tensors here."""
    file = repository.cached_file("config.json")
    raw, where = read_json(file), f"{repository.origin}/config.json"
    family = family_of(raw, where)
    config = read_config(family.fields, raw, where)
    if PICKLE_INDEX in repository.files:
        config, _ = as_saved_by_hf(config, read_index(repository.cached_file(PICKLE_INDEX)))
    return Model(
        path=Path(repository.origin),
        format="hf",
        family=family,
        config=config,
        tensors={},
        sources={},
        dtype=torch.float32,
        hf_config=raw,
        hf_config_file=file,
        assets=(),
    )
