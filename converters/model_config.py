"""What a model is, in Megatron-Core's words: the one value that tables, layouts and the decoder share."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ckptbridge.converters.errors import BadInputError, told

_LARGEST = 1 << 48
_MOST_LAYERS, _MOST_EXPERTS_IN_ALL = 10_000, 200_000
"""A trillion parameters are 61 layers of 384 experts; far more is a spoiled number, and would take hours to list."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3RopeScaling:
    """Llama 3.1's frequency scaling: low frequencies are divided by `factor`, high ones kept."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only model. Field names and meanings are those of Megatron-Core's TransformerConfig.

    Raises BadInputError when built with values that no model can have.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int = 4096
    layernorm_epsilon: float = 1e-5
    rotary_base: float = 10000.0
    rope_scaling: Llama3RopeScaling | None = None
    window_size: int | None = None
    """How many tokens a token attends to, itself included; None is all before it."""
    share_embeddings_and_output_weights: bool = False
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    init_method_std: float = 0.02

    num_moe_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
    moe_layer_freq: int | tuple[int, ...] = 1
    """1: every layer is a mixture; a tuple holds a 1 for each layer that is one, a 0 for each dense layer."""
    moe_router_topk: int = 2
    moe_router_pre_softmax: bool = False
    """True: softmax over all experts, then top-k, weights as they are. False: the top-k weights sum to one."""
    moe_shared_expert_intermediate_size: int | None = None
    moe_shared_expert_gate: bool = False
    moe_aux_loss_coeff: float = 0.0

    def __post_init__(self) -> None:
        for name, value in ((f.name, getattr(self, f.name)) for f in fields(self)):
            _check_kind(name, value, str(type(self).__annotations__[name]))
        for name in (
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "vocab_size",
            "ffn_hidden_size",
        ):
            if getattr(self, name) < 1:
                raise BadInputError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("max_position_embeddings", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise BadInputError(f"{name} is {size}: it must be at least 1")
        experts = self.num_moe_experts or 0
        if max(self.num_layers, experts) > _MOST_LAYERS or self.num_layers * experts > _MOST_EXPERTS_IN_ALL:
            raise BadInputError(f"num_layers is {self.num_layers} and num_moe_experts {experts}: no model has so many")
        if self.num_attention_heads % self.num_query_groups:
            raise BadInputError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_query_groups "
                f"{self.num_query_groups}"
            )
        if isinstance(self.moe_layer_freq, tuple) and len(self.moe_layer_freq) != self.num_layers:
            raise BadInputError(
                f"moe_layer_freq names {len(self.moe_layer_freq)} layers, but the model has {self.num_layers}"
            )
        if self.num_moe_experts is not None:
            if not self.moe_ffn_hidden_size:
                raise BadInputError("a model with experts needs moe_ffn_hidden_size, the width of one expert")
            if not 1 <= self.moe_router_topk <= self.num_moe_experts:
                raise BadInputError(
                    f"moe_router_topk is {self.moe_router_topk}: it must lie between 1 and num_moe_experts "
                    f"{self.num_moe_experts}"
                )

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer `layer` (counted from 0) holds a mixture of experts."""
        if self.num_moe_experts is None:
            return False
        if isinstance(self.moe_layer_freq, tuple):
            return self.moe_layer_freq[layer] == 1
        return layer % self.moe_layer_freq == 0

    @property
    def layers_are_alike(self) -> bool:
        """Whether Megatron stacks the layers under one key.

        It does unless `moe_layer_freq` is a list or an integer above 1 (megatron-core 0.19,
        `TransformerBlock.sharded_state_dict`), even when such a list happens to hold ones only.
        """
        return self.num_moe_experts is None or self.moe_layer_freq == 1

    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // self.num_query_groups


def _check_kind(name: str, value: Any, annotation: str) -> None:
    """Raises BadInputError for a value that is not of its field's kind: files hold words where numbers belong."""
    if value is None and "None" in annotation:
        return
    kinds: tuple[type, ...] = (bool,)
    if annotation.startswith("int"):
        kinds = (int, tuple) if "tuple" in annotation else (int,)
    elif annotation.startswith("float"):
        kinds = (int, float)
    elif annotation.startswith("Llama3RopeScaling"):
        kinds = (Llama3RopeScaling,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise BadInputError(f"{name} is {told(value)}: expected {annotation}")
    for number in (value,) if isinstance(value, int | float) else ():
        if not abs(number) < _LARGEST:  # nan is not either
            raise BadInputError(f"{name} is {told(value)}: no model has such a number")
