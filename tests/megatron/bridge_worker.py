"""The real Megatron-Bridge on one rank: run by test_megatron_bridge.py as `bridge_worker.py JOB.json`.

Each case of a job is loaded as its users load it, compared, exported and saved; the result is a JSON file. Layers are
megatron-core's own, without Transformer Engine, under the checkpoint keys of Transformer Engine's.
"""

from __future__ import annotations

import json
import logging
import sys
import typing
from pathlib import Path
from typing import Any

import typing_extensions


def main(job_file: Path) -> None:
    import torch

    if not hasattr(typing, "override"):  # Python 3.12 has it
        typing.override = typing_extensions.override  # type: ignore[attr-defined]
    import megatron.core.models.gpt  # before the stand-ins: it asks whether Transformer Engine is there
    import megatron.core.optimizer  # noqa: F401
    from inert_modules import stand_in_for

    stand_in_for("transformer_engine", "modelopt", "datasets", "megatron.energon", "torch.utils.tensorboard")
    from megatron.bridge.models import gpt_provider
    from megatron.bridge.training.model_load_save import temporary_distributed_context
    from megatron.core.models.gpt import gpt_layer_specs

    from ckptbridge.trainer.megatron import on_cpu

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    block_spec = gpt_layer_specs.get_gpt_decoder_block_spec
    gpt_layer_specs.get_gpt_decoder_block_spec = lambda config, use_transformer_engine: _layers(block_spec, config)
    gpt_provider.transformer_engine_layer_spec = lambda config: _layers(block_spec, config)
    on_cpu.patch()
    torch.cuda.get_rng_state = torch.get_rng_state
    with on_cpu.OnCpu(), temporary_distributed_context(backend="gloo"):
        for case in json.loads(job_file.read_text()):
            Path(case["out"]).write_text(json.dumps(run_case(case)))


def _without_kernels(config: Any) -> None:
    from ckptbridge.trainer.megatron.model import _UNFUSED

    for name in (*_UNFUSED, "moe_grouped_gemm", "moe_permute_fusion"):
        setattr(config, name, False)


def _layers(block_spec: Any, config: Any) -> Any:
    from ckptbridge.trainer.megatron.model import use_te_names

    _without_kernels(config)
    spec = block_spec(config, use_transformer_engine=False, normalization=config.normalization)
    use_te_names(spec.layer_specs)
    return spec


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Load case["folder"] and compare logits; with case["export"], also what is exported with case["hf"], and save what
    Bridge itself imports from there as case["saved"].

    "known" tells whether Bridge has the architecture of case["hf"].
    """
    import torch
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.model_load_save import load_megatron_model
    from safetensors.torch import load_file

    from ckptbridge.trainer.megatron.model import logits

    hf, folder = Path(case["hf"]), Path(case["folder"])
    result: dict[str, Any] = {"known": AutoBridge.can_handle(str(hf))}
    if case["export"]:
        bridge = AutoBridge.from_hf_pretrained(str(hf))
        models = bridge.load_megatron_model(folder)
    else:
        bridge = None
        loaded = load_megatron_model(str(folder / "iter_0000000"), use_cpu_init=True)
        models = loaded if isinstance(loaded, list) else [loaded]
    output, expected = logits(models[0].eval(), torch.tensor(case["token_ids"])), torch.load(case["expected"])
    result["max_abs_diff"] = (output[..., : expected.shape[-1]] - expected).abs().max().item()
    if bridge is not None:
        stored = {name: tensor for file in hf.glob("*.safetensors") for name, tensor in load_file(file).items()}
        exported = dict(bridge.export_hf_weights(models, show_progress=False))
        result["names"] = sorted(stored.keys() ^ exported.keys())
        result["differing"] = sorted(n for n in stored.keys() & exported.keys() if not stored[n].equal(exported[n]))
        provider = bridge.to_megatron_provider(load_weights=True)
        _without_kernels(provider)
        provider.finalize()
        imported = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
        bridge.save_megatron_model(imported, case["saved"])
    return result


if __name__ == "__main__":  # megatron's writer starts a process that imports this file
    main(Path(sys.argv[1]))
