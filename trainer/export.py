"""A trained decoder as a Hugging Face folder, written by the same code that converts checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import Model, expert_tensors
from ckptbridge.converters.tensors import InMemory
from ckptbridge.trainer.decoder import Decoder


def export_hf(source: Model, decoder: Decoder, folder: Path) -> Path:
    """Write `folder` with weights, and with config and tokenizer files of `source`; an older export is replaced.

    Weights keep the dtype in which they were trained, and config.json says which.
    """
    model = trained_model(source, decoder, folder.parent)
    execute(plan_conversion(model, folder, "hf", ConvertOptions(overwrite=True)))
    return folder


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
