"""megatron-core's own routing of given logits: run as `routing_worker.py CASES.pt RESULTS.pt` with it on the path."""

from __future__ import annotations

import sys
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import (
    apply_router_token_dropping,
    compute_routing_scores_for_aux_loss,
    switch_load_balancing_loss_func,
    topk_routing_with_score_function,
    z_loss_func,
)


def routed(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Probabilities and map [T, E] behind dropping, both losses, and the logits' gradient of all three together."""
    logits = case["logits"].requires_grad_()
    tokens, experts = logits.shape
    probs, routing_map = topk_routing_with_score_function(logits, case["topk"], **case["rule"])
    if case["dropping"] is not None:
        probs, routing_map = apply_router_token_dropping(probs, routing_map, case["topk"], **case["dropping"])
    score_function = case["rule"]["score_function"]
    map_for_loss, scores = compute_routing_scores_for_aux_loss(logits, case["topk"], score_function)
    aux_loss = switch_load_balancing_loss_func(scores, map_for_loss.sum(0), tokens, case["topk"], experts, 1.0)
    z_loss = z_loss_func(logits, 1.0)
    total = (probs * case["d_probs"]).sum() + aux_loss + z_loss
    (d_logits,) = torch.autograd.grad(total, logits)
    results = {"probs": probs, "routing_map": routing_map, "aux_loss": aux_loss, "z_loss": z_loss}
    return {name: tensor.detach() for name, tensor in results.items()} | {"d_logits": d_logits}


if __name__ == "__main__":
    torch.save([routed(case) for case in torch.load(sys.argv[1])], sys.argv[2])
