"""Every family loaded by real Transformer Engine modules on one GPU; prints a JSON object a line.

    python -m tests.megatron.on_transformer_engine [NAME ...]

It needs a GPU, megatron-core and Transformer Engine. Each tiny model is converted to torch_dist and legacy torch, and
both are loaded strictly into the GPTModel of megatron-core's Transformer Engine specs (experts as TEGroupedMLP). Logits
are compared with transformers'. Transformer Engine multiplies fp32 in TF32, with 10 bits: differences of 1e-2 are its
own, and a fault (gate_proj and up_proj exchanged, the last line of each model) shows what another model looks like.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnBackend
from torch import Tensor

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import open_model
from ckptbridge.trainer.megatron.config import transformer_config
from ckptbridge.trainer.megatron.model import transformer_of
from tests.tiny import EVERY, reference_logits, save_tiny, token_ids


def gpt_of(config: Any) -> GPTModel:
    """The model of megatron-core's Transformer Engine specs, on the GPU, with NaN for weights."""
    told = transformer_config(config)
    grouped = {"moe_grouped_gemm": True} if config.num_moe_experts else {}
    transformer = transformer_of(told["transformer"] | grouped, tp=1, pp=1, ep=1, etp=1)
    transformer.use_cpu_initialization = False
    transformer.attention_backend = AttnBackend.unfused  # the only one that has fp32
    spec = get_gpt_decoder_block_spec(transformer, use_transformer_engine=True, normalization=transformer.normalization)
    further = None
    if transformer.mtp_num_layers:
        further = get_gpt_mtp_block_spec(transformer, spec, use_transformer_engine=True)
    model = GPTModel(transformer, spec, parallel_output=False, mtp_block_spec=further, **told["gpt"]).cuda().eval()
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    return model


def logits_of(model: GPTModel, vocab_size: int) -> Tensor:
    """Logits [batch, length, vocabulary] of the tests' tokens."""
    tokens = token_ids(batch=1).cuda()
    batch, length = tokens.shape
    positions = torch.arange(length, device="cuda").expand(batch, length)
    return model(tokens, positions, None)[..., :vocab_size].float().cpu()


def load_torch_dist(model: GPTModel, folder: Path) -> dict[str, Any]:
    """What megatron-core asked for in vain, and what it left unread."""
    metadata = dist_checkpointing.load_content_metadata(str(folder))
    wanted = {"model": model.sharded_state_dict(metadata=dict(metadata or {}))}
    loaded, unread, absent = dist_checkpointing.load(wanted, str(folder), strict="return_all")
    model.load_state_dict(loaded["model"], strict=not absent)
    return {"absent": sorted(absent)[:6], "unread": sorted(k for k in unread if "_extra_state" not in k)[:6]}


def load_legacy(model: GPTModel, folder: Path) -> dict[str, Any]:
    """What `load_state_dict` said of the one rank's file."""
    state = torch.load(folder / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)["model"]
    told = model.load_state_dict(state, strict=False)
    return {
        "missing": [k for k in told.missing_keys if "_extra_state" not in k][:6],
        "unexpected": [k for k in told.unexpected_keys if "_extra_state" not in k][:6],
        "extra_states_missing": sum("_extra_state" in k for k in told.missing_keys),
    }


def swap_halves(model: GPTModel) -> None:
    """The planted fault: gate_proj and up_proj, or the two halves of whatever fc1 is, change places."""
    for name, parameter in model.named_parameters():
        if "linear_fc1.weight" in name:
            parameter.copy_(parameter.roll(parameter.shape[0] // 2, 0))


def checked(name: str, work: Path) -> dict[str, Any]:
    """Both formats of one model, and the fault."""
    hf = save_tiny(name, work / "hf")
    source = open_model(hf)
    expected = reference_logits(hf, token_ids(batch=1))
    told: dict[str, Any] = {"model": name, "largest_logit": expected.abs().max().item()}
    for to, load in (("torch_dist", load_torch_dist), ("torch", load_legacy)):
        execute(plan_conversion(source, work / to, to, ConvertOptions()))  # type: ignore[arg-type]
        model = gpt_of(source.config)
        told[to] = load(model, work / to / "release")
        told[to]["max_abs_diff"] = (logits_of(model, source.config.vocab_size) - expected).abs().max().item()
    swap_halves(model)
    told["fault_max_abs_diff"] = (logits_of(model, source.config.vocab_size) - expected).abs().max().item()
    return told


@torch.no_grad()
def main(names: list[str]) -> None:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    torch.cuda.set_device(0)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    for name in names or [name for name, tiny in EVERY.items() if not tiny.not_in_megatron]:
        with tempfile.TemporaryDirectory() as work:
            try:
                told = checked(name, Path(work))
            except Exception as error:
                told = {"model": name, "error": f"{type(error).__name__}: {error}"[:600], "at": _last_call()}
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()
    dist.destroy_process_group()


def _last_call() -> str:
    return traceback.format_exc().strip().splitlines()[-3].strip()


if __name__ == "__main__":
    main(sys.argv[1:])
