"""What a checkpoint's arguments say of the model: Megatron-LM's own, or those that `make_args` made."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields
from math import isclose
from typing import Any, cast

from torch import Tensor

from ckptbridge.converters.errors import BadInputError, NotSupportedError, told
from ckptbridge.converters.mcore.args import BEYOND, SAME_WHERE_SET, TOLD_BY_ARGUMENTS
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.rope_scaling import KINDS, LinearRopeScaling, Llama3RopeScaling, RopeScaling, YarnRopeScaling

_MUST: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("rope", "yarn"),
    "rotary_interleaved": (False, None),
    "moe_latent_size": (None,),
    "no_rope_freq": (None, 0),
    "qk_l2_norm": (False, None),
    "apply_residual_connection_post_layernorm": (False, None),
    "moe_apply_probs_on_input": (False, None),
    "attention_output_gate": (False, None),
    "experimental_attention_variant": (None,),
}
"""Arguments that change the computation, and the values that this version computes."""


def config_from_args(args: Namespace, where: str) -> ModelConfig:
    """The model that a checkpoint's arguments describe.

    Raises NotSupportedError naming an argument whose value is not supported, BadInputError naming one that
    is missing.
    """
    # No argument is a tensor, and a tensor compares with nothing.
    args = Namespace(**{name: "a tensor" if isinstance(value, Tensor) else value for name, value in vars(args).items()})
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
    epsilon = given.number("layernorm_epsilon", given.number("norm_epsilon", 1e-5))
    try:
        return ModelConfig(
            num_layers=given.whole("num_layers"),
            hidden_size=hidden,
            # Where every layer is a mixture, the dense width means nothing, and Megatron leaves its default there.
            ffn_hidden_size=expert_ffn if expert_ffn and freq == 1 else ffn,
            num_attention_heads=heads,
            num_query_groups=given.whole("num_query_groups", heads) if given.flag("group_query_attention") else heads,
            kv_channels=_head(given, hidden // heads),
            vocab_size=given.whole("vocab_size", None) or given.whole("padded_vocab_size"),
            max_position_embeddings=given.whole("max_position_embeddings", 4096),
            layernorm_epsilon=epsilon,
            rotary_base=given.number("rotary_base", 10000.0),
            window_size=window,
            share_embeddings_and_output_weights=not given.flag("untie_embeddings_and_output_weights"),
            add_qkv_bias=given.flag("add_qkv_bias") or given.flag("add_bias_linear"),
            qk_layernorm=given.flag("qk_layernorm"),
            init_method_std=given.number("init_method_std", 0.02),
            num_moe_experts=experts,
            moe_ffn_hidden_size=expert_ffn,
            moe_layer_freq=freq,
            moe_router_topk=given.whole("moe_router_topk", 2),
            moe_router_pre_softmax=given.flag("moe_router_pre_softmax") and not _always_divides(args),
            moe_shared_expert_intermediate_size=given.whole("moe_shared_expert_intermediate_size", None),
            moe_shared_expert_gate=given.flag("moe_shared_expert_gate"),
            moe_aux_loss_coeff=given.number("moe_aux_loss_coeff", 0.0) if experts else 0.0,
            **_further(args, given, experts is not None, where),
        )
    except NotSupportedError:
        raise
    except BadInputError as error:
        raise BadInputError(f"{where}: the args describe no model: {error}") from error


def _head(given: _Arguments, default: int) -> int:
    """The width of a head: of latent attention Megatron has it in two parts, and another number in kv_channels."""
    if given.flag("multi_latent_attention"):
        return given.whole("qk_head_dim", 128) + given.whole("qk_pos_emb_head_dim", 64)
    return given.whole("kv_channels", default)


def _always_divides(args: Namespace) -> bool:
    """Whether these are Megatron's own arguments of a sigmoid router, which asks nobody."""
    own = not isinstance(getattr(args, BEYOND, None), dict)
    return own and getattr(args, "moe_router_score_function", None) == "sigmoid"


def _further(args: Namespace, given: _Arguments, has_experts: bool, where: str) -> dict[str, Any]:
    """The fields that not every model has: from what was kept of them, or from Megatron's own arguments."""
    if isinstance(kept := getattr(args, BEYOND, None), dict):
        scaling = {"rope_scaling": _scaling(given)} if given.flag("use_rope_scaling") else {}
        return scaling | _kept(cast(dict[str, Any], kept), where)
    made: dict[str, Any] = {name: value for name in SAME_WHERE_SET if (value := getattr(args, name, None)) is not None}
    if not made.get("multi_latent_attention"):
        for name in ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"):
            made.pop(name, None)  # Megatron-LM has defaults for them, whatever the attention is
    if not has_experts:
        for name in [name for name in made if name.startswith("moe_")]:
            del made[name]
    if made.get("moe_router_num_groups") == 1:
        made |= {"moe_router_num_groups": None, "moe_router_group_topk": None}
    if made.get("moe_router_topk_scaling_factor") == 1.0:
        del made["moe_router_topk_scaling_factor"]
    biases = given.flag("add_bias_linear")
    made |= {"add_proj_bias": biases, "add_mlp_bias": biases, "add_router_bias": biases and has_experts}
    made |= _activation(given)
    made["layernorm_zero_centered_gamma"] = given.flag("layernorm_zero_centered_gamma") or given.flag(
        "apply_layernorm_1p"
    )
    made["window_layers"] = given.window_layers()
    made["mtp_num_layers"] = given.whole("mtp_num_layers", 0) if getattr(args, "mtp_num_layers", None) else 0
    made["rope_scaling"] = _scaling(given)
    return made | (_multipliers(given, where) if given.flag("use_mup") else {})


def _multipliers(given: _Arguments, where: str) -> dict[str, Any]:
    """What muP changes in a model: of another width than its base, more than is known here."""
    hidden, heads = given.whole("hidden_size"), given.whole("num_attention_heads")
    for name, known in (("mup_base_hidden_size", hidden), ("mup_attn_scale_power", 1.0)):
        if (found := getattr(given.args, name, None)) not in (None, known):
            raise NotSupportedError(f"{where}: args.{name} is {told(found)}; supported: {known}")
    base_head, output = given.positive("mup_base_head_dim", 1.0), given.positive("mup_output_mult", 1.0)
    channels = given.whole("kv_channels", hidden // heads)
    scale = base_head**0.5 / channels
    return {
        "embedding_multiplier": given.number("mup_embedding_mult", 1.0),
        "logits_divisor": 1 / output,
        "softmax_scale": None if isclose(scale, channels**-0.5, rel_tol=1e-12) else scale,
    }


def _activation(given: _Arguments) -> dict[str, Any]:
    if given.flag("squared_relu"):
        return {"gated_linear_unit": False, "activation_func": "squared_relu"}
    if given.flag("quick_geglu"):
        return {"gated_linear_unit": True, "activation_func": "quick_gelu"}
    if given.flag("swiglu"):
        return {"gated_linear_unit": True, "activation_func": "silu"}
    return {"gated_linear_unit": False, "activation_func": "gelu"}


def _scaling(given: _Arguments) -> RopeScaling | None:
    if given.flag("use_rope_scaling"):
        return Llama3RopeScaling(factor=given.number("rope_scaling_factor", 8.0))
    if factor := given.number("rotary_seq_len_interpolation_factor", 0.0):
        return LinearRopeScaling(factor=factor)
    latent = given.flag("multi_latent_attention") and given.word("rope_type") == "yarn"
    if not latent and given.word("position_embedding_type") != "yarn":
        return None
    prefix = "" if latent else "yarn_"

    def number(name: str, default: float) -> float:
        """Megatron-LM has arguments of its own with the prefix for some of them only."""
        return given.number(prefix + name, given.number(name, default))

    mscale, mscale_all_dim = number("mscale", 1.0), number("mscale_all_dim", 0.0)
    truncate = getattr(given.args, "yarn_correction_range_round_to_int", None)
    return YarnRopeScaling(
        factor=number("rotary_scaling_factor", 40.0 if latent else 1.0),
        original_max_position_embeddings=given.whole(f"{prefix}original_max_position_embeddings", 4096),
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        # Megatron's defaults compute what a config without them means.
        mscale=None if (mscale, mscale_all_dim) == (1.0, 0.0) else mscale,
        mscale_all_dim=None if (mscale, mscale_all_dim) == (1.0, 0.0) else mscale_all_dim,
        truncate=latent or truncate is None or given.flag("yarn_correction_range_round_to_int"),
    )


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Lists, as plain values have them, as the tuples that they were."""
    return {name: tuple(cast(list[Any], v)) if isinstance(v, list) else v for name, v in values.items()}


def _kept(kept: dict[str, Any], where: str) -> dict[str, Any]:
    names = {field.name for field in fields(ModelConfig)} - TOLD_BY_ARGUMENTS
    if strange := sorted(str(name) for name in kept if name not in names):
        raise NotSupportedError(f"{where}: args.{BEYOND} names {told(strange)}, which this version does not read there")
    made = _tuples(kept)
    if isinstance(scaling := kept.get("rope_scaling"), dict):
        told_of = dict(cast(dict[str, Any], scaling))
        kind = KINDS.get(str(told_of.pop("kind", None)))
        if kind is None:
            raise BadInputError(f"{where}: args.{BEYOND} holds rope_scaling {told(scaling)}")
        try:
            made["rope_scaling"] = kind(**_tuples(told_of))
        except TypeError as error:
            raise BadInputError(f"{where}: args.{BEYOND}, rope_scaling: {error}") from error
    return made


_REQUIRED: Any = object()


class _Arguments:
    """Arguments by name and kind. Each method raises BadInputError that names the argument and its value."""

    def __init__(self, args: Namespace, where: str) -> None:
        self.args, self._where = args, where

    def whole(self, name: str, default: Any = _REQUIRED) -> Any:
        """A whole number from 1; the default where it is missing or None."""
        value = getattr(self.args, name, None)
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
        value: Any = getattr(self.args, name, None)
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

    def positive(self, name: str, default: float) -> float:
        """A number above 0."""
        value = self.number(name, default)
        if not value > 0:
            raise self._wrong(name, "a number above 0")
        return value

    def word(self, name: str) -> str | None:
        """A word; None where it is missing."""
        value = getattr(self.args, name, None)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, "a word")
        return value

    def flag(self, name: str) -> bool:
        """True or False; False where it is missing or None."""
        value = getattr(self.args, name, None)
        if value not in (True, False, None):
            raise self._wrong(name, "True or False")
        return bool(value)

    def frequency(self) -> int | tuple[int, ...]:
        """moe_layer_freq: a whole number, or a list of ones and zeros."""
        value: Any = getattr(self.args, "moe_layer_freq", None)
        if isinstance(value, list | tuple):
            return tuple(value)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        return self.whole("moe_layer_freq", 1)

    def window(self) -> int | None:
        """window_size as Megatron has it, (tokens before, tokens after), as tokens with the token itself."""
        value: Any = getattr(self.args, "window_size", None)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or len(value) != 2 or type(value[0]) is not int:  # pyright: ignore
            raise self._wrong("window_size", "a pair (tokens before, 0)")
        return value[0] + 1

    def window_layers(self) -> tuple[int, ...] | None:
        """window_attn_skip_freq: a list with a 1 for each windowed layer, or the distance of those that have none."""
        value: Any = getattr(self.args, "window_attn_skip_freq", None)
        if value is None:
            return None
        if isinstance(value, list | tuple):
            return tuple(value)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        freq: int = self.whole("window_attn_skip_freq")
        return tuple(int(number % freq != 0) for number in range(1, self.whole("num_layers") + 1))

    def _wrong(self, name: str, expected: str) -> BadInputError:
        return BadInputError(f"{self._where}: args.{name} is {told(getattr(self.args, name))}: expected {expected}")
