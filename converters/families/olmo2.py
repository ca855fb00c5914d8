"""OLMo-2: Llama with norms behind attention and MLP, none before them, and one over all queries and all keys."""

from __future__ import annotations

from ckptbridge.converters.families.attention import (
    ATTENTION_BIAS,
    DOWN,
    GATE_UP_APART,
    HEAD_DIM,
    MODEL_ENDS,
    PROJECTION,
    PROJECTION_BIAS,
    QK_NORM,
    QKV_APART,
    QKV_BIAS,
    SIZE_FIELDS,
    H,
    M,
)
from ckptbridge.converters.fields import Lacks, Pair
from ckptbridge.converters.mapping import Family, Param
from ckptbridge.converters.rope_fields import Rope

POST_NORMS = (
    Param(f"{M}.self_attention.linear_proj.post_layernorm.weight", f"{H}.post_attention_layernorm.weight"),
    Param(f"{M}.mlp.linear_fc2.post_layernorm.weight", f"{H}.post_feedforward_layernorm.weight"),
)

OLMO2 = Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    params=MODEL_ENDS
    + QKV_APART
    + QKV_BIAS
    + QK_NORM
    + PROJECTION
    + PROJECTION_BIAS
    + GATE_UP_APART
    + DOWN
    + POST_NORMS,
    fields=(
        *SIZE_FIELDS,
        HEAD_DIM,
        Pair("intermediate_size", "ffn_hidden_size"),
        Pair("rms_norm_eps", "layernorm_epsilon", default=1e-5),
        *ATTENTION_BIAS,
        Rope(),
        Lacks("pre_layernorm", False),
        Lacks("post_layernorm", True),
        Lacks("qk_layernorm", True),
        Lacks("qk_layernorm_whole", True),
    ),
)
