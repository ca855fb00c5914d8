"""Rows and fields of models with latent attention."""

from __future__ import annotations

from dataclasses import dataclass

from ckptbridge.converters.errors import BadInputError, told
from ckptbridge.converters.families.attention import H, M
from ckptbridge.converters.fields import FieldRow, Json, Lacks, Must, Pair
from ckptbridge.converters.layout import COLUMN, COPY, ROW
from ckptbridge.converters.mapping import Param
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.rope_fields import Rope


def _has_query_latent(config: ModelConfig, layer: int) -> bool:
    return config.q_lora_rank is not None


def _has_no_query_latent(config: ModelConfig, layer: int) -> bool:
    return config.q_lora_rank is None


_A, _HA = f"{M}.self_attention", f"{H}.self_attn"

LATENT_ATTENTION = (
    Param(f"{M}.input_layernorm.weight", f"{H}.input_layernorm.weight", COPY),
    Param(f"{_A}.linear_q_proj.weight", f"{_HA}.q_proj.weight", COLUMN, when=_has_no_query_latent),
    # Every TP rank has the whole of both down-projections: what they make is normed before it is cut.
    Param(f"{_A}.linear_q_down_proj.weight", f"{_HA}.q_a_proj.weight", COPY, when=_has_query_latent),
    Param(f"{_A}.linear_q_up_proj.layer_norm_weight", f"{_HA}.q_a_layernorm.weight", COPY, when=_has_query_latent),
    Param(f"{_A}.linear_q_up_proj.weight", f"{_HA}.q_b_proj.weight", COLUMN, when=_has_query_latent),
    Param(f"{_A}.linear_kv_down_proj.weight", f"{_HA}.kv_a_proj_with_mqa.weight", COPY),
    Param(f"{_A}.linear_kv_up_proj.layer_norm_weight", f"{_HA}.kv_a_layernorm.weight", COPY),
    Param(f"{_A}.linear_kv_up_proj.weight", f"{_HA}.kv_b_proj.weight", COLUMN),
    Param(f"{_A}.linear_proj.weight", f"{_HA}.o_proj.weight", ROW),
)


@dataclass(frozen=True)
class LatentHead(FieldRow):
    """The two parts of a head, without and with position; `kv_channels` is their sum."""

    @property
    def hf_names(self) -> tuple[str, ...]:
        return ("qk_nope_head_dim", "qk_rope_head_dim", "head_dim", "qk_head_dim")

    def to_mcore(self, hf: Json) -> Json:
        sizes = [hf.get(name) for name in self.hf_names[:2]]
        if any(type(size) is not int for size in sizes):
            raise BadInputError(
                f"config.json: qk_nope_head_dim is {told(sizes[0])}, qk_rope_head_dim {told(sizes[1])}: expected sizes"
            )
        still, turned = (size or 0 for size in sizes)
        return {"qk_head_dim": still, "qk_pos_emb_head_dim": turned, "kv_channels": still + turned}

    def to_hf(self, config: ModelConfig) -> Json:
        return {"qk_nope_head_dim": config.qk_head_dim, "qk_rope_head_dim": config.qk_pos_emb_head_dim}


LATENT_FIELDS: tuple[FieldRow, ...] = (
    Lacks("multi_latent_attention", True),
    Lacks("qk_layernorm", True),
    LatentHead(),
    Pair("q_lora_rank", "q_lora_rank", default=None),
    Pair("kv_lora_rank", "kv_lora_rank"),
    Pair("v_head_dim", "v_head_dim"),
    Rope(kinds=("default", "yarn")),
    Must("attention_bias", False),
    # The classes norm latents with 1e-6 whatever they are told; Megatron has one epsilon for all norms.
    Must("rms_norm_eps", 1e-6),
    Lacks("layernorm_epsilon", 1e-6),
)
