"""Gemma 2: Gemma with norms behind attention and MLP too, a window in every second layer, capped scores and logits."""

from __future__ import annotations

from ckptbridge.converters.errors import NotSupportedError
from ckptbridge.converters.families.attention import ATTENTION, DOWN, GATE_UP_APART, MODEL_ENDS, H, M
from ckptbridge.converters.families.gemma import GEMMA_FIELDS
from ckptbridge.converters.families.olmo2 import POST_NORMS
from ckptbridge.converters.fields import FieldRow, Irrelevant, Lacks, Must, Pair
from ckptbridge.converters.mapping import Family, Param
from ckptbridge.converters.rope_fields import Rope
from ckptbridge.converters.window_fields import LayerWindows

NORMS_AROUND = (
    Param(f"{M}.mlp.linear_fc1.layer_norm_weight", f"{H}.pre_feedforward_layernorm.weight"),
    *POST_NORMS,
)


def _scale(channels: int) -> float:
    return channels**-0.5


def _channels(scale: float | None) -> int:
    if scale is None or scale < 1e-6:
        raise NotSupportedError(f"softmax_scale is {scale}, which this Hugging Face class cannot express")
    return round(scale**-2)


GEMMA2_FIELDS: tuple[FieldRow, ...] = (
    *GEMMA_FIELDS,
    Must("hidden_activation", "gelu_pytorch_tanh"),
    Pair("query_pre_attn_scalar", "softmax_scale", default=256, convert=(_scale, _channels)),
    Irrelevant(("cache_implementation",)),
    Lacks("activation_func", "gelu_tanh"),
    Lacks("post_layernorm", True),
)
"""What Gemma 2 and 3 share."""

GEMMA2 = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    params=MODEL_ENDS + ATTENTION + GATE_UP_APART + DOWN + NORMS_AROUND,
    fields=(
        *GEMMA2_FIELDS,
        Pair("attn_logit_softcapping", "attn_logit_softcapping", default=50.0, null_means_none=True),
        Pair("final_logit_softcapping", "final_logit_softcapping", default=30.0, null_means_none=True),
        Must("hidden_act", "gelu_pytorch_tanh"),  # the published files say it twice; the class reads hidden_activation
        LayerWindows(missing=lambda layer: layer % 2 == 0, size=4096),
        Rope(),
    ),
)
