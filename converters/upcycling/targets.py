"""Which mixture of experts a dense model becomes: the first Hugging Face class that can say what it computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.fields import IRRELEVANT, write_config
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.model import Model
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.registry import family_named
from ckptbridge.converters.upcycling.factors import scaling_factor
from ckptbridge.converters.upcycling.layers import chosen_layers
from ckptbridge.converters.upcycling.spec import UpcycleSpec

TARGETS = ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "granite_moe")
"""In the order in which they are tried."""
_NEEDS_SHARED_EXPERT = ("qwen2_moe", "glm4_moe")


def choose_target(source: Model, spec: UpcycleSpec) -> tuple[Family, ModelConfig, list[str]]:
    """The family of the result, its config, and what a person should know of the choice.

    Raises NotSupportedError with each class's reason if none (or not the named one) can express the mixture.
    """
    if spec.to is not None and spec.to not in TARGETS:
        raise NotSupportedError(f"--to {spec.to}: not a mixture of experts; known are {', '.join(TARGETS)} and mcore")
    reasons: list[str] = []
    for name in TARGETS if spec.to is None else (spec.to,):
        family = family_named(name)
        config = mixture_config(source.config, spec, family)
        try:
            write_config(family.fields, config)
        except (NotSupportedError, BadInputError) as error:
            reasons.append(f"  {family.architecture}: {error}")
        else:
            return family, config, _notes(source, spec, family, config)
    raise NotSupportedError("\n".join([f"{source.path}: no class computes this mixture", *reasons]))


def mixture_config(dense: ModelConfig, spec: UpcycleSpec, family: Family) -> ModelConfig:
    """The config of the mixture as a class of this family has it."""
    width = spec.expert_width(dense.ffn_hidden_size)
    layers = chosen_layers(spec.layers, dense.num_layers)
    is_sigmoid = spec.router == "sigmoid"
    has_groups = is_sigmoid and spec.router_groups
    return replace(
        dense,
        ffn_hidden_size=width if family.name in ("mixtral", "granite_moe") else dense.ffn_hidden_size,
        num_moe_experts=spec.num_experts,
        moe_ffn_hidden_size=width,
        moe_layer_freq=1 if all(layers) else layers,
        moe_router_topk=spec.topk,
        moe_router_pre_softmax=spec.router == "pre-softmax",
        moe_router_score_function="sigmoid" if is_sigmoid else "softmax",
        moe_router_enable_expert_bias=is_sigmoid,
        moe_router_topk_scaling_factor=scaling_factor(spec),
        moe_router_num_groups=spec.groups if has_groups else None,
        moe_router_group_topk=spec.topk // spec.granularity if has_groups else None,
        moe_shared_expert_intermediate_size=_shared_width(spec, dense, family),
        moe_shared_expert_gate=family.name == "qwen2_moe",
        moe_aux_loss_coeff=0.001,
    )


def _shared_width(spec: UpcycleSpec, dense: ModelConfig, family: Family) -> int | None:
    if spec.shared == "partition":
        return spec.shared_neurons(dense.ffn_hidden_size)
    if spec.shared == "overlap":
        return dense.ffn_hidden_size
    return spec.expert_width(dense.ffn_hidden_size) if family.name in _NEEDS_SHARED_EXPERT else None


def hf_config_of(source: Model, family: Family, config: ModelConfig) -> dict[str, Any]:
    """config.json of the result: the tokens and the dtype of the source's, the rest from the mixture's config."""
    kept = {name: value for name, value in source.hf_config.items() if name.endswith("_token_id") and value is not None}
    kept |= {
        n: source.hf_config[n]
        for n in IRRELEVANT.names
        if n in ("use_cache", "torch_dtype", "dtype") and n in source.hf_config
    }
    return {
        **kept,
        "architectures": [family.architecture],
        "model_type": family.name,
        **write_config(family.fields, config),
    }


def _notes(source: Model, spec: UpcycleSpec, family: Family, config: ModelConfig) -> list[str]:
    notes = [
        f"{source.family.architecture} becomes {family.architecture}" + ("" if spec.to else ", the class that fits it")
    ]
    if family.name == "mixtral" and spec.granularity > 1:
        notes.append(
            "transformers computes Mixtral's router in the model's dtype: in bf16 0.2-0.4 % of tokens tie across "
            "groups and meet a shard twice; verify in fp32 and train with the router in fp32, or take --to glm4_moe "
            "--router sigmoid, whose router is fp32"
        )
    if spec.granularity > 1 and spec.router_std is None:
        notes.append(
            "the router is drawn with the model's own standard deviation; tokens then lie near the borders between "
            "groups, and training tears groups apart: SmolLM2 got worse in its first 16 steps, and better with "
            "--router-std 0.3"
        )
    if family.name in _NEEDS_SHARED_EXPERT and spec.shared == "none":
        notes.append(
            f"{family.architecture} wants a shared expert: its down_proj is zero, so that it adds nothing until it is "
            "trained"
        )
    return notes
