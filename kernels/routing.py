"""Which experts a token goes to, with which weights, and the sums that the router's losses are made of.

One pass over the logits forward, one backward, which computes the scores again instead of keeping them. Sums over
tokens are sums of one partial sum a program, in a fixed order: the same bits at every run on a device.

The triton backend chooses among equal scores the expert of the lowest index. The reference leaves that to torch.topk.

Memory-bound but for the K turns of the choice. Floor: forward 4 T E bytes read (and 8 T K written), backward 8 T E.
"""

# Shapes: T tokens, H hidden_size, E experts, K top-k, P programs.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ckptbridge.kernels import routing_kernels
from ckptbridge.kernels.arguments import check_shape, check_tensor
from ckptbridge.kernels.backend import Backend, compiled, num_multiprocessors, require_backend
from ckptbridge.kernels.order import MAX_EXPERTS

ScoreFunction = Literal["softmax", "sigmoid"]
_TINY = 1e-20
"""Added to sums of sigmoids, which may all be zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """The router's answer. The floating tensors are fp32 and carry gradients."""

    experts_TK: Tensor
    """int32: each token's experts, the best first."""
    weights_TK: Tensor
    """What each expert's output is multiplied by."""
    probability_sum_E: Tensor
    """The sum over tokens of the softmax over all experts (of the sigmoids over their sum): for the balance."""
    z_sum: Tensor
    """The sum over tokens of the square of logsumexp(logits), a scalar: for the z-loss."""
    choices_E: Tensor
    """int32: how many tokens chose each expert."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingConfig:
    """Launch knobs. A program works on tiles of `block_tokens` x `block_experts` logits, whole rows."""

    block_tokens: int
    block_experts: int
    num_warps: int = 4
    programs_per_multiprocessor: int = 4

    @classmethod
    def from_shape(cls, num_experts: int) -> RoutingConfig:
        """Knobs for rows of `num_experts` logits: 16 of them a thread, for four tiles of that size are kept at once."""
        block_experts = max(2, 1 << (num_experts - 1).bit_length())
        return cls(block_tokens=max(1, min(128, 2048 // block_experts)), block_experts=block_experts)


def routes_of_choice(
    logits_TE: Tensor,
    experts_TK: Tensor,
    *,
    score_function: ScoreFunction = "softmax",
    pre_softmax: bool = False,
    scaling_factor: float | None = None,
) -> Routes:
    """The definition of weights and sums for experts that were chosen by whatever rule; plain torch, any dtype."""
    is_sigmoid = score_function == "sigmoid"
    scores_TE = logits_TE.sigmoid() if is_sigmoid else logits_TE.softmax(-1)
    weights_TK = scores_TE.gather(-1, experts_TK.long())
    if not pre_softmax:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + _TINY)
    if scaling_factor is not None:
        weights_TK = weights_TK * scaling_factor
    probabilities_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + _TINY) if is_sigmoid else scores_TE
    ones_R = torch.ones(experts_TK.numel(), dtype=torch.int32, device=experts_TK.device)
    return Routes(
        experts_TK=experts_TK.int(),
        weights_TK=weights_TK,
        probability_sum_E=probabilities_TE.sum(0),
        z_sum=logits_TE.logsumexp(-1).square().sum(),
        choices_E=ones_R.new_zeros(logits_TE.shape[1]).scatter_add_(0, experts_TK.flatten().long(), ones_R),
    )


def route_reference(
    logits_TE: Tensor,
    expert_bias_E: Tensor | None,
    topk: int,
    score_function: ScoreFunction = "softmax",
    pre_softmax: bool = False,
    scaling_factor: float | None = None,
) -> Routes:
    """The definition; autograd differentiates it. Also takes fp64, which then is fp64 throughout."""
    ranks_TE = logits_TE.detach().sigmoid() if score_function == "sigmoid" else logits_TE.detach().softmax(-1)
    if expert_bias_E is not None:
        ranks_TE = ranks_TE + expert_bias_E.detach()
    experts_TK = ranks_TE.topk(topk, dim=-1).indices
    return routes_of_choice(
        logits_TE,
        experts_TK,
        score_function=score_function,
        pre_softmax=pre_softmax,
        scaling_factor=scaling_factor,
    )


def route(
    logits_TE: Tensor,
    expert_bias_E: Tensor | None = None,
    *,
    topk: int,
    score_function: ScoreFunction = "softmax",
    pre_softmax: bool = False,
    scaling_factor: float | None = None,
    backend: Backend = "reference",
    config: RoutingConfig | None = None,
) -> Routes:
    """Choose each token's best `topk` experts by its logits [T, E], and weigh them.

    softmax: the weights are the softmax over the chosen experts, with `pre_softmax` the softmax over all. sigmoid:
    the sigmoids over the sum of the chosen ones, with `pre_softmax` as they are. `scaling_factor` multiplies them.
    `expert_bias_E` (fp32) is added to the scores for the choice alone; it weighs nothing and gets no gradient.

    logits_TE: fp32, contiguous, finite. Gradients flow from weights_TK, probability_sum_E and z_sum. `config`
    overrides the launch knobs of the triton backend. Raises ValueError for arguments that do not fit and
    BackendError when `backend` cannot run on the device.
    """
    _check(logits_TE, expert_bias_E, topk, score_function)
    require_backend(backend, logits_TE.device)
    if backend == "triton" and len(logits_TE) > 0:
        factor = 1.0 if scaling_factor is None else scaling_factor
        knobs = config or RoutingConfig.from_shape(logits_TE.shape[1])
        is_sigmoid = score_function == "sigmoid"
        experts, weights, probability_sum, z_sum, choices = _Route.apply(
            logits_TE, expert_bias_E, topk, is_sigmoid, not pre_softmax, factor, knobs
        )
        return Routes(
            experts_TK=experts, weights_TK=weights, probability_sum_E=probability_sum, z_sum=z_sum, choices_E=choices
        )
    function = compiled(route_reference) if backend == "torch" else route_reference
    return function(logits_TE, expert_bias_E, topk, score_function, pre_softmax, scaling_factor)


def _check(logits_TE: Tensor, expert_bias_E: Tensor | None, topk: int, score_function: str) -> None:
    check_tensor("route", "logits_TE", logits_TE)
    if logits_TE.dtype != torch.float32:
        raise ValueError(f"route: logits_TE: expected dtype torch.float32, found {logits_TE.dtype}")
    if logits_TE.ndim != 2 or not 1 <= logits_TE.shape[1] <= MAX_EXPERTS:
        found = tuple(logits_TE.shape)
        raise ValueError(f"route: logits_TE: expected [T, E] with 1 to {MAX_EXPERTS} experts, found shape {found}")
    if expert_bias_E is not None:
        check_tensor("route", "expert_bias_E", expert_bias_E, like=logits_TE)
        check_shape("route", "expert_bias_E", expert_bias_E, (logits_TE.shape[1],), "the experts of logits_TE")
    if not 1 <= topk <= logits_TE.shape[1]:
        raise ValueError(f"route: topk: expected 1 to {logits_TE.shape[1]}, the experts of logits_TE, found {topk}")
    if score_function not in ("softmax", "sigmoid"):
        raise ValueError(f"route: score_function: expected softmax or sigmoid, found {score_function!r}")


class _Route(torch.autograd.Function):
    """The triton backend. Keeps the logits and the choice."""

    @staticmethod
    def forward(ctx: Any, logits_TE, expert_bias_E, topk, is_sigmoid, normalises, factor, config):
        T, E = logits_TE.shape
        device = logits_TE.device
        tiles = -(-T // config.block_tokens)
        P = min(tiles, config.programs_per_multiprocessor * num_multiprocessors(device))
        experts_TK = torch.empty(T, topk, dtype=torch.int32, device=device)
        weights_TK = torch.empty(T, topk, dtype=torch.float32, device=device)
        probability_PE = torch.empty(P, E, dtype=torch.float32, device=device)
        choices_PE = torch.empty(P, E, dtype=torch.int32, device=device)
        z_P = torch.empty(P, dtype=torch.float32, device=device)
        routing_kernels.forward_kernel[(P,)](
            logits_TE,
            expert_bias_E,
            experts_TK,
            weights_TK,
            probability_PE,
            choices_PE,
            z_P,
            T,
            factor,
            E=E,
            K=topk,
            IS_SIGMOID=is_sigmoid,
            NORMALISES=normalises,
            BLOCK_T=config.block_tokens,
            BLOCK_E=config.block_experts,
            BLOCK_K=1 << (topk - 1).bit_length(),
            num_warps=config.num_warps,
        )
        probability_sum_E = torch.empty(E, dtype=torch.float32, device=device)
        choices_E = torch.empty(E, dtype=torch.int32, device=device)
        z_sum = torch.empty((), dtype=torch.float32, device=device)
        routing_kernels.sum_kernel[(-(-E // 16),)](
            probability_PE, choices_PE, z_P, probability_sum_E, choices_E, z_sum, P, E=E, BLOCK_P=256, BLOCK_E=16
        )
        ctx.is_sigmoid, ctx.normalises, ctx.factor, ctx.config = is_sigmoid, normalises, factor, config
        ctx.set_materialize_grads(False)  # an output nobody used costs nothing
        ctx.mark_non_differentiable(experts_TK, choices_E)
        ctx.save_for_backward(logits_TE, experts_TK)
        return experts_TK, weights_TK, probability_sum_E, z_sum, choices_E

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _experts, d_weights_TK, d_probability_sum_E, d_z_sum, _choices):
        logits_TE, experts_TK = ctx.saved_tensors
        gradients = [d_weights_TK, d_probability_sum_E, d_z_sum]
        if all(gradient is None for gradient in gradients):
            return (None,) * 7
        T, E = logits_TE.shape
        d_logits_TE = torch.empty_like(logits_TE)
        config = ctx.config
        routing_kernels.backward_kernel[(-(-T // config.block_tokens),)](
            logits_TE,
            experts_TK,
            *(None if gradient is None else gradient.contiguous() for gradient in gradients),
            d_logits_TE,
            T,
            ctx.factor,
            E=E,
            K=experts_TK.shape[1],
            IS_SIGMOID=ctx.is_sigmoid,
            NORMALISES=ctx.normalises,
            BLOCK_T=config.block_tokens,
            BLOCK_E=config.block_experts,
            num_warps=config.num_warps,
        )
        return d_logits_TE, *(None,) * 6
