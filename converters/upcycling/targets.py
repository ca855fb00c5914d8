"""Which mixture of experts a dense model becomes: the first Hugging Face class that can say what it computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.fields import IRRELEVANT, write_config
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.model import Model
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.registry import family_named
from ckptbridge.converters.upcycling.factors import scaling_factor
from ckptbridge.converters.upcycling.layers import chosen_layers
from ckptbridge.converters.upcycling.routers import drawn_std
from ckptbridge.converters.upcycling.spec import RouterKind, UpcycleSpec
from ckptbridge.converters.upcycling.ties import may_saturate

TARGETS = ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "granitemoe", "nemotron_moe")
"""In the order in which they are tried."""
WHEREVER_IT_FITS = ("hf", "mcore")
"""Words for `to` that name no class: the first that fits and that transformers has, or the first that fits."""
_NEEDS_SHARED_EXPERT = ("qwen2_moe", "glm4_moe")
_NARROW = ("mixtral", "granitemoe")
"""Classes that name one width, the experts'."""
_NO_TARGET = {
    "nemotron_h": "its attention does not turn heads with the position and its norms are RMSNorm; every dense family "
    "here has rotary embeddings, so that none computes the same there",
    "deepseek_v3": "its attention has latents of queries, keys and values, which no dense family here has",
    "deepseek_v2": "its attention has latents of queries, keys and values, which no dense family here has",
    "gpt_oss": "its experts clamp, have biases and add one to the linear half, which no dense family here does",
}
"""Mixtures that no dense family becomes, and why."""


def choose_target(source: Model, spec: UpcycleSpec) -> tuple[Family, ModelConfig, list[str]]:
    """The family of the result, its config, and what a person should know of the choice.

    Raises NotSupportedError with each class's reason if none (or not the named one) can express the mixture, and with
    what can: another class, or the same class with another router.
    """
    named = None if spec.to in WHEREVER_IT_FITS else spec.to
    if named in _NO_TARGET:
        raise NotSupportedError(f"--to {named}: {_NO_TARGET[named]}. Known are {', '.join(TARGETS)} and mcore")
    if named is not None and named not in TARGETS:
        raise NotSupportedError(f"--to {named}: not a mixture of experts; known are {', '.join(TARGETS)} and mcore")
    reasons: list[str] = []
    for name in TARGETS if named is None else (named,):
        family = family_named(name)
        config = mixture_config(source.config, spec, family)
        reason = _why_not(family, config, needs_class=spec.to == "hf")
        if not reason:
            return family, config, _notes(source, spec, family)
        reasons.append(f"  {family.architecture}: {reason}")
    what = "no class computes this mixture" if named is None else f"--to {named} does not compute this mixture"
    raise NotSupportedError("\n".join([f"{source.path}: {what}", *reasons, *_instead(source.config, spec)]))


def _why_not(family: Family, config: ModelConfig, *, needs_class: bool = False) -> str:
    try:
        write_config(family.fields, config)
    except (NotSupportedError, BadInputError) as error:
        return str(error)
    return f"transformers has no such class: {family.no_hf_class}" if needs_class and family.no_hf_class else ""


def _instead(dense: ModelConfig, spec: UpcycleSpec) -> list[str]:
    """A line with the targets that compute the mixture as it is asked for, or else with another router."""
    routers: tuple[RouterKind, ...] = (spec.router, *(r for r in get_args(RouterKind) if r != spec.router))
    for router in routers:
        other = replace(spec, router=router, router_groups=spec.router_groups and router == "sigmoid")
        able = [name for name in TARGETS if not _why_not(f := family_named(name), mixture_config(dense, other, f))]
        if able:
            told = " or ".join(f"--to {'mcore' if family_named(n).no_hf_class else n}" for n in able)
            return [f"What can: {told}" + ("" if router == spec.router else f" with --router {router}")]
    return []


def mixture_config(dense: ModelConfig, spec: UpcycleSpec, family: Family) -> ModelConfig:
    """The config of the mixture as a class of this family has it."""
    width = spec.expert_width(dense.ffn_hidden_size)
    layers = chosen_layers(spec.layers, dense.num_layers)
    is_sigmoid = spec.router == "sigmoid"
    has_groups = is_sigmoid and spec.router_groups
    return replace(
        dense,
        ffn_hidden_size=width if family.name in _NARROW else dense.ffn_hidden_size,
        num_moe_experts=spec.num_experts,
        moe_ffn_hidden_size=width,
        moe_layer_freq=1 if all(layers) else layers,
        moe_router_topk=spec.chosen,
        moe_router_pre_softmax=spec.router == "pre-softmax",
        moe_router_score_function="sigmoid" if is_sigmoid else "softmax",
        moe_router_enable_expert_bias=is_sigmoid,
        moe_router_topk_scaling_factor=scaling_factor(spec),
        moe_router_num_groups=spec.groups if has_groups else None,
        moe_router_group_topk=spec.chosen // spec.granularity if has_groups else None,
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


def _notes(source: Model, spec: UpcycleSpec, family: Family) -> list[str]:
    is_named = spec.to == family.name
    notes = [
        f"{source.family.architecture} becomes {family.architecture}" + ("" if is_named else ", the class that fits it")
    ]
    if family.no_hf_class:
        notes.append(f"transformers has no class for it: {family.no_hf_class}. It is written for Megatron alone")
    if family.name == "mixtral" and spec.granularity > 1 and spec.groups > 1:
        notes.append(
            "transformers computes Mixtral's router in the model's dtype: in bf16 0.2-0.4 % of tokens tie across "
            "groups and meet a shard twice; verify in fp32 and train with the router in fp32, or take --to glm4_moe "
            "--router sigmoid, whose router is fp32"
        )
    width = spec.expert_width(source.config.ffn_hidden_size)
    if width % 8 and not family.no_hf_class:
        dtypes = "fp32 and bf16" if width % 4 else "bf16"
        notes.append(
            f"an expert's {width} neurons are no multiple of 16 bytes in {dtypes}: there transformers' grouped_mm, "
            'its default, fails with "strides should be multiple of 16 bytes"; load the model with '
            'experts_implementation="eager"'
        )
    if spec.router_groups and spec.granularity != 2:
        notes.append(
            f"transformers ranks a group by its best two experts, Megatron-Core by its best {spec.granularity}: alike "
            "as long as the rows of a group are equal, another choice once they part"
        )
    if (std := drawn_std(spec, source.config)) != source.config.init_method_std and spec.router_std is None:
        notes.append(
            f"the router is drawn with a standard deviation of {std:.2g} instead of {source.config.init_method_std:g}, "
            "so that training does not tear the shards of a copy apart (--router-std changes it); with "
            "--router sigmoid --router-groups whole copies are chosen whatever the rows are"
        )
    if may_saturate(spec):
        notes.append(
            "the groups hold together as long as the sigmoids of no two of them are 1: in fp32 they are beyond logits "
            "of 17, which a router with large inputs gives (norm weights with a root mean square of 3 and more), and "
            "then groups tie; --router-groups chooses whole copies whatever the logits are"
        )
    if family.name in _NEEDS_SHARED_EXPERT and spec.shared == "none":
        notes.append(
            f"{family.architecture} wants a shared expert: its down_proj is zero, so that it adds nothing until it is "
            "trained"
        )
    return notes
