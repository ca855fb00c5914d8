"""Phi-3, Phi-3.5 and Phi-4: Llama with q, k and v in one tensor, and gate_proj and up_proj in another."""

from __future__ import annotations

from ckptbridge.converters.families.attention import (
    DOWN,
    HEAD_DIM,
    INPUT_NORM,
    MLP_NORM,
    MODEL_ENDS,
    PROJECTION,
    SIZE_FIELDS,
    H,
    M,
)
from ckptbridge.converters.fields import Must, Pair
from ckptbridge.converters.layout import GATED_WHOLE, QKV_WHOLE
from ckptbridge.converters.mapping import Family, Param
from ckptbridge.converters.rope_fields import Rope

PHI3 = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    params=(
        *MODEL_ENDS,
        *INPUT_NORM,
        Param(f"{M}.self_attention.linear_qkv.weight", f"{H}.self_attn.qkv_proj.weight", QKV_WHOLE),
        *PROJECTION,
        *MLP_NORM,
        Param(f"{M}.mlp.linear_fc1.weight", f"{H}.mlp.gate_up_proj.weight", GATED_WHOLE),
        *DOWN,
    ),
    fields=(
        *SIZE_FIELDS,
        HEAD_DIM,
        Pair("intermediate_size", "ffn_hidden_size"),
        Pair("rms_norm_eps", "layernorm_epsilon", default=1e-5),
        Pair("sliding_window", "window_size", default=None),
        Rope(kinds=("default", "longrope"), partial=1.0, original_beside=True),
        Must("resid_pdrop", 0.0),
        Must("embd_pdrop", 0.0),
        # Published files name these, and the class reads none of them.
        Must("attention_bias", False, write=False),
        Must("mlp_bias", False, write=False),
        Must("lm_head_bias", False, write=False),
        Must("full_attn_mod", 1, write=False),
        Must("interpolate_factor", 1, write=False),
    ),
)
