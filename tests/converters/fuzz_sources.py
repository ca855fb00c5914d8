"""Tiny checkpoints of every format, held in memory: what the fuzzer spoils. Made without transformers.

A model is two layers of eight columns, so that a conversion takes milliseconds and a thousand of them fit a test.
"""

from __future__ import annotations

import io
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save
from torch import Tensor

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.execute import execute
from ckptbridge.converters.fields import write_config
from ckptbridge.converters.mcore.args import make_args
from ckptbridge.converters.mcore.torch_dist_reader import TRACKER
from ckptbridge.converters.model import open_model
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.registry import family_named
from tests.converters.fp8_models import quantised
from tests.converters.fuzz_reference import as_fsdp
from tests.converters.runs import megatron_optimizer, reshard, save_run

Files = Mapping[str, bytes]
"""A folder: {relative name: bytes}"""


@dataclass(frozen=True)
class Source:
    """A sound checkpoint of one format. `to` is what the fuzzer converts it to."""

    name: str
    files: Files
    to: str


_SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_query_groups": 2,
    "kv_channels": 4,
    "vocab_size": 10,
    "ffn_hidden_size": 12,
    "layernorm_epsilon": 1e-6,
}
_EXPERTS: dict[str, Any] = {"num_moe_experts": 4, "moe_ffn_hidden_size": 12, "moe_router_topk": 2}
_KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS
    | {
        "add_qkv_bias": True,
        "moe_shared_expert_intermediate_size": 8,
        "moe_shared_expert_gate": True,
        "moe_router_pre_softmax": True,
    },
}


def tiny_config(family: str) -> ModelConfig:
    return ModelConfig(**_SIZES | _KINDS[family])


def hf_files(family: str, dtype: torch.dtype = torch.float32) -> tuple[dict[str, bytes], dict[str, Tensor]]:
    """config.json and a tokenizer, and the weights that go with them."""
    table, config = family_named(family), tiny_config(family)
    generator = torch.Generator().manual_seed(len(family))
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for move in table.moves(config)
        for name, shape in zip(move.hf, move.hf_shapes, strict=True)
    }
    described = {
        "architectures": [table.architecture],
        "model_type": table.name,
        "dtype": str(dtype).removeprefix("torch."),
        **write_config(table.fields, config),
    }
    return {"config.json": json.dumps(described).encode(), "tokenizer.json": b'{"version": "1.0"}'}, tensors


def _saved(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def _sharded(tensors: dict[str, Tensor], count: int, pattern: str, write: Callable[[Any], bytes]) -> dict[str, bytes]:
    shards: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for at, (name, tensor) in enumerate(tensors.items()):
        shards[at * count // len(tensors)][name] = tensor
    files, weight_map = dict[str, bytes](), dict[str, str]()
    for number, shard in enumerate(shards, 1):
        file = pattern.format(f"{number:05d}-of-{count:05d}")
        files[file] = write(shard)
        weight_map |= dict.fromkeys(shard, file)
    index = json.dumps({"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map})
    return files | {f"{pattern.format('').replace('-.', '.')}.index.json": index.encode()}


def _hf_single() -> dict[str, bytes]:
    files, tensors = hf_files("llama")
    return files | {"model.safetensors": save(tensors, {"format": "pt"})}


def _hf_sharded() -> dict[str, bytes]:
    files, tensors = hf_files("qwen2_moe", torch.bfloat16)
    return files | _sharded(tensors, 3, "model-{}.safetensors", save)


def _hf_bin() -> dict[str, bytes]:
    files, tensors = hf_files("llama", torch.float16)
    return files | {"pytorch_model.bin": _saved(tensors)}


def _hf_bin_sharded() -> dict[str, bytes]:
    files, tensors = hf_files("mixtral")
    return files | _sharded(tensors, 2, "pytorch_model-{}.bin", _saved)


@dataclass(frozen=True)
class Converted:
    """A Megatron checkpoint that this converter writes from a tiny model."""

    family: str
    to: str = "torch_dist"
    layout: Mapping[str, int] = field(default_factory=dict[str, int])
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    dtype: torch.dtype = torch.float32
    with_hf_side: bool = True

    def files(self, scratch: Path) -> dict[str, bytes]:
        shutil.rmtree(scratch, ignore_errors=True)
        source, target = scratch / "hf", scratch / "megatron"
        source.mkdir(parents=True)
        files, tensors = hf_files(self.family, self.dtype)
        for name, data in (files | {"model.safetensors": save(tensors, {"format": "pt"})}).items():
            (source / name).write_bytes(data)
        options = ConvertOptions(layout=ParallelLayout(**self.layout), max_file_size=20_000, **self.options)
        execute(plan_conversion(open_model(source), target, self.to, options))  # type: ignore[arg-type]
        if not self.with_hf_side:
            shutil.rmtree(target / "hf")
        return read_folder(target)


def _hf_fp8() -> dict[str, bytes]:
    """DeepSeek-V3's form, in blocks of four by four."""
    files, tensors = hf_files("llama", torch.bfloat16)
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or "proj" not in name:
            stored[name] = tensor
            continue
        stored[name], stored[f"{name}_scale_inv"] = quantised(tensor, (4, 4))
    said = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [4, 4]}
    described = json.loads(files["config.json"]) | {"quantization_config": said}
    shards = _sharded(stored, 2, "model-{}.safetensors", save)
    return files | {"config.json": json.dumps(described).encode()} | shards


def _fsdp_dtensor(scratch: Path) -> dict[str, bytes]:
    """What Megatron-FSDP's names make of a mixture, written by torch itself."""
    config, (_, tensors) = tiny_config("mixtral"), hf_files("mixtral")
    hf_config = {"num_hidden_layers": config.num_layers, "num_attention_heads": config.num_attention_heads}
    hf_config |= {"num_key_value_heads": config.num_query_groups, "hidden_size": config.hidden_size}
    hf_config |= {"num_local_experts": config.num_moe_experts}
    state: dict[str, Any] = {key: tensor.clone() for key, tensor in as_fsdp(tensors, hf_config).items()}
    layout = ParallelLayout()
    args = make_args(config, padded_vocab_size=10, layout=layout, dtype=torch.float32, ckpt_format="fsdp_dtensor")
    state |= {"args": args, "iteration": 40, "checkpoint_version": 3.0}
    shutil.rmtree(scratch, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process writes all of it
        dcp.save(state, storage_writer=dcp.FileSystemWriter(scratch / "iter_0000040"), no_dist=True)
    (scratch / TRACKER).write_text("40")
    return read_folder(scratch)


def _training(scratch: Path) -> dict[str, dict[str, bytes]]:
    """A run with Megatron's optimizer, as torch_dist and as the files of two ranks with flat buffers."""
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "hf").mkdir(parents=True)
    for name, data in _hf_single().items():
        (scratch / "hf" / name).write_bytes(data)
    run = save_run(scratch / "hf", scratch / "run", optimizer=megatron_optimizer())
    reshard(run, scratch / "ranks", "torch", ParallelLayout(tp=2))
    return {
        "torch_dist with an optimizer": read_folder(scratch / "run"),
        "legacy with an optimizer": read_folder(scratch / "ranks"),
    }


MEGATRON: dict[str, Converted] = {
    "torch_dist": Converted("llama", layout={"tp": 2}),
    "torch_dist without config.json": Converted("mixtral", dtype=torch.bfloat16, with_hf_side=False),
    "torch_dist with layers in keys": Converted("qwen2_moe", options={"per_layer_keys": True}),
    "legacy": Converted("mixtral", to="torch", layout={"tp": 2, "pp": 2, "ep": 2}, with_hf_side=False),
    "legacy, oldest names": Converted("llama", to="torch", options={"legacy_names": "oldest"}, dtype=torch.float16),
}


def read_folder(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def all_sources(scratch: Path) -> dict[str, Source]:
    """Every format's sound checkpoint. Uses `scratch` while it works, and leaves it empty."""
    made = {
        name: Source(name, files(), "torch_dist")
        for name, files in {
            "hf safetensors": _hf_single,
            "hf safetensors, sharded": _hf_sharded,
            "hf .bin": _hf_bin,
            "hf .bin, sharded": _hf_bin_sharded,
            "hf fp8 in blocks": _hf_fp8,
        }.items()
    }
    made |= {name: Source(name, how.files(scratch), "hf") for name, how in MEGATRON.items()}
    made |= {name: Source(name, files, "hf") for name, files in _training(scratch).items()}
    made["fsdp_dtensor"] = Source("fsdp_dtensor", _fsdp_dtensor(scratch), "hf")
    shutil.rmtree(scratch, ignore_errors=True)
    return made
