"""GPT-OSS 20B and 120B: sinks, a window in every second layer, biases everywhere, experts stacked in one tensor.

Files hold an expert as [inputs, outputs], its gate_proj and up_proj as columns in turn.
"""

from __future__ import annotations

from ckptbridge.converters.families.attention import (
    ATTENTION,
    HEAD_DIM,
    MODEL_ENDS,
    MOE_FIELDS,
    QKV_BIAS,
    SIZE_FIELDS,
    H,
    M,
)
from ckptbridge.converters.fields import Irrelevant, Lacks, Must, Pair
from ckptbridge.converters.layout import COLUMN, COPY, GATED_COLUMNS_IN_TURN, GATED_IN_TURN, ROW_TURNED
from ckptbridge.converters.mapping import Family, Param
from ckptbridge.converters.rope_fields import Rope
from ckptbridge.converters.window_fields import LayerWindows

_EXPERT, _STACK = f"{M}.mlp.experts.experts.{{expert}}", f"{H}.mlp.experts"
_REST = (
    Param(f"{M}.self_attention.core_attention.softmax_offset", f"{H}.self_attn.sinks", COLUMN),
    Param(f"{M}.self_attention.linear_proj.bias", f"{H}.self_attn.o_proj.bias", COPY),
    Param(f"{M}.pre_mlp_layernorm.weight", f"{H}.post_attention_layernorm.weight", COPY),
    Param(f"{M}.mlp.router.weight", f"{H}.mlp.router.weight", COPY),
    Param(f"{M}.mlp.router.bias", f"{H}.mlp.router.bias", COPY),
    Param(f"{_EXPERT}.linear_fc1.weight", f"{_STACK}.gate_up_proj", GATED_COLUMNS_IN_TURN),
    Param(f"{_EXPERT}.linear_fc1.bias", f"{_STACK}.gate_up_proj_bias", GATED_IN_TURN),
    Param(f"{_EXPERT}.linear_fc2.weight", f"{_STACK}.down_proj", ROW_TURNED),
    Param(f"{_EXPERT}.linear_fc2.bias", f"{_STACK}.down_proj_bias", COPY),
)


def _is_even(layer: int) -> bool:
    return layer % 2 == 0


GPT_OSS = Family(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    params=MODEL_ENDS + ATTENTION + QKV_BIAS + _REST,
    fields=(
        *SIZE_FIELDS,
        *MOE_FIELDS,
        HEAD_DIM,
        Pair("num_local_experts", "num_moe_experts", spellings=("num_experts",)),
        Pair("intermediate_size", "moe_ffn_hidden_size"),
        Pair("intermediate_size", "ffn_hidden_size"),
        Pair("rms_norm_eps", "layernorm_epsilon", default=1e-5),
        Pair("swiglu_limit", "activation_func_clamp_value", default=7.0),
        Must("swiglu_alpha", 1.702, write=False),  # published files have none, nor has the class of transformers 5.17
        Must("attention_bias", True),
        LayerWindows(missing=_is_even, size=128),
        Rope(default_theta=150000.0),
        # Other programs' names for num_experts_per_tok and for rope's original_max_position_embeddings.
        Irrelevant(("experts_per_token", "initial_context_length")),
        Lacks("activation_func", "quick_gelu"),
        Lacks("glu_linear_offset", 1.0),
        Lacks("softmax_type", "learnable"),
        Lacks("add_qkv_bias", True),
        Lacks("add_proj_bias", True),
        Lacks("add_mlp_bias", True),
        Lacks("add_router_bias", True),
    ),
)
