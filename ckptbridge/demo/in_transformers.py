"""What transformers makes of a folder: its class, and its loss on given tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ckptbridge.converters.errors import BadInputError


def transformers_loss(
    folder: Path, batches: list[Tensor], on_batch: Callable[[int], None] = lambda done: None
) -> tuple[str, float]:
    """Load a folder with AutoModelForCausalLM in fp32; (class name, loss in nats a token) on batches [B, S + 1].

    Raises BadInputError if transformers would have to invent a weight, or finds one that it does not know.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            experts_implementation="eager",  # the grouped product refuses rows that are no multiple of 16 bytes
            local_files_only=True,
            output_loading_info=True,
        )
    finally:
        if shows_progress:
            logging.enable_progress_bar()
    if problems := {kind: sorted(map(str, names)) for kind, names in info.items() if names}:
        raise BadInputError(f"{folder}: transformers does not find this model's weights: {problems}")
    model.eval()
    total = count = 0.0
    with torch.inference_mode():
        for done, batch in enumerate(batches, 1):
            logits = model(batch[:, :-1], use_cache=False).logits
            losses = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
            # A sum of a batch in fp32 would be right to 2e-7 nats a token only.
            total += losses.double().sum().item()
            count += losses.numel()
            on_batch(done)
    return type(model).__name__, total / count
