"""What every rank of Megatron holds, written out with loops over heads, rows and ranks: legacy files must hold that.

Nothing here is imported from the package. `deal` says by hand which layers a rank's chunks have: deal[pp][chunk].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.converters import naive

Deal = list[list[list[int]]]
Models = dict[str, dict[str, Any]]
"""{"model" or "model0", "model1", ...: {key: tensor, or None for extra state}}"""


@dataclass(frozen=True)
class Ranks:
    """The sizes of a run's parallel groups, and who has which layers."""

    deal: Deal
    tp: int = 1
    ep: int = 1
    etp: int = 1

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Every pair of a TP and an EP rank that a file name can tell."""
        for tp in range(self.tp):
            for ep in range(self.ep):
                yield tp, ep

    def existing_pairs(self) -> set[tuple[int, int]]:
        """The pairs that one walk over enough ranks meets: TP counts fastest, EP behind ETP."""
        return {(rank % self.tp, rank // self.etp % self.ep) for rank in range(64)}

    def folder(self, tp: int, pp: int, ep: int) -> str:
        name = f"mp_rank_{tp:02d}"
        if len(self.deal) > 1:
            name += f"_{pp:03d}"
        if self.ep > 1:
            name += f"_{ep:03d}"
        return name


def rank_models(hf: Mapping[str, Tensor], config: Mapping[str, Any], ranks: Ranks, names: str) -> dict[str, Models]:
    """{rank's folder: its models}, keys in no particular order, without extra states."""
    whole = naive.megatron_tensors(hf, config)
    made: dict[str, Models] = {}
    for pp, chunks in enumerate(ranks.deal):
        for tp, ep in ranks.pairs():
            models: Models = {}
            for number, layers in enumerate(chunks):
                first = pp == 0 and number == 0
                last = pp == len(ranks.deal) - 1 and number == len(chunks) - 1
                held = dict(_ends(whole, ranks, tp, names, first, last))
                for local, layer in enumerate(layers):
                    held |= _layer(whole, config, ranks, (tp, ep), names, layer, local)
                models["model" if len(chunks) == 1 else f"model{number}"] = held
            made[ranks.folder(tp, pp, ep)] = models
    return made


def _ends(
    whole: Mapping[str, Tensor], ranks: Ranks, tp: int, names: str, first: bool, last: bool
) -> Iterator[tuple[str, Tensor]]:
    root = "language_model." if names == "oldest" else ""
    stack = "language_model.encoder." if names == "oldest" else "decoder."
    embedding = _rows(naive.padded(whole["embedding.word_embeddings.weight"], ranks.tp), ranks.tp, tp)
    if first:
        yield f"{root}embedding.word_embeddings.weight", embedding
    if not last:
        return
    yield f"{stack}final_layernorm.weight", whole["decoder.final_layernorm.weight"]
    if "output_layer.weight" in whole:
        yield f"{root}output_layer.weight", _rows(naive.padded(whole["output_layer.weight"], ranks.tp), ranks.tp, tp)
    elif not first:
        yield "word_embeddings_for_head.weight" if names == "oldest" else "output_layer.weight", embedding


def _layer(
    whole: Mapping[str, Tensor],
    config: Mapping[str, Any],
    ranks: Ranks,
    at: tuple[int, int],
    names: str,
    layer: int,
    local: int,
) -> dict[str, Tensor]:
    """A layer's weights on one rank, under the names of a dialect."""
    (tp, ep), prefix = at, f"decoder.layers.{layer}."
    mine = {key.removeprefix(prefix): tensor for key, tensor in whole.items() if key.startswith(prefix)}
    held: dict[str, Tensor] = {}
    for name, tensor in mine.items():
        if name.startswith("mlp.experts."):
            count = tensor.shape[0] // ranks.ep
            matrix = name.removeprefix("mlp.experts.experts.")
            for expert in range(count):
                cut = _slice(name, tensor[ep * count + expert], config, ranks.etp, tp % ranks.etp)
                one = (
                    f"mlp.experts.{matrix}{expert}" if names == "te" else f"mlp.experts.local_experts.{expert}.{matrix}"
                )
                held[one] = cut
        else:
            held[name] = _slice(name, tensor, config, ranks.tp, tp)
    if names in ("local", "oldest"):
        held = {_spelled(name, names): tensor for name, tensor in held.items()}
    stack = "language_model.encoder.layers" if names == "oldest" else "decoder.layers"
    return {f"{stack}.{local}.{name}": tensor for name, tensor in held.items()}


def _spelled(name: str, names: str) -> str:
    if names == "local":
        return {
            "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
            "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
        }.get(name, name)
    return {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "self_attention.linear_qkv.weight": "self_attention.query_key_value.weight",
        "self_attention.linear_qkv.bias": "self_attention.query_key_value.bias",
        "self_attention.linear_proj.weight": "self_attention.dense.weight",
        "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
        "mlp.linear_fc1.weight": "mlp.dense_h_to_4h.weight",
        "mlp.linear_fc2.weight": "mlp.dense_4h_to_h.weight",
    }[name]


def _rows(tensor: Tensor, size: int, rank: int) -> Tensor:
    count = tensor.shape[0] // size
    return torch.stack([tensor[rank * count + row] for row in range(count)])


def _slice(name: str, tensor: Tensor, config: Mapping[str, Any], size: int, rank: int) -> Tensor:
    """What one of `size` ranks holds of a weight."""
    if name.endswith("linear_qkv.weight") or name.endswith("linear_qkv.bias"):
        groups = config["num_key_value_heads"]
        rows_per_group = tensor.shape[0] // groups
        mine = range(rank * (groups // size), (rank + 1) * (groups // size))
        return torch.stack([tensor[group * rows_per_group + row] for group in mine for row in range(rows_per_group)])
    if name.endswith("linear_fc1.weight"):
        width = tensor.shape[0] // 2
        step = width // size
        mine = range(rank * step, (rank + 1) * step)
        gate_proj = [tensor[row] for row in mine]
        up_proj = [tensor[width + row] for row in mine]
        return torch.stack(gate_proj + up_proj)
    if name.endswith(("linear_fc2.weight", "linear_proj.weight")):
        step = tensor.shape[1] // size
        return torch.stack([tensor[:, column] for column in range(rank * step, (rank + 1) * step)], 1)
    return tensor


def nested(model: Mapping[str, Any]) -> dict[str, Any]:
    """The oldest files' nesting: modules in dictionaries, the stack of layers flat in one."""
    language_model: dict[str, Any] = {}
    made: dict[str, Any] = {"language_model": language_model}
    for key, tensor in model.items():
        if key == "word_embeddings_for_head.weight":
            made["word_embeddings_for_head"] = {"weight": tensor}
        elif key == "language_model.embedding.word_embeddings.weight":
            language_model["embedding"] = {"word_embeddings": {"weight": tensor}}
        elif key == "language_model.output_layer.weight":
            language_model["output_layer"] = {"weight": tensor}
        else:
            _, stack, within = key.split(".", 2)
            language_model.setdefault(stack, {})[within] = tensor
    return made
