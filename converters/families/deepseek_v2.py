"""DeepSeek-V2 and V2-Lite: latent attention and a softmax router, in V2 over groups of experts."""

from __future__ import annotations

from dataclasses import dataclass

from ckptbridge.converters.errors import NotSupportedError, told
from ckptbridge.converters.families.attention import MODEL_ENDS, SIZE_FIELDS
from ckptbridge.converters.families.latent import LATENT_ATTENTION, LATENT_FIELDS
from ckptbridge.converters.families.mixture import MIXTURE, MIXTURE_FIELDS, DenseFirst, ExpertGroups, scaling_factor
from ckptbridge.converters.fields import FieldRow, Json, Lacks, Must
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.model_config import ModelConfig


@dataclass(frozen=True)
class _Choice(FieldRow):
    """`topk_method`: among all experts, or among those of the groups whose best expert is good."""

    groups: ExpertGroups

    @property
    def hf_names(self) -> tuple[str, ...]:
        return ("topk_method", *self.groups.hf_names)

    def to_mcore(self, hf: Json) -> Json:
        method = hf.get("topk_method") or "greedy"
        if method == "greedy":
            return {}
        if method != "group_limited_greedy":
            raise NotSupportedError(
                f"config.json: topk_method is {told(method)}; known are 'greedy' and 'group_limited_greedy'"
            )
        found = self.groups.to_mcore(hf)
        return found | {"moe_router_group_max": found["moe_router_num_groups"] is not None}

    def to_hf(self, config: ModelConfig) -> Json:
        method = "greedy" if config.moe_router_num_groups is None else "group_limited_greedy"
        return {"topk_method": method, **self.groups.to_hf(config)}


DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    params=MODEL_ENDS + LATENT_ATTENTION + MIXTURE,
    fields=(
        *SIZE_FIELDS,
        *LATENT_FIELDS,
        *MIXTURE_FIELDS,
        _Choice(ExpertGroups()),
        DenseFirst(default=0),
        scaling_factor(default=1.0),
        Lacks("moe_router_pre_softmax", True),
        Must("mlp_bias", False),
        Must("moe_layer_freq", 1, write=False),
        Must("norm_topk_prob", False),
        Must("scoring_func", "softmax"),
    ),
)
