"""The run's arguments inside a Megatron checkpoint, to and from ModelConfig.

Megatron-LM compares some of them on load, copies others with `--use-checkpoint-args`, and fails where one that
it reads is absent (megatron-core 0.19, training/checkpointing.py and argument_utils.py).
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any, cast

import torch

from ckptbridge.converters.errors import BadInputError, NotSupportedError, told
from ckptbridge.converters.model_config import Llama3RopeScaling, ModelConfig
from ckptbridge.converters.parallel_layout import ParallelLayout

MEGATRON_ROPE_SCALING = Llama3RopeScaling(factor=8.0)
"""What pretrain_gpt.py computes whatever --rope-scaling-factor says: only the switch is forwarded."""

_SAME = (
    *(
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
    ),
    *("max_position_embeddings", "add_qkv_bias", "qk_layernorm", "init_method_std", "moe_router_topk"),
    *("moe_router_pre_softmax", "moe_shared_expert_gate", "moe_aux_loss_coeff"),
)
"""Fields that have one name in ModelConfig and in Megatron's arguments."""


def make_args(
    config: ModelConfig,
    *,
    padded_vocab_size: int,
    layout: ParallelLayout,
    dtype: torch.dtype,
    ckpt_format: str,
) -> Namespace:
    """Arguments that `--use-checkpoint-args` accepts and that describe this model."""
    rotary_base = int(config.rotary_base) if config.rotary_base == int(config.rotary_base) else config.rotary_base
    freq = config.moe_layer_freq
    values: dict[str, Any] = {name: getattr(config, name) for name in _SAME}
    values |= {
        "seq_length": config.max_position_embeddings,
        "group_query_attention": True,
        "position_embedding_type": "rope",
        "add_position_embedding": True,
        "use_rotary_position_embeddings": False,
        "rotary_base": rotary_base,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": None,
        "use_rope_scaling": config.rope_scaling is not None,
        "rope_scaling_factor": config.rope_scaling.factor if config.rope_scaling else 8.0,
        "window_size": (config.window_size - 1, 0) if config.window_size else None,
        "add_bias_linear": False,
        "swiglu": True,
        "squared_relu": False,
        "normalization": "RMSNorm",
        # The second spelling of each is newer: Megatron-LM of 2026 names arguments after TransformerConfig's fields.
        "norm_epsilon": config.layernorm_epsilon,
        "layernorm_epsilon": config.layernorm_epsilon,
        "apply_layernorm_1p": False,
        "layernorm_zero_centered_gamma": False,
        "apply_query_key_layer_scaling": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "untie_embeddings_and_output_weights": not config.share_embeddings_and_output_weights,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": padded_vocab_size,
        "make_vocab_size_divisible_by": 128,
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": None,
        "num_experts": config.num_moe_experts,
        "moe_layer_freq": list(freq) if isinstance(freq, tuple) else freq,
        "moe_ffn_hidden_size": config.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": config.moe_shared_expert_intermediate_size,
        "moe_router_score_function": "softmax",
        "moe_router_enable_expert_bias": False,
        "moe_router_topk_scaling_factor": None,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_router_dtype": "fp32" if config.num_moe_experts else None,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": config.num_moe_experts is not None,
        "mtp_num_layers": None,
        "spec": None,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "ckpt_format": ckpt_format,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "num_layers_per_virtual_pipeline_stage": None,
        "decoder_first_pipeline_num_layers": layout.first_stage_layers,
        "decoder_last_pipeline_num_layers": layout.last_stage_layers,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.expert_tp,
        "context_parallel_size": 1,
        "data_parallel_random_init": False,
        "iteration": 0,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }
    return Namespace(**values)


_MUST: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "position_embedding_type": ("rope",),
    "swiglu": (True,),
    "squared_relu": (False, None),
    "add_bias_linear": (False,),
    "rotary_percent": (1.0, None),
    "rotary_interleaved": (False, None),
    "rotary_seq_len_interpolation_factor": (None,),
    "apply_layernorm_1p": (False, None),
    "layernorm_zero_centered_gamma": (False, None),
    "multi_latent_attention": (False, None),
    "moe_router_score_function": ("softmax", None),
    "moe_router_enable_expert_bias": (False, None),
    "moe_router_topk_scaling_factor": (None, 1.0),
    "moe_latent_size": (None,),
    "mtp_num_layers": (None, 0),
    "window_attn_skip_freq": (None,),
    "softmax_type": ("vanilla", None),
    "softmax_scale": (None,),
    "no_rope_freq": (None, 0),
    "qk_l2_norm": (False, None),
    "glu_linear_offset": (0.0, None),
    "activation_func_clamp_value": (None,),
    "apply_residual_connection_post_layernorm": (False, None),
    "use_mup": (False, None),
    "moe_router_group_topk": (None,),
    "moe_router_num_groups": (None, 1),
    "moe_apply_probs_on_input": (False, None),
}
"""Arguments that change the computation, and the values that this version computes."""


def config_from_args(args: Namespace, where: str) -> ModelConfig:
    """The model that a checkpoint's arguments describe.

    Raises NotSupportedError naming an argument whose value is not supported, BadInputError naming one that
    is missing.
    """
    for name, known in _MUST.items():
        if hasattr(args, name) and getattr(args, name) not in known:
            raise NotSupportedError(f"{where}: args.{name} is {told(getattr(args, name))}; supported: {known[0]!r}")
    given = _Arguments(args, where)
    experts = given.whole("num_experts", None)
    window = given.window()
    heads = given.whole("num_attention_heads")
    hidden = given.whole("hidden_size")
    freq = given.frequency()
    ffn = given.whole("ffn_hidden_size", 4 * hidden)
    expert_ffn = given.whole("moe_ffn_hidden_size", ffn) if experts else None
    scaling = Llama3RopeScaling(factor=given.number("rope_scaling_factor", 8.0))
    epsilon = given.number("layernorm_epsilon", given.number("norm_epsilon", 1e-5))
    try:
        return ModelConfig(
            num_layers=given.whole("num_layers"),
            hidden_size=hidden,
            # Where every layer is a mixture, the dense width means nothing, and Megatron leaves its default there.
            ffn_hidden_size=expert_ffn if expert_ffn and freq == 1 else ffn,
            num_attention_heads=heads,
            num_query_groups=given.whole("num_query_groups", heads) if given.flag("group_query_attention") else heads,
            kv_channels=given.whole("kv_channels", hidden // heads),
            vocab_size=given.whole("vocab_size", None) or given.whole("padded_vocab_size"),
            max_position_embeddings=given.whole("max_position_embeddings", 4096),
            layernorm_epsilon=epsilon,
            rotary_base=given.number("rotary_base", 10000.0),
            rope_scaling=scaling if given.flag("use_rope_scaling") else None,
            window_size=window,
            share_embeddings_and_output_weights=not given.flag("untie_embeddings_and_output_weights"),
            add_qkv_bias=given.flag("add_qkv_bias"),
            qk_layernorm=given.flag("qk_layernorm"),
            init_method_std=given.number("init_method_std", 0.02),
            num_moe_experts=experts,
            moe_ffn_hidden_size=expert_ffn,
            moe_layer_freq=freq,
            moe_router_topk=given.whole("moe_router_topk", 2),
            moe_router_pre_softmax=given.flag("moe_router_pre_softmax"),
            moe_shared_expert_intermediate_size=given.whole("moe_shared_expert_intermediate_size", None),
            moe_shared_expert_gate=given.flag("moe_shared_expert_gate"),
            moe_aux_loss_coeff=given.number("moe_aux_loss_coeff", 0.0) if experts else 0.0,
        )
    except BadInputError as error:
        raise BadInputError(f"{where}: the args describe no model: {error}") from error


_REQUIRED: Any = object()


class _Arguments:
    """Arguments by name and kind. Each method raises BadInputError that names the argument and its value."""

    def __init__(self, args: Namespace, where: str) -> None:
        self._args, self._where = args, where

    def whole(self, name: str, default: Any = _REQUIRED) -> Any:
        """A whole number from 1; the default where it is missing or None."""
        value = getattr(self._args, name, None)
        if value is None:
            if default is _REQUIRED:
                raise BadInputError(
                    f"{self._where}: args.{name} is missing; give the model's config.json with --hf-config"
                )
            return default
        if type(value) is not int or value < 1:
            raise self._wrong(name, "a whole number from 1")
        return value

    def number(self, name: str, default: float) -> float:
        """A number; aux losses are lists in some runs, of which the first is the coefficient."""
        value: Any = getattr(self._args, name, None)
        if isinstance(value, list) and value:
            value = cast(list[Any], value)[0]
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, "a number")
        try:
            return float(value)
        except OverflowError:
            raise self._wrong(name, "a number") from None

    def flag(self, name: str) -> bool:
        """True or False; False where it is missing or None."""
        value = getattr(self._args, name, None)
        if value not in (True, False, None):
            raise self._wrong(name, "True or False")
        return bool(value)

    def frequency(self) -> int | tuple[int, ...]:
        """moe_layer_freq: a whole number, or a list of ones and zeros."""
        value: Any = getattr(self._args, "moe_layer_freq", None)
        if isinstance(value, list | tuple):
            return tuple(value)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        return self.whole("moe_layer_freq", 1)

    def window(self) -> int | None:
        """window_size as Megatron has it, (tokens before, tokens after), as tokens with the token itself."""
        value: Any = getattr(self._args, "window_size", None)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or len(value) != 2 or type(value[0]) is not int:  # pyright: ignore
            raise self._wrong("window_size", "a pair (tokens before, 0)")
        return value[0] + 1

    def _wrong(self, name: str, expected: str) -> BadInputError:
        return BadInputError(f"{self._where}: args.{name} is {told(getattr(self._args, name))}: expected {expected}")


STRUCTURE = (
    *(
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "layernorm_epsilon",
    ),
    *("rotary_base", "window_size", "share_embeddings_and_output_weights", "add_qkv_bias", "qk_layernorm"),
    *("num_moe_experts", "moe_ffn_hidden_size", "moe_router_topk", "moe_router_pre_softmax"),
    *("moe_shared_expert_intermediate_size", "moe_shared_expert_gate"),
)
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
        if getattr(from_hf, name) != getattr(from_args, name)
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


def megatron_notes(config: ModelConfig) -> list[str]:
    """What Megatron-LM cannot be told, or silently computes otherwise, for this model."""
    notes: list[str] = []
    if config.rope_scaling not in (None, MEGATRON_ROPE_SCALING):
        notes.append(
            f"rope scaling is {config.rope_scaling}, but pretrain_gpt.py always computes {MEGATRON_ROPE_SCALING}: "
            "the weights are right, Megatron-LM's positions beyond the original context are not"
        )
    if config.layernorm_epsilon != 1e-5:
        notes.append(
            f"layernorm epsilon is {config.layernorm_epsilon}; --use-checkpoint-args does not copy it: "
            f"pass --norm-epsilon {config.layernorm_epsilon}"
        )
    if config.qk_layernorm:
        notes.append("q and k are normalised; --use-checkpoint-args does not copy that: pass --qk-layernorm")
    if config.moe_shared_expert_gate:
        notes.append(
            "the shared expert is gated; --use-checkpoint-args does not copy that: pass --moe-shared-expert-gate"
        )
    if config.window_size:
        notes.append(
            "attention is windowed; --use-checkpoint-args does not copy that: pass --window-size "
            f"{config.window_size - 1},0"
        )
    return notes
