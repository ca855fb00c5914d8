"""What a model is, in Megatron-Core's words: the one value that tables, layouts and the decoder share."""

from __future__ import annotations

from dataclasses import dataclass

from ckptbridge.converters.errors import BadInputError, told
from ckptbridge.converters.field_kinds import check_kinds
from ckptbridge.converters.rope_scaling import LongRopeScaling, RopeScaling

_FROM_ONE = (
    *("max_position_embeddings", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "window_size"),
    *("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
    *("moe_router_num_groups", "moe_router_group_topk"),
)
_MOST_LAYERS, _MOST_EXPERTS_IN_ALL = 10_000, 200_000
"""A trillion parameters are 61 layers of 384 experts; far more is a spoiled number, and would take hours to list."""


_CHOICES = {
    "normalization": ("RMSNorm", "LayerNorm"),
    "activation_func": ("silu", "gelu", "gelu_tanh", "quick_gelu", "squared_relu"),
    "softmax_type": ("vanilla", "learnable"),
    "moe_router_score_function": ("softmax", "sigmoid"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only model. Field names and meanings are those of Megatron-Core's TransformerConfig.

    Raises BadInputError when built with values that no model can have.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int = 4096
    layernorm_epsilon: float = 1e-5
    rotary_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rotary_percent: float = 1.0
    """The part of a head's channels, from the first on, that turns with the position."""
    local_rotary_base: float | None = None
    """The base in layers with a window, where it is another one; those layers have no `rope_scaling` then."""
    window_size: int | None = None
    """How many tokens a token attends to, itself included; None is all before it."""
    window_layers: tuple[int, ...] | None = None
    """A 1 for each layer that has the window, a 0 for each that attends to all; None: every layer has it."""
    softmax_type: str = "vanilla"
    """learnable: a learned number for each head joins the softmax and takes its share (a sink)."""
    softmax_scale: float | None = None
    """What scores are multiplied by; None is 1 / sqrt(kv_channels)."""
    attn_logit_softcapping: float | None = None
    share_embeddings_and_output_weights: bool = False
    add_qkv_bias: bool = False
    add_proj_bias: bool = False
    add_mlp_bias: bool = False
    """fc1 and fc2 of dense layers and of experts."""
    add_router_bias: bool = False
    add_output_layer_bias: bool = False
    qk_layernorm: bool = False
    qk_layernorm_whole: bool = False
    """Queries are normalised over all heads together, and keys; not head by head."""
    normalization: str = "RMSNorm"
    """LayerNorm: with a bias."""
    layernorm_zero_centered_gamma: bool = False
    """Stored norm weights are what has to be added to one."""
    pre_layernorm: bool = True
    """Attention and MLP get a normed input."""
    post_layernorm: bool = False
    """What attention and MLP add to the residual stream is normed first."""
    gated_linear_unit: bool = True
    activation_func: str = "silu"
    glu_linear_offset: float = 0.0
    """Added to the linear half of a gated unit (GPT-OSS: 1)."""
    activation_func_clamp_value: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    final_logit_softcapping: float | None = None
    init_method_std: float = 0.02

    multi_latent_attention: bool = False
    """DeepSeek's: keys and values come from a latent of `kv_lora_rank`, queries from one of `q_lora_rank` or, where
    that is None, from the hidden state. A head is `qk_head_dim` channels without position and `qk_pos_emb_head_dim`
    that turn; kv_channels is their sum."""
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_head_dim: int | None = None
    qk_pos_emb_head_dim: int | None = None
    v_head_dim: int | None = None

    num_moe_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
    moe_layer_freq: int | tuple[int, ...] = 1
    """1: every layer is a mixture; a tuple holds a 1 for each layer that is one, a 0 for each dense layer."""
    moe_router_topk: int = 2
    moe_router_pre_softmax: bool = False
    """True: softmax over all experts, then top-k, weights as they are. False: the top-k weights sum to one."""
    moe_router_score_function: str = "softmax"
    """sigmoid: scores are sigmoids, and the chosen ones are divided by their sum where pre_softmax is False."""
    moe_router_enable_expert_bias: bool = False
    """A learned number for each expert decides, together with its score, who is chosen; it weighs nothing."""
    moe_router_topk_scaling_factor: float | None = None
    moe_router_num_groups: int | None = None
    moe_router_group_topk: int | None = None
    """Experts are chosen from so many of `moe_router_num_groups` groups."""
    moe_router_group_max: bool = False
    """A group is as good as its best expert (DeepSeek-V2), not as its best two together (V3)."""
    moe_router_sparse_mixer: bool = False
    """PhiMoE's choice of two experts, each weighed among the scores that are close to the largest."""
    moe_router_jitter: float = 0.0
    """How close that is."""
    moe_shared_expert_intermediate_size: int | None = None
    moe_shared_expert_gate: bool = False
    moe_aux_loss_coeff: float = 0.0
    mtp_num_layers: int = 0
    """Layers behind the last one that predict further tokens (multi-token prediction)."""

    def __post_init__(self) -> None:
        check_kinds(self, RopeScaling=RopeScaling.__args__)
        for name, known in _CHOICES.items():
            if (word := getattr(self, name)) not in known:
                raise BadInputError(f"{name} is {told(word)}: known are {', '.join(known)}")
        for name in (
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "vocab_size",
            "ffn_hidden_size",
        ):
            if getattr(self, name) < 1:
                raise BadInputError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in _FROM_ONE:
            if (size := getattr(self, name)) is not None and size < 1:
                raise BadInputError(f"{name} is {size}: it must be at least 1")
        experts = self.num_moe_experts or 0
        if max(self.num_layers, experts) > _MOST_LAYERS or self.num_layers * experts > _MOST_EXPERTS_IN_ALL:
            raise BadInputError(f"num_layers is {self.num_layers} and num_moe_experts {experts}: no model has so many")
        if self.num_attention_heads % self.num_query_groups:
            raise BadInputError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_query_groups "
                f"{self.num_query_groups}"
            )
        for name in ("moe_layer_freq", "window_layers"):
            if not isinstance(getattr(self, name), tuple):
                continue
            layers: tuple[int, ...] = getattr(self, name)
            if len(layers) != self.num_layers:
                raise BadInputError(f"{name} names {len(layers)} layers, but the model has {self.num_layers}")
            if not set(layers) <= {0, 1}:
                raise BadInputError(f"{name} is {told(layers)}: expected a 1 or a 0 for each layer")
        if isinstance(self.rope_scaling, LongRopeScaling):
            for name in ("short_factor", "long_factor"):
                if (count := len(getattr(self.rope_scaling, name))) != self.rotary_dim // 2:
                    raise BadInputError(
                        f"rope_scaling.{name} has {count} factors, but {self.rotary_dim} channels of a head turn"
                    )
        if self.multi_latent_attention:
            _check_latent(self)
        if self.num_moe_experts is not None:
            if not self.moe_ffn_hidden_size:
                raise BadInputError("a model with experts needs moe_ffn_hidden_size, the width of one expert")
            if not 1 <= self.moe_router_topk <= self.num_moe_experts:
                raise BadInputError(
                    f"moe_router_topk is {self.moe_router_topk}: it must lie between 1 and num_moe_experts "
                    f"{self.num_moe_experts}"
                )

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer `layer` (counted from 0) holds a mixture of experts."""
        if self.num_moe_experts is None:
            return False
        layer = min(layer, self.num_layers - 1)  # those that predict further tokens are like the last
        if isinstance(self.moe_layer_freq, tuple):
            return self.moe_layer_freq[layer] == 1
        return layer % self.moe_layer_freq == 0

    @property
    def layers_are_alike(self) -> bool:
        """Whether Megatron stacks the layers under one key.

        It does unless `moe_layer_freq` is a list or an integer above 1 (megatron-core 0.19,
        `TransformerBlock.sharded_state_dict`), even when such a list happens to hold ones only.
        """
        return self.num_moe_experts is None or self.moe_layer_freq == 1

    def has_window(self, layer: int) -> bool:
        """Whether a token of this layer sees `window_size` tokens only."""
        if self.window_size is None:
            return False
        return self.window_layers is None or self.window_layers[min(layer, self.num_layers - 1)] == 1

    @property
    def rotary_dim(self) -> int:
        """How many channels of a head turn with the position."""
        if self.multi_latent_attention:
            return self.qk_pos_emb_head_dim or 0
        return int(self.kv_channels * self.rotary_percent)

    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // self.num_query_groups


def _check_latent(config: ModelConfig) -> None:
    for name in ("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"):
        if getattr(config, name) is None:
            raise BadInputError(f"multi_latent_attention is set, but {name} is missing")
    if config.kv_channels != (config.qk_head_dim or 0) + (config.qk_pos_emb_head_dim or 0):
        raise BadInputError(
            f"kv_channels is {config.kv_channels}, but qk_head_dim {config.qk_head_dim} and qk_pos_emb_head_dim "
            f"{config.qk_pos_emb_head_dim} are a head"
        )
