"""Four ranks of the real megatron-core that upcycle while they load: run as `online_worker.py JOB.json`.

Each rank opens the dense folder, takes its own part of the mixture's view, and copies it into the parameters of its
own modules. No checkpoint of the mixture is written.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from job_ranks import Case, process_group, run_cases, start_ranks

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.local_experts\.(\d+)\.")


def main(job_file: Path) -> None:
    import_module("checkpoint")  # it imports torch and megatron, once for all ranks
    start_ranks(job_file, run_rank)


def run_rank(rank: int, job: dict[str, Any]) -> None:
    """All cases of the job, on one rank."""
    import torch

    torch.set_grad_enabled(False)
    with process_group(rank, job):
        run_cases(rank, job, run_case)


def run_case(case: Case) -> dict[str, Any]:
    """The largest logit difference over all replicas; every rank returns the same."""
    import torch
    import torch.distributed as dist

    from ckptbridge.converters.model import open_model
    from ckptbridge.converters.parallel_layout import ParallelLayout
    from ckptbridge.converters.rank_share import rank_tensors
    from ckptbridge.converters.upcycling.construction import upcycled
    from ckptbridge.converters.upcycling.spec import UpcycleSpec
    from ckptbridge.trainer.megatron import model
    from ckptbridge.trainer.megatron.config import transformer_config

    model.use_layout(**case["layout"])
    view = upcycled(open_model(Path(case["folder"])), UpcycleSpec(**case["spec"]))
    layout = ParallelLayout(**case["layout"])
    gpt = model.build(transformer_config(view.config, tp=layout.tp), local_names=False, **case["layout"])
    stage, place = divmod(dist.get_rank(), dist.get_world_size() // layout.pp)
    held = rank_tensors(view, layout, stage * layout.ranks_per_stage + place % layout.ranks_per_stage)
    if case["fault"]:  # another rank's part of the experts and of the attention
        other = rank_tensors(view, layout, stage * layout.ranks_per_stage + (place + 1) % layout.ranks_per_stage)
        held = dict(zip(held, other.values(), strict=True))
    fill(gpt, held)
    output, expected = model.logits(gpt, torch.tensor(case["token_ids"])), torch.load(case["expected"])
    difference = None
    if output is not None:
        difference = (output[..., : expected.shape[-1]] - expected).abs().max().item()
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, difference)
    return {"max_abs_diff": max(found for found in everywhere if found is not None)}


def fill(gpt: Any, held: dict[str, Any]) -> None:
    """Copy each tensor into the parameter (or the bias buffer) that it belongs to; none may be left on either side."""
    import torch
    from megatron.core import parallel_state

    first_expert = parallel_state.get_expert_model_parallel_rank() * (
        (gpt.config.num_moe_experts or 0) // parallel_state.get_expert_model_parallel_world_size()
    )
    targets = dict(gpt.named_parameters())
    targets |= {name: buffer for name, buffer in gpt.named_buffers() if name.endswith("expert_bias")}
    left = dict(held)
    for name, target in targets.items():
        target.fill_(float("nan"))
        wanted = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
        if found := _LAYER.match(wanted):
            layer = gpt.decoder.layers[int(found[1])]
            wanted = wanted.replace(found[0], f"decoder.layers.{layer.layer_number - 1}.", 1)
            if type(layer.mlp).__name__ == "MLP":
                wanted = wanted.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
        if found := _EXPERT.search(wanted):
            wanted = wanted.replace(found[0], f".experts.experts.{first_expert + int(found[1])}.")
        target.copy_(left.pop(wanted).read().reshape(target.shape))
        assert torch.isfinite(target).all(), name
    assert not left, sorted(left)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
