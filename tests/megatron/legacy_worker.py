"""Four ranks of the real megatron-core that save and load legacy checkpoints: run by legacy_launch.py.

File names and the saved dictionary are made by Megatron-LM's own functions (megatron.training.checkpointing); model
chunks are those of an interleaved schedule, each rank's built with its `vp_stage`.
"""

from __future__ import annotations

import random
import sys
import typing
from importlib import import_module
from pathlib import Path
from typing import Any

from job_ranks import Case, process_group, run_cases, start_ranks

_layout: dict[str, Any] | None = None


def main(job_file: Path) -> None:
    if not hasattr(typing, "override"):  # Python 3.11; megatron.training asks for it and nothing else that is newer
        typing.override = lambda function: function  # type: ignore[attr-defined]
    import_module("megatron.training.checkpointing")
    import_module("checkpoint")
    start_ranks(job_file, run_rank)


def run_rank(rank: int, job: dict[str, Any]) -> None:
    """All cases of the job, on one rank."""
    import torch

    torch.set_grad_enabled(False)
    with process_group(rank, job):
        run_cases(rank, job, run_case)


def run_case(case: Case) -> dict[str, Any]:
    """One load or save, on this rank; every rank returns the same result."""
    import torch

    chunks = build(case["config"], **case["layout"])
    return {"load": load, "save": save}[case["verb"]](chunks, case, torch.tensor(case["token_ids"]))


def build(config: dict[str, dict[str, Any]], **layout: Any) -> list[Any]:
    """This rank's model chunks, of modules without Transformer Engine, in fp32 and eval mode."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from ckptbridge.trainer.megatron import model

    vpp = layout["vpp"] if layout["vpp"] > 1 else None
    _use_layout(layout, vpp)
    transformer = TransformerConfig(
        **config["transformer"],
        **model._UNFUSED,
        tensor_model_parallel_size=layout["tp"],
        pipeline_model_parallel_size=layout["pp"],
        virtual_pipeline_model_parallel_size=vpp,
        num_layers_in_first_pipeline_stage=layout["first"],
        num_layers_in_last_pipeline_stage=layout["last"],
        expert_model_parallel_size=layout["ep"],
        expert_tensor_parallel_size=layout["etp"],
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
    )
    chunks: list[Any] = []
    for chunk in range(layout["vpp"]):
        stage = chunk if vpp else None
        spec = get_gpt_decoder_block_spec(
            transformer, use_transformer_engine=False, normalization="RMSNorm", vp_stage=stage
        )
        made = GPTModel(
            transformer,
            spec,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            parallel_output=False,
            vp_stage=stage,
            **config["gpt"],
        )
        chunks.append(made.eval())
    return chunks


def _use_layout(layout: dict[str, Any], vpp: int | None) -> None:
    global _layout
    from megatron.core import parallel_state

    if layout == _layout:
        return
    if _layout is not None:
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout["tp"],
        pipeline_model_parallel_size=layout["pp"],
        virtual_pipeline_model_parallel_size=vpp,
        expert_model_parallel_size=layout["ep"],
        expert_tensor_parallel_size=layout["etp"],
    )
    _layout = layout


def load(chunks: list[Any], case: dict[str, Any], tokens: Any) -> dict[str, Any]:
    """Every rank loads the file that Megatron-LM's name leads it to, strictly, and the logits are compared.

    Names of Transformer Engine's modules are first turned into those of the modules at hand, and the entries that
    only they have are dropped.
    """
    import torch
    from checkpoint import _of_all_ranks
    from megatron.training.checkpointing import get_checkpoint_name

    state = torch.load(get_checkpoint_name(case["root"], 0, release=True), map_location="cpu")  # weights only
    difference, in_order = None, True
    for number, chunk in enumerate(chunks):
        saved = state["model" if len(chunks) == 1 else f"model{number}"]
        if case["te_names"]:
            saved = without_transformer_engine(saved, chunk.state_dict())
        in_order = in_order and (case["te_names"] or list(saved) == list(chunk.state_dict()))
        chunk.load_state_dict(saved, strict=True)
    output, expected = logits(chunks, tokens), torch.load(case["expected"])
    if output is not None:
        difference = (output[..., : expected.shape[-1]] - expected).abs().max().item()
    return {
        "max_abs_diff": max(d for d in _of_all_ranks(difference) if d is not None),
        "in_order": all(_of_all_ranks(in_order)),
    }


def without_transformer_engine(saved: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """What Transformer Engine's specs call otherwise, under the name that the local specs give it.

    LayerNormLinear holds the norm before it (gpt_layer_specs.py: `column_parallel_layer_norm_linear`), GroupedLinear
    every expert's weight as weight0, weight1, ... (transformer_engine.py: TEGroupedLinear).
    """
    named: dict[str, Any] = {}
    for key, value in saved.items():
        if key.endswith("._extra_state"):
            continue
        key = key.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
        key = key.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
        stem, matrix, number = key.partition(".weight")
        if ".mlp.experts.linear_fc" in key and number:
            block, _, name = stem.rpartition(".")
            key = f"{block}.local_experts.{number}.{name}{matrix}"
        named[key] = value
    return named | {key: value for key, value in wanted.items() if key.endswith("._extra_state")}


def save(chunks: list[Any], case: dict[str, Any], tokens: Any) -> dict[str, Any]:
    """Fill the model and save it twice, as iteration 7: legacy as each rank would, and as torch_dist."""
    import checkpoint
    import numpy as np
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.training.checkpointing import generate_state_dict, get_checkpoint_name

    for chunk in chunks:
        checkpoint._fill(chunk)
    args = checkpoint._args(chunks[0], case["config"]["gpt"])
    args.ckpt_format, args.rank, args.no_save_rng = "torch", dist.get_rank(), False
    args.swiglu = True
    random_states = [
        {
            "random_rng_state": random.getstate(),
            "np_rng_state": np.random.get_state(),
            "torch_rng_state": torch.get_rng_state(),
            "rng_tracker_states": {},
        }
    ]
    # Only these ranks save, as in save_checkpoint: together they are every pair of a TP and an EP rank that exists.
    if parallel_state.get_data_parallel_rank() == 0 or parallel_state.get_expert_data_parallel_rank() == 0:
        file = Path(get_checkpoint_name(str(Path(case["root"]) / "legacy"), 7))
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(generate_state_dict(args, chunks, None, None, random_states, iteration=7), file)
    sharded = {
        f"model{number}": chunk.sharded_state_dict(metadata=dict(checkpoint.CONTENT_METADATA))
        for number, chunk in enumerate(chunks)
    }
    folder = Path(case["root"]) / "torch_dist" / "iter_0000007"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    args.ckpt_format = "torch_dist"
    dist_checkpointing.save(
        {"args": args, "checkpoint_version": 3.0, "iteration": 7, **sharded},
        str(folder),
        content_metadata=dict(checkpoint.CONTENT_METADATA),
    )
    output = logits(chunks, tokens)
    if output is not None and dist.get_rank() == dist.get_world_size() - 1:
        torch.save(output, case["logits"])
    if dist.get_rank() == 0:
        for format_ in ("legacy", "torch_dist"):
            (Path(case["root"]) / format_ / "latest_checkpointed_iteration.txt").write_text("7")
    dist.barrier()
    return {}


def logits(chunks: list[Any], tokens: Any) -> Any:
    """Logits [batch, length, padded vocabulary] where the last chunk is, None elsewhere: chunks pass on outputs."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    batch, length = tokens.shape
    positions = torch.arange(length).expand(batch, length)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)  # True: not attended to
    output = None
    for chunk in chunks:
        if not chunk.pre_process:
            received = torch.empty(length, batch, chunk.config.hidden_size)
            dist.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank())
            chunk.set_input_tensor(received)
        output = chunk(tokens, positions, mask)
        if not chunk.post_process:
            dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
            output = None
    return output


if __name__ == "__main__":  # megatron's writer starts a process that imports this file
    main(Path(sys.argv[1]))
