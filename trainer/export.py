"""A trained decoder as a Hugging Face folder, written by the same code that converts checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ckptbridge.converters.convert import ConversionPlan, ConvertOptions, plan_conversion
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.journal import journal_file
from ckptbridge.converters.model import Model, expert_tensors
from ckptbridge.converters.target import is_checkpoint, partial_folder
from ckptbridge.converters.tensors import InMemory
from ckptbridge.trainer.decoder import Decoder

HF = "hf"
"""Where the export lies in a run folder."""
_OTHERWISE = "or set export.hf=false (the run's checkpoints hold the model for Megatron)"


def export_hf(source: Model, decoder: Decoder, run: Path) -> Path:
    """Write run/hf with weights, and with config and tokenizer files of `source`; an older export is replaced.

    Weights keep the dtype in which they were trained, and config.json says which.
    """
    execute(_plan(source, decoder, run))
    return run / HF


def check_export(source: Model, dtype: torch.dtype, run: Path) -> None:
    """Refuse what `export_hf` would refuse after the last step; no tensor is read, and nothing is held in memory.

    Raises BadInputError if the model has no Hugging Face form, or run/hf is something that may not be replaced.
    """
    with torch.device("meta"):
        decoder = Decoder(source.config, "reference").to(dtype)
    try:
        plan = _plan(source, decoder, run)
    except BadInputError as error:
        raise type(error)(f"export.hf: {error}\nset export.hf=false: the run's checkpoints are for Megatron") from error
    target, partial = plan.target, partial_folder(plan.target)
    if target.exists() and not (target.is_dir() and is_checkpoint(target)):
        raise BadInputError(
            f"export.hf: {run / HF} is no checkpoint, so the export would not replace it; move it away, {_OTHERWISE}"
        )
    for model in source.opened:
        if target in (path := model.path.resolve(), *path.parents):
            raise BadInputError(
                f"export.hf: the export would replace {run / HF}, which the run starts from; name another run_folder, "
                f"{_OTHERWISE}"
            )
    if partial.is_dir() and any(partial.iterdir()) and not journal_file(target).exists():
        raise BadInputError(f"export.hf: {partial} is in the way and no unfinished export; move it away, {_OTHERWISE}")


def _plan(source: Model, decoder: Decoder, run: Path) -> ConversionPlan:
    return plan_conversion(trained_model(source, decoder, run), run / HF, "hf", ConvertOptions(overwrite=True))


def trained_model(source: Model, decoder: Decoder, path: Path) -> Model:
    """The decoder's weights as an opened checkpoint that is otherwise `source`. Nothing is copied."""
    weights = {name: InMemory(parameter) for name, parameter in decoder.named_parameters()}
    tensors = expert_tensors(weights, source.family, source.config)
    dtype = next(decoder.parameters()).dtype
    return replace(
        source,
        path=path,
        tensors=tensors,
        sources=tensors,
        dtype=dtype,
        # A config.json that names another dtype is not copied but written anew.
        hf_config_file=source.hf_config_file if dtype == source.dtype else None,
    )
