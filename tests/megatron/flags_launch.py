"""Cases of flags_worker.py: a command line, a checkpoint, and what the real megatron-core has to be told of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptbridge.converters.mcore.command import megatron_command
from ckptbridge.converters.mcore.flags import Flag, layout_flags, model_flags
from ckptbridge.converters.model import Model
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.trainer.megatron.config import transformer_config
from tests.fetch_megatron import FOLDER as MEGATRON

ROOT = Path(__file__).parents[2]

HOW_IT_RUNS = {
    *("bias_activation_fusion", "bias_dropout_fusion", "persist_layer_norm"),  # kernels, none of which runs on a CPU
    *("cp_comm_type", "deallocate_pipeline_outputs", "batch_p2p_comm", "overlap_p2p_comm"),
    *("tensor_parallel_num_weight_shards", "expert_tensor_parallel_num_weight_shards"),
    *("inference_sampling_seed", "use_cpu_initialization"),
    "mup_base_head_dim",  # from which softmax_scale is made, that is compared
}
"""Fields in which a run on GPUs differs from the ranks of the tests, and which are no part of the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command line, what it describes, and under which layout."""

    flags: tuple[Flag, ...]
    told: dict[str, Any]
    layout: ParallelLayout
    dtype: str = "float32"
    without: str = ""

    def job(self) -> dict[str, Any]:
        layout = self.layout
        return {
            "argv": [word for flag in self.flags if flag[0] != self.without for word in flag],
            "config": self.told,
            "degrees": {"tp": layout.tp, "pp": layout.pp, "ep": layout.ep, "etp": layout.expert_tp},
            "world_size": layout.world_size,
            "dtype": self.dtype,
        }


def command_for(model: Model, layout: ParallelLayout) -> Command:
    """What `launch megatron` prints for a checkpoint under a layout."""
    sizes = {
        name: size
        for name in ("tp", "pp", "vpp", "ep", "etp", "first_stage_layers", "last_stage_layers")
        if (size := getattr(layout, name)) is not None
    }
    dtype = str(model.dtype).removeprefix("torch.")
    told = _told(model.config, layout)
    if model.saved is not None:
        told["gpt"]["vocab_size"] = vars(model.saved.args)["padded_vocab_size"]  # which is not padded again
    return Command(flags=tuple(megatron_command(model, sizes)), told=told, layout=layout, dtype=dtype)


def command_without_arguments(config: ModelConfig, layout: ParallelLayout) -> Command:
    """Every flag, as for a checkpoint whose arguments cannot be copied.

    Raises NotSupportedError for a model that megatron-core does not compute, whatever it is told.
    """
    told = _told(config, layout)
    told["gpt"]["vocab_size"] = config.vocab_size  # Megatron-LM pads it when it builds the model
    flags = (*model_flags(config, copied=False), *layout_flags(layout, config))
    return Command(flags=flags, told=told, layout=layout)


def _told(config: ModelConfig, layout: ParallelLayout) -> dict[str, Any]:
    """What the tests' ranks are told, and beside it what only training and other layouts ask for."""
    told = transformer_config(config, tp=layout.tp)
    told["transformer"] |= {
        "init_method_std": config.init_method_std,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "num_layers_in_first_pipeline_stage": layout.first_stage_layers,
        "num_layers_in_last_pipeline_stage": layout.last_stage_layers,
    }
    if config.multi_latent_attention:
        told["gpt"].pop("rotary_base")  # TransformerConfig has its own, and GPTModel then turns nothing by itself
    if config.multi_latent_attention and config.rope_scaling is None:
        told["transformer"]["rotary_scaling_factor"] = 1.0  # read by nobody then
    if config.num_moe_experts is not None:
        told["transformer"] |= {
            "moe_aux_loss_coeff": config.moe_aux_loss_coeff,
            "moe_router_load_balancing_type": "aux_loss",
            "moe_grouped_gemm": True,
            "sequence_parallel": layout.tp > 1,
        }
    return told


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What Megatron-LM made of a command line: `differences` by field, or its `error`."""

    differences: dict[str, str] = field(default_factory=dict[str, str])
    error: str = ""
    args: dict[str, Any] = field(default_factory=dict[str, Any], compare=False, repr=False)
    """What a checkpoint of that run would hold."""


def read_by_megatron(commands: Sequence[Command], megatron: Path = MEGATRON) -> list[Read]:
    """Every command line through Megatron-LM's own parser, in one process."""
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        job.write_text(json.dumps([command.job() for command in commands]))
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join((str(megatron), str(ROOT))),
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": "1",
        }
        worker = [sys.executable, "-P", str(Path(__file__).with_name("flags_worker.py")), str(job)]
        finished = subprocess.run(worker, env=environment, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"exit status {finished.returncode}\n{finished.stderr[-6000:]}")
    return [_read(json.loads(line)) for line in finished.stdout.splitlines()]


def _read(found: dict[str, Any]) -> Read:
    if "error" in found:
        return Read(error=found["error"])
    differences = {name: how for name, how in found["differences"].items() if name not in HOW_IT_RUNS}
    return Read(differences=differences, args=found["args"])
