"""A legacy checkpoint loaded into two model chunks a rank: what Megatron calls virtual pipeline parallelism."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from snapshot import snapshot

from ckptbridge.trainer.megatron import model as models

CHUNKS = 2


class Chunks:
    """The model chunks of a rank, described as one model."""

    def __init__(self, case: dict[str, Any]) -> None:
        tp, pp = case["layout"]["tp"], case["layout"]["pp"]
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=CHUNKS,
        )
        self.config = TransformerConfig(
            **case["config"]["transformer"],
            **models._UNFUSED,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=CHUNKS,
            expert_tensor_parallel_size=tp,
            activation_func=torch.nn.functional.silu,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            params_dtype=torch.bfloat16,
            pipeline_dtype=torch.bfloat16,
            bf16=True,
            use_cpu_initialization=True,
        )
        self.models = [self._chunk(number, case["config"]["gpt"], pp) for number in range(CHUNKS)]

    def _chunk(self, number: int, gpt: dict[str, Any], pp: int) -> GPTModel:
        stage = parallel_state.get_pipeline_model_parallel_rank()
        spec = get_gpt_decoder_block_spec(
            self.config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=number
        )
        models.use_te_names(spec.layer_specs)
        model = GPTModel(
            self.config,
            spec,
            pre_process=stage == 0 and number == 0,
            post_process=stage == pp - 1 and number == CHUNKS - 1,
            parallel_output=False,
            vp_stage=number,
            **gpt,
        )
        return model.to(torch.bfloat16)

    def sharded_state_dict(self) -> dict[str, Any]:
        return {str(number): model.sharded_state_dict() for number, model in enumerate(self.models)}


def hold(case: dict[str, Any]) -> dict[str, Any]:
    """Load case["folder"] into two chunks a rank and tell what is held; a step is taken before, as in `resume`."""
    chunks = Chunks(case)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=case["distributed"],
        overlap_grad_reduce=case["bucket_size"] is not None,
        bucket_size=case["bucket_size"],
    )
    wrapped = [
        DistributedDataParallel(chunks.config, ddp, model, disable_bucketing=number > 0)
        for number, model in enumerate(chunks.models)
    ]
    config = OptimizerConfig(
        optimizer="adam",
        lr=0.02,
        min_lr=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=case["distributed"],
    )
    optimizer = get_megatron_optimizer(config, wrapped)
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    optimizer.step()
    tp, pp = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    folder = Path(case["folder"]) / "iter_0000002" / f"mp_rank_{tp:02d}_{pp:03d}"
    saved = torch.load(folder / "model_optim_rng.pt", weights_only=False)
    for number, model in enumerate(chunks.models):
        model.load_state_dict(saved[f"model{number}"], strict=True)
    optimizer.load_state_dict(saved["optimizer"])
    if case["distributed"]:
        with torch.no_grad():
            optimizer.load_parameter_state(str(folder / "distrib_optim.pt"))
    held = snapshot(chunks, optimizer.chained_optimizers)
    if dist.get_rank() == 0:
        torch.save({"held": held, "after": held}, case["out"] + ".pt")
    return {"losses": [], "steps": []}
