"""Our decoder on a checkpoint of any format."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ckptbridge.converters.model import decoder_tensors, open_model
from ckptbridge.trainer.loading import check_values, empty_decoder, load_weights
from tests.tiny import token_ids


@torch.no_grad()
def decoder_logits(folder: Path) -> Tensor:
    """fp32 logits [batch, length, vocabulary] of the tests' text."""
    source = open_model(folder)
    decoder = empty_decoder(source.config, "reference", torch.float32, torch.device("cpu"))
    load_weights(decoder, decoder_tensors(source.tensors, source.config))
    check_values(decoder)
    return decoder.logits(decoder(token_ids()).hidden_BSH)
