"""What a user should know of a run before it has cost anything: sentences, none of which stops it."""

from __future__ import annotations

from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.trainer.recipe import KernelsSection, MoeSection, Recipe
from ckptbridge.trainer.tokens import Tokens


def notes_of(recipe: Recipe, config: ModelConfig, tokens: Tokens | None = None) -> list[str]:
    """Sentences about text that was passed over, positions beyond the model's own, and experts that nothing balances.

    `config` is that of the model that is trained.
    """
    found = [
        None if tokens is None else tokens.note,
        _length(recipe, config),
        _balance(recipe, config),
        _without_experts(recipe, config),
    ]
    return [note for note in found if note is not None]


def kernels_of_plan(kernels: KernelsSection) -> str:
    """For which kernels planned memory holds, and whether a recipe's choice is among them."""
    holds = "The figures are those of the Triton kernels (kernels.backend auto on a GPU, or triton)"
    if kernels.backend not in ("auto", "triton"):
        return f"{holds}. This recipe asks for {kernels.backend}, whose memory is not planned and may be more."
    if kernels.attention == "math":
        return f"{holds} and of attention that keeps no scores. This recipe asks for math, which keeps them."
    return f"{holds}."


def _length(recipe: Recipe, config: ModelConfig) -> str | None:
    length, longest = recipe.data.sequence_length, config.max_position_embeddings
    if length <= longest:
        return None
    return (
        f"data.sequence_length {length} is beyond the model's max_position_embeddings {longest}: the first steps meet "
        f"positions that it was not made for, and the exported config.json goes on to say {longest}. If the result is "
        f"to be used at {length}, change it there; else lower data.sequence_length."
    )


def _without_experts(recipe: Recipe, config: ModelConfig) -> str | None:
    asked = [f"moe.{key}" for key, value in recipe.moe if value and value != MoeSection.model_fields[key].default]
    if config.num_moe_experts is not None or not asked:
        return None
    return f"{', '.join(asked)}: without effect, for the model has no experts."


def _balance(recipe: Recipe, config: ModelConfig) -> str | None:
    named, has_bias = recipe.moe.aux_loss_coeff, config.moe_router_enable_expert_bias
    if config.num_moe_experts is None or (config.moe_aux_loss_coeff if named is None else named) > 0:
        return None
    if has_bias and recipe.moe.bias_update_rate > 0:
        return None
    why = "moe.aux_loss_coeff is 0" if named is not None else "the model's config has no load-balancing loss"
    bias = ", and moe.bias_update_rate is 0, so that the expert bias stays as it was loaded" if has_bias else ""
    other = ", or moe.bias_update_rate" if has_bias else ""
    return (
        f"Nothing balances the experts: {why}{bias}. Tokens may crowd on a few of them (expert_load in train.jsonl "
        f"tells); set moe.aux_loss_coeff{other}, such as to 0.001."
    )
