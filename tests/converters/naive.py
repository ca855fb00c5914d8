"""Megatron's packing written out once more, with loops over heads and ranks, to hold the tables against.

Nothing here is imported from the package. What is written follows Megatron-Core's modules: linear_qkv interleaves
each query group's heads, linear_fc1 is gate_proj above up_proj, a rank owns contiguous groups, halves and columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# N heads, G query groups, D head dim, E experts, F ffn width, H hidden_size


def _head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def qkv(q: Tensor, k: Tensor, v: Tensor, *, groups: int, head_dim: int) -> Tensor:
    """[N*D, ...], [G*D, ...], [G*D, ...] -> [(N+2G)*D, ...]: for each group its query heads, its key, its value."""
    heads_per_group = q.shape[0] // head_dim // groups
    rows: list[Tensor] = []
    for group in range(groups):
        for head in range(group * heads_per_group, (group + 1) * heads_per_group):
            rows.extend(q[head * head_dim + row] for row in range(head_dim))
        rows.extend(k[group * head_dim + row] for row in range(head_dim))
        rows.extend(v[group * head_dim + row] for row in range(head_dim))
    return torch.stack(rows)


def megatron_tensors(hf: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a Hugging Face model under Megatron's per-layer keys, experts stacked on dim 0."""
    made = {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
    }
    if not config.get("tie_word_embeddings"):
        made["output_layer.weight"] = hf["lm_head.weight"]
    for layer in range(config["num_hidden_layers"]):
        made |= _layer(hf, config, layer)
    return made


def _layer(hf: Mapping[str, Tensor], config: Mapping[str, Any], layer: int) -> dict[str, Tensor]:
    h, m = f"model.layers.{layer}.", f"decoder.layers.{layer}."
    groups, head_dim = config["num_key_value_heads"], _head_dim(config)
    made = {
        f"{m}self_attention.linear_qkv.layer_norm_weight": hf[f"{h}input_layernorm.weight"],
        f"{m}self_attention.linear_proj.weight": hf[f"{h}self_attn.o_proj.weight"],
    }
    for kind in ("weight", "bias"):
        if f"{h}self_attn.q_proj.{kind}" in hf:
            parts = [hf[f"{h}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            made[f"{m}self_attention.linear_qkv.{kind}"] = qkv(*parts, groups=groups, head_dim=head_dim)
    for part in "qk":
        if f"{h}self_attn.{part}_norm.weight" in hf:
            made[f"{m}self_attention.{part}_layernorm.weight"] = hf[f"{h}self_attn.{part}_norm.weight"]
    norm = hf[f"{h}post_attention_layernorm.weight"]
    if f"{h}mlp.gate_proj.weight" in hf:
        made[f"{m}mlp.linear_fc1.layer_norm_weight"] = norm
        made |= _mlp(hf, f"{h}mlp.", f"{m}mlp.", ("gate_proj", "up_proj", "down_proj"))
        return made
    made[f"{m}pre_mlp_layernorm.weight"] = norm
    if f"{h}block_sparse_moe.gate.weight" in hf:
        block, count, names = "block_sparse_moe", config["num_local_experts"], ("w1", "w3", "w2")
    else:
        block, count, names = "mlp", _num_experts(config), ("gate_proj", "up_proj", "down_proj")
    made[f"{m}mlp.router.weight"] = hf[f"{h}{block}.gate.weight"]
    experts = [_mlp(hf, f"{h}{block}.experts.{e}.", "", names) for e in range(count)]
    for matrix in ("linear_fc1.weight", "linear_fc2.weight"):
        made[f"{m}mlp.experts.experts.{matrix}"] = torch.stack([expert[matrix] for expert in experts])
    if f"{h}mlp.shared_expert_gate.weight" in hf:
        made[f"{m}mlp.shared_experts.gate_weight"] = hf[f"{h}mlp.shared_expert_gate.weight"]
        made |= _mlp(hf, f"{h}mlp.shared_expert.", f"{m}mlp.shared_experts.", names)
    return made


def _num_experts(config: Mapping[str, Any]) -> int:
    return config["num_experts"] if "num_experts" in config else config["num_local_experts"]


def _mlp(hf: Mapping[str, Tensor], source: str, target: str, names: tuple[str, str, str]) -> dict[str, Tensor]:
    gate_proj, up_proj, down_proj = (hf[f"{source}{name}.weight"] for name in names)
    return {
        f"{target}linear_fc1.weight": torch.cat([gate_proj, up_proj]),
        f"{target}linear_fc2.weight": down_proj,
    }


def stacked(tensors: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Per-layer keys -> one key for all layers, the layer as dim 0."""
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("decoder.layers.0."):
            every = [tensors[name.replace(".0.", f".{i}.", 1)] for i in range(num_layers)]
            made[name.replace("layers.0.", "layers.", 1)] = torch.stack(every)
        elif not name.startswith("decoder.layers."):
            made[name] = tensor
    return made


def padded(tensor: Tensor, tp: int) -> Tensor:
    """Rows of zeros up to a multiple of 128 * tp, as Megatron pads a vocabulary."""
    extra = -tensor.shape[0] % (128 * tp)
    return torch.cat([tensor, tensor.new_zeros(extra, *tensor.shape[1:])])


@dataclass(frozen=True)
class Sizes:
    """Degrees of parallelism of a Megatron run."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def world(self) -> int:
        per_stage = max(self.tp, self.ep * self.etp)  # the sizes of the tests divide one another
        return self.pp * per_stage


Slice = tuple[str, tuple[int, ...], tuple[int, ...]]
"""(key, offsets, sizes) of a part of a stacked tensor"""


def slices_of_rank(
    rank: int, tensors: Mapping[str, Tensor], num_layers: int, sizes: Sizes, *, per_layer_keys: bool
) -> Iterator[Slice]:
    """Every chunk that one Megatron rank saves: `tensors` have per-layer keys, a padded vocabulary, stacked experts."""
    per_stage = sizes.world // sizes.pp
    stage, within = rank // per_stage, rank % per_stage
    tp_rank, etp_rank = within % sizes.tp, within % sizes.etp
    ep_rank = within // sizes.etp % sizes.ep
    for name, tensor in tensors.items():
        key, lead_at, lead_size, first, last = name, (), (), stage == 0, stage == sizes.pp - 1
        if name.startswith("decoder.layers."):
            layer = int(name.split(".")[2])
            chunk = layer // (num_layers // (sizes.pp * sizes.vpp))
            if chunk % sizes.pp != stage:
                continue
            if not per_layer_keys:
                key, lead_at, lead_size = name.replace(f"layers.{layer}.", "layers.", 1), (layer,), (1,)
        elif name.startswith("embedding."):
            if not first:
                continue
        elif not last:
            continue
        if ".experts.experts." in name:
            here = tensor.shape[0] // sizes.ep
            for expert in range(ep_rank * here, (ep_rank + 1) * here):
                for at, size in _cuts(name, tensor[expert], sizes.etp, etp_rank):
                    yield key, (*lead_at, expert, *at), (*lead_size, 1, *size)
        else:
            for at, size in _cuts(name, tensor, sizes.tp, tp_rank):
                yield key, (*lead_at, *at), (*lead_size, *size)


def _cuts(name: str, tensor: Tensor, tp: int, tp_rank: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of what a TP rank owns of one matrix or vector."""
    rest = tuple(0 for _ in tensor.shape[1:])
    if name.endswith("linear_fc1.weight"):
        half = tensor.shape[0] // 2
        width = half // tp
        return [((start + tp_rank * width, 0), (width, tensor.shape[1])) for start in (0, half)]
    if name.endswith(("linear_fc2.weight", "linear_proj.weight")):
        width = tensor.shape[1] // tp
        return [((0, tp_rank * width), (tensor.shape[0], width))]
    if name.endswith(("linear_qkv.weight", "linear_qkv.bias", "word_embeddings.weight", "output_layer.weight")):
        rows = tensor.shape[0] // tp
        return [((tp_rank * rows, *rest), (rows, *tensor.shape[1:]))]
    return [((0, *rest), tuple(tensor.shape))]
