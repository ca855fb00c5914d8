"""Whether a config.json and a checkpoint's arguments describe one model."""

from __future__ import annotations

from dataclasses import fields
from math import isclose
from typing import Any

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.model_config import ModelConfig

_COMPARED_APART = {"rope_scaling", "vocab_size"}
_NO_COMPUTATION = {
    "max_position_embeddings",
    "init_method_std",
    "moe_aux_loss_coeff",
    "moe_layer_freq",
    "ffn_hidden_size",
}
"""How long and from what values a model was trained; and what the tensors' shapes tell better than arguments do."""
STRUCTURE = tuple(field.name for field in fields(ModelConfig) if field.name not in _COMPARED_APART | _NO_COMPUTATION)
"""Fields in which a config.json and a checkpoint's arguments must agree: they are the computation."""


def check_agreement(
    from_hf: ModelConfig, from_args: ModelConfig, hf_where: str, args_where: str, named_vocab: tuple[Any, Any]
) -> None:
    """Raises BadInputError naming every field in which config.json and the arguments contradict each other.

    `named_vocab` is the arguments' own vocab_size (the tokenizer's in Megatron-LM) and padded_vocab_size, or None.
    A model may have rows beyond the first (Qwen has), but neither fewer nor more than there are.
    """
    wrong = [
        f"  {name}: {getattr(from_hf, name)!r} in {hf_where}, {getattr(from_args, name)!r} in the args of {args_where}"
        for name in STRUCTURE
        if not _alike(getattr(from_hf, name), getattr(from_args, name))
        and not (name.startswith("moe_") and from_hf.num_moe_experts is None)
    ]
    if (from_hf.rope_scaling is None) != (from_args.rope_scaling is None):
        wrong.append(f"  rope_scaling: {from_hf.rope_scaling} in {hf_where}, {from_args.rope_scaling} in the args")
    least, most = named_vocab
    if (isinstance(least, int) and from_hf.vocab_size < least) or (isinstance(most, int) and from_hf.vocab_size > most):
        told = f"{least} (padded {most}) in the args of {args_where}"
        wrong.append(f"  vocab_size: {from_hf.vocab_size} in {hf_where}, {told}")
    if wrong:
        raise BadInputError("the config.json and the checkpoint's arguments describe two models:\n" + "\n".join(wrong))


def _alike(one: Any, other: Any) -> bool:
    """Some numbers are computed from arguments: they may differ in their last digits."""
    if isinstance(one, float) and isinstance(other, float):
        return isclose(one, other, rel_tol=1e-12)
    return one == other
