"""Where Megatron's distributed format keeps a parameter: its key, and its place on the stacked axes.

A layer number and an expert number are axes. Experts are always stacked; layers are stacked when all are
alike, and stay in the key otherwise (`decoder.layers.3.mlp...`). Those that predict further tokens always stay there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ckptbridge.converters.mapping import MTP
from ckptbridge.converters.model_config import ModelConfig

_LAYER = re.compile(r"\blayers\.(\d+)\.")
_EXPERT = re.compile(r"\bexperts\.experts\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Address:
    """`key` holds a tensor of shape (*axes, *shape); this parameter is its entry `index`."""

    key: str
    index: tuple[int, ...]
    axes: tuple[int, ...]


def address_of(name: str, config: ModelConfig, *, per_layer_keys: bool) -> Address:
    """The address of a parameter by its name with layer and expert numbers."""
    index: list[int] = []
    axes: list[int] = []
    if not per_layer_keys and not name.startswith(MTP) and (hit := _LAYER.search(name)):
        index.append(int(hit[1]))
        axes.append(config.num_layers)
        name = _LAYER.sub("layers.", name, count=1)
    if hit := _EXPERT.search(name):
        index.append(int(hit[1]))
        axes.append(config.num_moe_experts or 0)
        name = _EXPERT.sub("experts.experts.", name, count=1)
    return Address(name, tuple(index), tuple(axes))


def state_prefix(state: str) -> str:
    """What opens a key: nothing for the weight, `optimizer.state.exp_avg.` for a moment of Adam."""
    return f"optimizer.state.{state}." if state else ""


def decoder_name(name: str) -> str:
    """The name under which the decoder holds a parameter: its experts stacked, its layer in the name."""
    return _EXPERT.sub("experts.experts.", name, count=1)


def layer_of(name: str) -> int | None:
    """The layer number in a parameter's name, if it has one."""
    hit = _LAYER.search(name)
    return int(hit[1]) if hit else None


def expert_of(name: str) -> int | None:
    """The expert number in a parameter's name, if it has one."""
    hit = _EXPERT.search(name)
    return int(hit[1]) if hit else None


def extra_state_keys(config: ModelConfig, *, per_layer_keys: bool) -> Iterable[str]:
    """The `_extra_state` objects that Megatron's modules ask for, a superset over versions and specs.

    Megatron's default strictness fails when one that it asks for is absent, and ignores what it does not
    ask for (megatron-core 0.16 and 0.19, measured).
    """
    for layer in range(config.num_layers):
        grid = [(layer, config.num_layers)] if not per_layer_keys else []
        prefix = f"decoder.layers.{layer}." if per_layer_keys else "decoder.layers."
        yield from _keys_of_layer(config, layer, prefix, grid)
    yield _object_key("decoder.final_layernorm._extra_state", [])
    for number in range(config.mtp_num_layers):
        for module in ("enorm", "hnorm", "eh_proj", "final_layernorm"):
            yield _object_key(f"{MTP}{number}.{module}._extra_state", [])
        yield from _keys_of_layer(config, config.num_layers + number, f"{MTP}{number}.transformer_layer.", [])


def _keys_of_layer(config: ModelConfig, layer: int, prefix: str, grid: list[tuple[int, int]]) -> Iterable[str]:
    for module in _modules_with_extra_state(config, layer):
        if module.startswith("mlp.experts."):
            for expert in range(config.num_moe_experts or 0):
                yield _object_key(f"{prefix}{module}._extra_state", [*grid, (expert, config.num_moe_experts or 0)])
        else:
            yield _object_key(f"{prefix}{module}._extra_state", grid)


def _modules_with_extra_state(config: ModelConfig, layer: int) -> Iterable[str]:
    yield "input_layernorm"
    if config.multi_latent_attention:
        yield from (f"self_attention.linear_{m}" for m in ("q_proj", "q_down_proj", "q_up_proj"))
        yield from (f"self_attention.{m}" for m in ("linear_kv_down_proj", "linear_kv_up_proj", "kv_layernorm"))
    else:
        yield "self_attention.linear_qkv"
    yield from (f"self_attention.{m}" for m in ("core_attention", "linear_proj"))
    if config.qk_layernorm:
        yield from (f"self_attention.{m}" for m in ("q_layernorm", "k_layernorm"))
    yield "pre_mlp_layernorm"
    if config.post_layernorm:
        yield from ("self_attention.linear_proj.post_layernorm", "mlp.linear_fc2.post_layernorm")
    if not config.is_moe_layer(layer):
        yield from ("mlp.linear_fc1", "mlp.linear_fc2")
        return
    yield from ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")
    if config.moe_shared_expert_intermediate_size:
        yield from ("mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2")


def _object_key(key: str, grid: list[tuple[int, int]]) -> str:
    places = grid or [(0, 1)]
    return f"{key}/shard_{'.'.join(str(at) for at, _ in places)}_{'.'.join(str(n) for _, n in places)}"
