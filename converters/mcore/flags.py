"""What Megatron-LM's pretrain_gpt.py must be told to build a model: command-line flags from a ModelConfig.

`--use-checkpoint-args` copies some arguments from the checkpoint (megatron-core 0.19,
`checkpointing.load_args_from_checkpoint`); the others keep the parser's defaults, which are silently wrong for many
models. FLAGS says how each field is told, COPIED which flags the checkpoint's arguments make unnecessary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.rope_scaling import LinearRopeScaling, Llama3RopeScaling, YarnRopeScaling

Flag = tuple[str, ...]
"""A flag and its values."""
Says = Callable[[ModelConfig], list[Flag]]


_DEFAULTS = {field.name: field.default for field in fields(ModelConfig)}


def _value(name: str, field: str) -> Says:
    """The flag with the field's value; nothing for the default, which is also that of Megatron's parser."""

    def flags(config: ModelConfig) -> list[Flag]:
        value = getattr(config, field)
        return [] if value == _DEFAULTS[field] else [(name, _written(value))]

    return flags


def _switch(name: str, field: str, when: bool = True) -> Says:
    """The flag alone, where the field has one value."""
    return lambda config: [(name,)] if getattr(config, field) is when else []


def _written(value: object) -> str:
    if isinstance(value, tuple):
        return str(list(value)).replace(" ", "")  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # --rotary-base and the interpolation factor are whole numbers to Megatron's parser
    return str(value)


def _groups(config: ModelConfig) -> list[Flag]:
    if config.multi_latent_attention:  # Megatron-LM refuses both together
        return []
    return [("--group-query-attention",), ("--num-query-groups", str(config.num_query_groups))]


def _length(config: ModelConfig) -> list[Flag]:
    longest = str(config.max_position_embeddings)
    return [("--max-position-embeddings", longest), ("--seq-length", longest)]


def _window(config: ModelConfig) -> list[Flag]:
    return [("--window-size", f"{config.window_size - 1},0")] if config.window_size else []


def _biases(config: ModelConfig) -> list[Flag]:
    return [] if config.add_proj_bias and config.add_mlp_bias else [("--disable-bias-linear",)]


def _activation(config: ModelConfig) -> list[Flag]:
    flag = {
        (True, "silu"): "--swiglu",
        (True, "quick_gelu"): "--quick-geglu",
        (False, "squared_relu"): "--squared-relu",
        (False, "gelu"): "--no-bias-gelu-fusion",  # the default activation; its fusion computes gelu_tanh
    }.get((config.gated_linear_unit, config.activation_func))
    return [(flag,)] if flag else []


def _multipliers(config: ModelConfig) -> list[Flag]:
    """Megatron has them as parts of muP. Relative to this width it is the identity, but for what is said here."""
    scale = config.softmax_scale
    if config.embedding_multiplier == 1 and config.logits_divisor == 1 and scale is None:
        return []
    # The scale of scores is sqrt(base head) / kv_channels there.
    base_head = config.kv_channels if scale is None else (scale * config.kv_channels) ** 2
    told: list[Flag] = [("--use-mup",), ("--mup-base-head-dim", str(base_head))]
    if config.embedding_multiplier != 1:
        told.append(("--mup-embedding-mult", str(config.embedding_multiplier)))
    if config.logits_divisor != 1:
        told.append(("--mup-output-mult", str(1 / config.logits_divisor)))
    return told


def _experts(config: ModelConfig) -> list[Flag]:
    return [
        ("--num-experts", str(config.num_moe_experts)),
        ("--moe-grouped-gemm",),
        ("--moe-router-dtype", "fp32"),
        ("--moe-token-dispatcher-type", "alltoall"),
    ]


def _mtp(config: ModelConfig) -> list[Flag]:
    return [("--mtp-num-layers", str(config.mtp_num_layers))] if config.mtp_num_layers else []


def _rope(config: ModelConfig) -> list[Flag]:
    scaling = config.rope_scaling
    if isinstance(scaling, YarnRopeScaling):
        return _yarn(scaling, latent=config.multi_latent_attention)
    plain: list[Flag] = [("--position-embedding-type", "rope")]
    if config.multi_latent_attention:
        plain += [("--rope-type", "rope"), ("--no-rope-fusion",)]  # the fused one knows YaRN only
    if isinstance(scaling, Llama3RopeScaling):
        plain += [("--use-rope-scaling",), ("--rope-scaling-factor", _written(scaling.factor))]
    elif isinstance(scaling, LinearRopeScaling) and float(scaling.factor).is_integer():
        plain += [("--rotary-seq-len-interpolation-factor", _written(scaling.factor))]
    return plain


def _yarn(scaling: YarnRopeScaling, *, latent: bool) -> list[Flag]:
    both = scaling.mscale is not None and scaling.mscale_all_dim is not None
    told: list[Flag] = [
        ("--position-embedding-type", "rope" if latent else "yarn"),
        *([("--rope-type", "yarn")] if latent else []),
        ("--rotary-scaling-factor", _written(scaling.factor)),
    ]
    if both and scaling.mscale != 1:
        told.append(("--mscale", str(scaling.mscale)))
    if both and scaling.mscale_all_dim != 0:
        told.append(("--mscale-all-dim", str(scaling.mscale_all_dim)))
    if latent:  # whose other numbers no flag says
        return told
    told.append(("--yarn-original-max-position-embeddings", str(scaling.original_max_position_embeddings)))
    if scaling.beta_fast != 32:
        told.append(("--yarn-beta-fast", str(scaling.beta_fast)))
    if scaling.beta_slow != 1:
        told.append(("--yarn-beta-slow", str(scaling.beta_slow)))
    if not scaling.truncate:
        told.append(("--no-yarn-correction-range-round-to-int",))
    return told


FLAGS: dict[str, Says] = {
    "num_layers": _value("--num-layers", "num_layers"),
    "hidden_size": _value("--hidden-size", "hidden_size"),
    "ffn_hidden_size": _value("--ffn-hidden-size", "ffn_hidden_size"),
    "num_attention_heads": _value("--num-attention-heads", "num_attention_heads"),
    "num_query_groups": _groups,
    "kv_channels": _value("--kv-channels", "kv_channels"),
    "vocab_size": _value("--vocab-size", "vocab_size"),
    "max_position_embeddings": _length,
    "layernorm_epsilon": lambda config: [("--norm-epsilon", str(config.layernorm_epsilon))],
    "rotary_base": _value("--rotary-base", "rotary_base"),
    "rope_scaling": _rope,
    "rotary_percent": _value("--rotary-percent", "rotary_percent"),
    "window_size": _window,
    "window_layers": _value("--window-attn-skip-freq", "window_layers"),
    "softmax_type": _value("--softmax-type", "softmax_type"),
    "share_embeddings_and_output_weights": _switch(
        "--untie-embeddings-and-output-weights", "share_embeddings_and_output_weights", when=False
    ),
    "add_qkv_bias": _switch("--add-qkv-bias", "add_qkv_bias"),
    "add_proj_bias": _biases,
    "qk_layernorm": _switch("--qk-layernorm", "qk_layernorm"),
    "normalization": lambda config: [("--normalization", config.normalization)],
    "layernorm_zero_centered_gamma": _switch("--apply-layernorm-1p", "layernorm_zero_centered_gamma"),
    "activation_func": _activation,
    "glu_linear_offset": _value("--glu-linear-offset", "glu_linear_offset"),
    "activation_func_clamp_value": _value("--activation-func-clamp-value", "activation_func_clamp_value"),
    "embedding_multiplier": _multipliers,
    "init_method_std": _value("--init-method-std", "init_method_std"),
    "multi_latent_attention": _switch("--multi-latent-attention", "multi_latent_attention"),
    "q_lora_rank": _value("--q-lora-rank", "q_lora_rank"),
    "kv_lora_rank": _value("--kv-lora-rank", "kv_lora_rank"),
    "qk_head_dim": _value("--qk-head-dim", "qk_head_dim"),
    "qk_pos_emb_head_dim": _value("--qk-pos-emb-head-dim", "qk_pos_emb_head_dim"),
    "v_head_dim": _value("--v-head-dim", "v_head_dim"),
    "num_moe_experts": _experts,
    "moe_ffn_hidden_size": _value("--moe-ffn-hidden-size", "moe_ffn_hidden_size"),
    "moe_layer_freq": _value("--moe-layer-freq", "moe_layer_freq"),
    "moe_router_topk": _value("--moe-router-topk", "moe_router_topk"),
    "moe_router_pre_softmax": _switch("--moe-router-pre-softmax", "moe_router_pre_softmax"),
    "moe_router_score_function": _value("--moe-router-score-function", "moe_router_score_function"),
    "moe_router_enable_expert_bias": _switch("--moe-router-enable-expert-bias", "moe_router_enable_expert_bias"),
    "moe_router_topk_scaling_factor": _value("--moe-router-topk-scaling-factor", "moe_router_topk_scaling_factor"),
    "moe_router_num_groups": _value("--moe-router-num-groups", "moe_router_num_groups"),
    "moe_router_group_topk": _value("--moe-router-group-topk", "moe_router_group_topk"),
    "moe_shared_expert_intermediate_size": _value(
        "--moe-shared-expert-intermediate-size", "moe_shared_expert_intermediate_size"
    ),
    "moe_shared_expert_gate": _switch("--moe-shared-expert-gate", "moe_shared_expert_gate"),
    "moe_aux_loss_coeff": _value("--moe-aux-loss-coeff", "moe_aux_loss_coeff"),
    "mtp_num_layers": _mtp,
}
"""How each field is told. Where Megatron has one argument for several fields, the first of them has the row."""

TOLD_BY_ANOTHER = {
    "gated_linear_unit": "activation_func",
    "add_mlp_bias": "add_proj_bias",
    "add_router_bias": "add_proj_bias",
    "softmax_scale": "embedding_multiplier",
    "logits_divisor": "embedding_multiplier",
}
"""Fields that another field's row tells of."""

_WHATEVER_THE_MODEL: tuple[Flag, ...] = (
    ("--attention-dropout", "0.0"),
    ("--hidden-dropout", "0.0"),
    ("--attention-softmax-in-fp32",),
)

COPIED = frozenset(
    (
        *("--num-layers", "--hidden-size", "--ffn-hidden-size", "--seq-length", "--num-attention-heads"),
        *("--num-query-groups", "--group-query-attention", "--kv-channels", "--max-position-embeddings"),
        *("--position-embedding-type", "--rotary-base", "--rotary-percent", "--disable-bias-linear", "--add-qkv-bias"),
        *("--squared-relu", "--swiglu", "--untie-embeddings-and-output-weights", "--normalization"),
        *("--attention-dropout", "--hidden-dropout", "--mtp-num-layers", "--num-experts", "--moe-layer-freq"),
        *("--moe-ffn-hidden-size", "--moe-router-topk", "--moe-router-pre-softmax", "--moe-grouped-gemm"),
        *("--moe-shared-expert-intermediate-size", "--moe-router-score-function", "--moe-router-enable-expert-bias"),
        *("--moe-router-topk-scaling-factor", "--vocab-size"),
    )
)
"""Flags that `--use-checkpoint-args` makes unnecessary. megatron-core 0.19 also copies `apply_layernorm_1p`, but
into an argument that it no longer reads."""


def model_flags(config: ModelConfig, *, copied: bool) -> list[Flag]:
    """The flags that describe a model, without those in COPIED where the checkpoint's arguments are `copied`.

    What no flag can say is not among them: `megatron_notes` names it.
    """
    told = [flag for field, says in FLAGS.items() if _concerns(field, config) for flag in says(config)]
    return [flag for flag in (*told, *_WHATEVER_THE_MODEL) if not (copied and flag[0] in COPIED)]


def _concerns(field: str, config: ModelConfig) -> bool:
    return config.num_moe_experts is not None or not (field.startswith("moe_") or field == "num_moe_experts")


def layout_flags(layout: ParallelLayout, config: ModelConfig) -> list[Flag]:
    """The flags that cut a model: none of them is copied without a flag that copies all degrees but ETP."""
    flags: list[Flag] = [
        ("--tensor-model-parallel-size", str(layout.tp)),
        ("--pipeline-model-parallel-size", str(layout.pp)),
    ]
    if layout.vpp > 1:
        flags.append(("--num-virtual-stages-per-pipeline-rank", str(layout.vpp)))
    if layout.first_stage_layers is not None:
        flags.append(("--decoder-first-pipeline-num-layers", str(layout.first_stage_layers)))
    if layout.last_stage_layers is not None:
        flags.append(("--decoder-last-pipeline-num-layers", str(layout.last_stage_layers)))
    if config.num_moe_experts is not None:
        flags.append(("--expert-model-parallel-size", str(layout.ep)))
        flags.append(("--expert-tensor-parallel-size", str(layout.expert_tp)))
        if layout.tp > 1:
            flags.append(("--sequence-parallel",))  # Megatron does not train experts under TP without it
    return flags
