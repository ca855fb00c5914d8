"""What to tell of a model that Megatron-LM cannot be told, or silently computes otherwise."""

from __future__ import annotations

from dataclasses import fields
from math import isclose, log

from ckptbridge.converters.mcore.args import MEGATRON_ROPE_SCALING
from ckptbridge.converters.mcore.flags import model_flags
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.rope_scaling import LinearRopeScaling, Llama3RopeScaling, YarnRopeScaling

NO_FLAG = {
    "local_rotary_base": "every layer has one base there",
    "attn_logit_softcapping": "scores are not capped there",
    "add_output_layer_bias": "the output layer has no bias there",
    "qk_layernorm_whole": "each head is normalised by itself there",
    "pre_layernorm": "attention and MLP always get a normed input there",
    "post_layernorm": "what attention and MLP add is not normed there",
    "residual_multiplier": "the residual stream is not multiplied there",
    "final_logit_softcapping": "logits are not capped there",
    "moe_router_group_max": "a group of experts is as good as its best ones together there, not as its best one",
    "moe_router_sparse_mixer": "experts are chosen and weighed by softmax there",
    "moe_router_jitter": "the sparse mixer's only",
}
"""Fields that no flag of pretrain_gpt.py tells of, and what it does instead. The other fields are in `flags`."""

_ACTIVATIONS = ((True, "silu"), (True, "quick_gelu"), (False, "squared_relu"), (False, "gelu"))
_LATENT_YARN = YarnRopeScaling(factor=1.0, original_max_position_embeddings=4096)
"""What MLATransformerConfig has by default and no flag changes, beside the factor."""
_OF_EVERY_RUN = {("--norm-epsilon", "1e-05"), ("--attention-softmax-in-fp32",)}


def megatron_notes(config: ModelConfig) -> list[str]:
    """What Megatron-LM cannot be told, or silently computes otherwise, for this model; and where its flags are."""
    notes = unsaid_notes(config)
    if config.num_moe_experts is not None and config.add_mlp_bias:
        notes.append("megatron-core cuts no experts that have biases: run it with --expert-tensor-parallel-size 1")
    if not set(model_flags(config, copied=True)) <= _OF_EVERY_RUN:
        notes.append(
            "--use-checkpoint-args does not copy all that this model needs: `ckptbridge launch megatron CKPT` prints "
            "the flags to give beside it"
        )
    return notes


def unsaid_notes(config: ModelConfig) -> list[str]:
    """A sentence for each field that Megatron-LM computes otherwise."""
    return [
        f"Megatron-LM cannot be told {field} = {getattr(config, field)!r}: {why}. The weights are right and come back, "
        "but pretrain_gpt.py computes another model"
        for field, why in unsaid(config).items()
    ]


def unsaid(config: ModelConfig) -> dict[str, str]:
    """The fields whose values no flag of pretrain_gpt.py (megatron-core 0.19) tells of, and what it does instead."""
    experts = config.num_moe_experts is not None
    found = {
        field.name: NO_FLAG[field.name]
        for field in fields(config)
        if field.name in NO_FLAG
        and getattr(config, field.name) != field.default
        and (experts or not field.name.startswith("moe_"))
    }
    if (config.gated_linear_unit, config.activation_func) not in _ACTIVATIONS:
        found["activation_func"] = (
            f"{'gated' if config.gated_linear_unit else 'plain'} units have "
            f"{'silu or quick_gelu' if config.gated_linear_unit else 'gelu or squared_relu'} there"
        )
    biases = config.add_proj_bias
    if config.add_mlp_bias != biases or (experts and config.add_router_bias != biases):
        found["add_mlp_bias"] = "the output projection, fc1, fc2 and the router all have a bias there, or none of them"
    elif biases and not config.add_qkv_bias:
        found["add_qkv_bias"] = "q, k and v have a bias there when the other projections have one"
    if why := _unsaid_rope(config):
        found["rope_scaling"] = why
    if config.multi_latent_attention and config.q_lora_rank is None:
        found["q_lora_rank"] = "where latents are normed, what linear_q_proj gets is normed once more there"
    if groups_are_ranked_alike(config):
        found.pop("moe_router_group_max", None)
    elif not config.moe_router_group_max:
        best = config.moe_router_topk // (config.moe_router_group_topk or 1)
        found["moe_router_group_topk"] = f"a group is as good as its best {best} experts there, not as its best two"
    if experts and config.moe_router_score_function == "sigmoid" and config.moe_router_pre_softmax:
        found["moe_router_pre_softmax"] = "the chosen sigmoids are always divided by their sum there"
    if experts and config.moe_router_topk == 1 and not config.moe_router_pre_softmax:
        is_softmax = config.moe_router_score_function == "softmax"
        found["moe_router_topk"] = (
            "it refuses one expert a token, whose only weight would always be 1"
            if is_softmax
            else "the only expert of a token is weighed by its sigmoid as it is"
        )
    return found


def _unsaid_rope(config: ModelConfig) -> str:
    scaling = config.rope_scaling
    if scaling is None:
        return ""
    if config.multi_latent_attention and not isinstance(scaling, YarnRopeScaling):
        return "latent attention knows YaRN only there"
    if scaling == MEGATRON_ROPE_SCALING:
        return ""
    if isinstance(scaling, Llama3RopeScaling):
        return f"it is {MEGATRON_ROPE_SCALING} there whatever --rope-scaling-factor says"
    if isinstance(scaling, LinearRopeScaling):
        return "" if float(scaling.factor).is_integer() else "a linear factor is a whole number there"
    if not isinstance(scaling, YarnRopeScaling):
        return "it is not known there, and positions are not scaled"
    own = scaling.attention_factor
    if own is not None and not isclose(own, 0.1 * log(scaling.factor) + 1 if scaling.factor > 1 else 1.0, rel_tol=1e-6):
        return "attention_factor follows from factor there"
    if config.multi_latent_attention:
        for name in ("original_max_position_embeddings", "beta_fast", "beta_slow", "truncate"):
            if getattr(scaling, name) != (fixed := getattr(_LATENT_YARN, name)):
                return f"{name} is {fixed} there for latent attention"
    elif config.mtp_num_layers:
        return "layers that predict further tokens are refused with YaRN there"
    return ""


def groups_are_ranked_alike(config: ModelConfig) -> bool:
    """Whether Megatron finds the best groups of experts as the model does.

    It sums the best topk // group_topk experts of each, DeepSeek-V2 takes the best one, DeepSeek-V3 the best two.
    """
    if not config.moe_router_num_groups or not config.moe_router_group_topk:
        return True
    return config.moe_router_topk // config.moe_router_group_topk == (1 if config.moe_router_group_max else 2)
