"""Balance without a loss: an expert that met fewer tokens than the mean is chosen a little more easily from then on.

The rule of Loss-Free Balancing (arXiv 2408.15664) as Megatron-Core has it (`moe_router_bias_update_rate`): after each
step the bias of an expert moves by the rate, up where fewer choices than the mean fell on it, down where more did. No
gradient is involved. With a capacity factor Megatron-Core counts what was not dropped, here all choices count.
"""

# Shapes: E experts.

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ckptbridge.converters.errors import BadInputError
from ckptbridge.trainer.decoder import Decoder
from ckptbridge.trainer.router import Router


def check_biases_can_move(decoder: Decoder, rate: float) -> None:
    """Raise BadInputError where a rate is asked for and no router has a bias that it would move."""
    if rate and not any(isinstance(module, Router) and module.expert_bias is not None for module in decoder.modules()):
        raise BadInputError(
            f"moe.bias_update_rate: {rate} was asked for, but the model's routers have no expert bias (sigmoid "
            "routers as DeepSeek-V3's do); leave it out, and balance by moe.aux_loss_coeff"
        )


@torch.no_grad()
def move_expert_biases(decoder: Decoder, choices: Mapping[int, Tensor], rate: float) -> None:
    """Move the biases of all routers by what a step's choices [E] were, by layer. A CUDA graph may hold it."""
    for layer, choices_E in choices.items():
        bias_E = decoder.decoder.layers[layer].mlp.router.expert_bias
        if bias_E is not None:
            choices_E = choices_E.long()  # whole numbers: an expert at the mean exactly stays
            missing_E = choices_E.sum() - choices_E * len(choices_E)
            bias_E.add_(missing_E.sign().to(bias_E.dtype), alpha=rate)
