"""The gradients of one batch, and the loss on held-out text. Losses are in nats a token.

Shapes: B sequences, S sequence length, T tokens, H hidden_size, V vocab_size, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ckptbridge.trainer.cross_entropy import linear_cross_entropy
from ckptbridge.trainer.decoder import Decoder, DecoderOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """What the forward passes of a batch said."""

    tokens: int
    loss: float
    """The next-token loss, a mean over all tokens of the batch."""
    aux_loss: float | None
    """The load-balancing loss without its coefficient, a mean over layers and micro-batches: 1 is even, E the worst."""
    expert_load: dict[int, list[float]]
    """By layer: the fraction of the choices that fell on each expert."""


def accumulate_gradients(
    decoder: Decoder, batch_BS: Tensor, micro_batch_size: int, aux_loss_coeff: float
) -> BatchResult:
    """Forward and backward over a batch [B, S + 1], `micro_batch_size` sequences at a time.

    The gradient is that of the next-token loss, a mean over the tokens of the whole batch, plus `aux_loss_coeff`
    times the load-balancing losses, summed over layers and averaged over micro-batches.
    """
    micro_batches = batch_BS.split(micro_batch_size)
    tokens = batch_BS[:, 1:].numel()
    # Sums stay on the device: reading them here would make a GPU wait once a micro-batch.
    total = aux_total = torch.zeros((), device=batch_BS.device)
    rows: dict[int, Tensor] = {}
    for micro_batch in micro_batches:
        output, loss = _forward(decoder, micro_batch, divisor=tokens)
        total = total + loss.detach()
        if output.balance:
            aux_loss = output.balance_loss() / len(micro_batches)
            aux_total = aux_total + aux_loss.detach()
            loss = loss + aux_loss_coeff * aux_loss
            for layer, balance in output.balance.items():
                rows[layer] = rows[layer] + balance.rows_E if layer in rows else balance.rows_E
        loss.backward()
    return BatchResult(
        tokens=tokens,
        loss=total.item(),
        aux_loss=aux_total.item() / len(rows) if rows else None,
        expert_load={layer: (rows_E / rows_E.sum()).tolist() for layer, rows_E in rows.items()},
    )


@torch.no_grad()
def evaluate(decoder: Decoder, batches: list[Tensor]) -> float:
    """The next-token loss, a mean over all tokens of the batches [B, S + 1]."""
    device = decoder.output_weight_VH.device
    tokens = sum(batch[:, 1:].numel() for batch in batches)
    return sum(_forward(decoder, batch.to(device), divisor=tokens)[1].item() for batch in batches)


def _forward(decoder: Decoder, batch_BS: Tensor, divisor: int) -> tuple[DecoderOutput, Tensor]:
    """The output, and the sum of next-token losses over `divisor`."""
    output = decoder(batch_BS[:, :-1])
    hidden_TH = output.hidden_BSH.flatten(0, 1)
    if (logits_divisor := decoder.config.logits_divisor) != 1:
        hidden_TH = hidden_TH / logits_divisor
    targets_T = batch_BS[:, 1:].flatten()
    return output, linear_cross_entropy(hidden_TH, decoder.output_weight_VH, targets_T, divisor)
