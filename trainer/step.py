"""The gradients of one batch, and the loss on held-out text. Losses are in nats a token.

Shapes: B sequences, S sequence length, T tokens, H hidden_size, V vocab_size, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ckptbridge.kernels.cross_entropy import linear_cross_entropy
from ckptbridge.trainer.decoder import Decoder, DecoderOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """What the forward passes of a batch said. Nothing of it has been read from the device."""

    tokens: int
    loss: Tensor
    """The next-token loss, a mean over all tokens of the batch."""
    aux_loss: Tensor | None
    """The load-balancing loss without its coefficient, a mean over layers and micro-batches: 1 is even, E the worst."""
    z_loss: Tensor | None
    """The z-loss without its coefficient, likewise a mean; None where it is not trained."""
    choices: dict[int, Tensor]
    """By layer: how many choices fell on each expert, [E]."""

    @property
    def expert_load(self) -> dict[int, Tensor]:
        """By layer: the fraction of the choices that fell on each expert, [E]."""
        return {layer: choices_E / choices_E.sum() for layer, choices_E in self.choices.items()}


def accumulate_gradients(
    decoder: Decoder, batch_BS: Tensor, micro_batch_size: int, aux_loss_coeff: float, z_loss_coeff: float = 0.0
) -> BatchResult:
    """Forward and backward over a batch [B, S + 1], `micro_batch_size` sequences at a time.

    The gradient is that of the next-token loss, a mean over the tokens of the whole batch, plus `aux_loss_coeff`
    times the load-balancing losses and `z_loss_coeff` times the z-losses, each summed over layers and averaged over
    micro-batches.
    """
    micro_batches = batch_BS.split(micro_batch_size)
    tokens = batch_BS[:, 1:].numel()
    # Sums stay on the device: reading one here would make a GPU wait, and a CUDA graph of the step impossible.
    total = aux_total = z_total = torch.zeros((), device=batch_BS.device)
    choices: dict[int, Tensor] = {}
    for micro_batch in micro_batches:
        output, loss = _forward(decoder, micro_batch, divisor=tokens)
        total = total + loss.detach()
        if output.balance:
            aux_loss = output.balance_loss() / len(micro_batches)
            aux_total = aux_total + aux_loss.detach()
            loss = loss + aux_loss_coeff * aux_loss
            if z_loss_coeff:
                z_loss = output.z_loss() / len(micro_batches)
                z_total = z_total + z_loss.detach()
                loss = loss + z_loss_coeff * z_loss
            for layer, balance in output.balance.items():
                choices[layer] = choices[layer] + balance.choices_E if layer in choices else balance.choices_E
        del output  # the last hidden states would stay through the backward pass
        loss.backward()
    return BatchResult(
        tokens=tokens,
        loss=total,
        aux_loss=aux_total / len(choices) if choices else None,
        z_loss=z_total / len(choices) if choices and z_loss_coeff else None,
        choices=choices,
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
    loss = linear_cross_entropy(
        hidden_TH, decoder.output_weight_VH, targets_T, divisor, starts_backward=True, backend=decoder.backend
    )
    return output, loss
