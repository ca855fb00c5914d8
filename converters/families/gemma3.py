"""Gemma 3, text: Gemma 2 with normed queries and keys; layers with a window, five of six, have a rope of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from ckptbridge.converters.errors import NotSupportedError
from ckptbridge.converters.families.attention import ATTENTION, DOWN, GATE_UP_APART, MODEL_ENDS, QK_NORM
from ckptbridge.converters.families.gemma2 import GEMMA2_FIELDS, NORMS_AROUND
from ckptbridge.converters.fields import FieldRow, Json, Lacks, Must, Pair
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.rope_fields import Rope
from ckptbridge.converters.window_fields import LayerWindows

_ALL, _LOCAL = "full_attention", "sliding_attention"
_GLOBAL = Rope(default_theta=1e6)
_WINDOWED = Rope(default_theta=1e4, kinds=("default",))


@dataclass(frozen=True)
class TwoRopes(FieldRow):
    """`rope_parameters` with an entry for each kind of layer, or fields beside it: `rope_local_base_freq` is one."""

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (*_GLOBAL.hf_names, "rope_local_base_freq")

    def to_mcore(self, hf: Json) -> Json:
        given: Json = hf.get("rope_parameters") or {}
        if strange := sorted(set(given) - {_ALL, _LOCAL}):
            raise NotSupportedError(f"config.json: rope_parameters holds {strange}; known are {_ALL} and {_LOCAL}")
        of_all: Json = {**cast(Json, given.get(_ALL) or {}), **cast(Json, hf.get("rope_scaling") or {})}
        everywhere = _GLOBAL.to_mcore(hf | {"rope_parameters": of_all, "rope_scaling": None})
        local: Json = {"rope_theta": hf.get("rope_local_base_freq"), "rope_parameters": given.get(_LOCAL)}
        return everywhere | {"local_rotary_base": _WINDOWED.to_mcore(local)["rotary_base"]}

    def to_hf(self, config: ModelConfig) -> Json:
        if config.local_rotary_base is None:
            raise NotSupportedError("local_rotary_base is None, which this Hugging Face class cannot express")
        local = {"rope_type": "default", "rope_theta": config.local_rotary_base}
        return {"rope_parameters": {_LOCAL: local, _ALL: _GLOBAL.to_hf(config)["rope_parameters"]}}


GEMMA3 = Family(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    params=MODEL_ENDS + ATTENTION + QK_NORM + GATE_UP_APART + DOWN + NORMS_AROUND,
    fields=(
        *GEMMA2_FIELDS,
        Pair("attn_logit_softcapping", "attn_logit_softcapping", default=None),
        Pair("final_logit_softcapping", "final_logit_softcapping", default=None),
        LayerWindows(missing=lambda layer: (layer + 1) % 6 != 0, size=4096),
        Must("sliding_window_pattern", 6, write=False),
        Must("_sliding_window_pattern", 6, write=False),
        TwoRopes(),
        Lacks("qk_layernorm", True),
    ),
)
