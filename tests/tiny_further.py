"""Layers that predict further tokens beside a model that transformers saved, as DeepSeek-V3's files have them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FILE = "model.safetensors"


def add_further_layers(folder: Path, longer: PreTrainedModel, num_layers: int) -> None:
    """Put the layers of `longer` from `num_layers` on into the folder, with what only such layers have.

    Raises AssertionError if the folder's tensors lie in several files.
    """
    tensors = load_file(folder / _FILE)
    with tempfile.TemporaryDirectory() as aside:
        longer.save_pretrained(aside, max_shard_size="5GB")
        saved = load_file(Path(aside) / _FILE)
    for layer in range(num_layers, longer.config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        tensors |= {name: tensor for name, tensor in saved.items() if name.startswith(prefix)}
        tensors |= {prefix + name: tensor for name, tensor in _own(tensors, layer).items()}
    save_file(tensors, folder / _FILE, {"format": "pt"})


def _own(tensors: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    """The norms and the projection of such a layer, and its copies of the embedding and the output layer."""
    embedding, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    hidden, generator = embedding.shape[1], torch.Generator().manual_seed(layer)
    norms = {
        name: (1 + 0.3 * torch.randn(hidden, generator=generator)).to(embedding.dtype)
        for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")
    }
    drawn = torch.randn(hidden, 2 * hidden, generator=generator) * hidden**-0.5
    return norms | {
        "eh_proj.weight": drawn.to(embedding.dtype),
        "embed_tokens.weight": embedding.clone(),
        "shared_head.head.weight": head.clone(),
    }
