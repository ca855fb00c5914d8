"""Bytes that one layer keeps between its forward and its backward pass, and the most that it needs beside them.

They are those of the Triton path on a GPU; what it does not cover is computed by torch's own operations, whose
intermediate tensors are counted too, less exactly. (On a CPU some of these keep more: a norm around zero, a window.)

Shapes: T tokens of a micro-batch, S sequence length, H hidden_size, N heads, G query groups, D head dim, E experts,
K top-k, R routed rows, F ffn width, O rows of fc1.
"""

from __future__ import annotations

from dataclasses import dataclass

from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.trainer.activation_memory import Recompute
from ckptbridge.trainer.activations import fc1_rows, is_swiglu
from ckptbridge.trainer.mixture import fused_activation

_FLOAT, _INDEX = 4, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What the sizes of activations depend on beside the model."""

    tokens: int
    length: int
    element: int
    """Bytes of a number."""
    rows: int
    """Routed rows R; those of a buffer that is padded to its capacity."""
    rounds_expert_gradients: bool
    """Whether the gradient of the experts' matrices is first made whole in the weights' dtype."""
    gathers_gradient: bool
    """Whether products of the backward pass read routed rows where they stand, without a sorted copy."""


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """What a layer keeps, what of it selective recompute spares, and what its backward pass needs for a while."""

    kept: int
    spared: int
    temporary: int

    def held(self, recompute: Recompute, inputs: int) -> int:
        """What is kept under a choice of recompute; `inputs` are the bytes of the layer's inputs."""
        return {"none": self.kept, "selective": self.kept - self.spared, "full": inputs}[recompute]


def layer_bytes(config: ModelConfig, layer: int, shape: Shape) -> LayerBytes:
    """The bytes of one layer of a model."""
    attention = _latent_attention(config, shape) if config.multi_latent_attention else _attention(config, layer, shape)
    mixture = config.is_moe_layer(layer)
    mlp = _mixture(config, shape) if mixture else _mlp(config, shape.tokens, config.ffn_hidden_size, shape)
    norms = _norms(config, shape)
    return LayerBytes(
        kept=attention.kept + mlp.kept + norms.kept,
        spared=mlp.spared + norms.spared,
        # Gradients of the stream and of what is added to it wait; parts of a layer take turns.
        temporary=3 * shape.tokens * config.hidden_size * shape.element + max(attention.temporary, mlp.temporary),
    )


def _norms(config: ModelConfig, shape: Shape) -> LayerBytes:
    """Two norms: the stream before each, what they gave, and 1/rms; of others than Llama's fp32 copies instead.

    Those copies stay under selective recompute, and with them the input that is to be normed again: nothing is spared.
    """
    rows = shape.tokens * config.hidden_size
    is_plain = config.normalization == "RMSNorm" and not config.layernorm_zero_centered_gamma
    if config.normalization == "LayerNorm":
        each = rows * _FLOAT + 2 * shape.tokens * _FLOAT
    elif config.layernorm_zero_centered_gamma:
        each = rows * _FLOAT + shape.tokens * _FLOAT
    else:
        each = rows * shape.element + shape.tokens * _FLOAT
    given = rows * shape.element if config.pre_layernorm else 0
    behind = 2 * each if config.post_layernorm else 0
    return LayerBytes(2 * (each + given) + behind, 2 * given if is_plain else 0, 0)


def _attention(config: ModelConfig, layer: int, shape: Shape) -> LayerBytes:
    T, D, e = shape.tokens, config.kv_channels, shape.element
    heads, packed = config.num_attention_heads, config.num_attention_heads + 2 * config.num_query_groups
    # Queries, keys, values, the output, and the logarithm of each row's sum.
    kept = T * (packed + heads) * D * e + T * heads * _FLOAT
    if config.qk_layernorm:
        kept += T * packed * D * e + T * (heads + config.num_query_groups) * _FLOAT
    # The output's gradient, those of queries, keys and values, then packed; cuDNN sums that of queries in fp32.
    temporary = T * D * (e * (heads + 2 * packed) + heads * _FLOAT)
    scores = T * heads * shape.length
    if config.softmax_type == "learnable" or config.attn_logit_softcapping is not None:
        kept += scores * (_FLOAT + e + (_FLOAT if config.attn_logit_softcapping is not None else 0))
        temporary += 2 * scores * _FLOAT
    elif config.has_window(layer) and (config.window_size or shape.length) < shape.length:
        # Keys and values once for each head of queries, and the mask as numbers.
        repeated = 2 * T * (heads - config.num_query_groups) * D * e
        kept += repeated + shape.length * shape.length * e
        temporary += repeated + shape.length * shape.length
    return LayerBytes(kept, 0, temporary)


def _latent_attention(config: ModelConfig, shape: Shape) -> LayerBytes:
    T, N, e = shape.tokens, config.num_attention_heads, shape.element
    latent, value, width = config.kv_lora_rank or 0, config.v_head_dim or 0, config.kv_channels
    # The latent cut out, normed, and projected; queries likewise; both put together with what turns; the output.
    channels = 2 * latent + N * ((config.qk_head_dim or 0) + value) + 2 * N * width + N * value
    channels += 2 * (config.q_lora_rank or 0)
    return LayerBytes(
        T * channels * e + T * N * _FLOAT, T * latent * e, T * N * (e * (4 * width + 3 * value) + _FLOAT * width)
    )


def _mlp(config: ModelConfig, rows: int, ffn: int, shape: Shape) -> LayerBytes:
    """What fc1 gave and what became of it; the definitions of other functions than SwiGLU keep fp32 copies instead."""
    e, outputs = shape.element, fc1_rows(config, ffn)
    given, temporary = rows * ffn * e, rows * (outputs + ffn) * e
    if is_swiglu(config):
        return LayerBytes(rows * outputs * e + given, given, given)  # fc1's gradient stands where fc1's output stood
    wide = rows * outputs * _FLOAT * (2 if config.gated_linear_unit else 1)
    return LayerBytes(wide + given, 0, wide + temporary)


def _mixture(config: ModelConfig, shape: Shape) -> LayerBytes:
    T, R, H, e = shape.tokens, shape.rows, config.hidden_size, shape.element
    E, K, F = config.num_moe_experts or 0, config.moe_router_topk, config.moe_ffn_hidden_size or 0
    outputs = fc1_rows(config, F)
    # Logits, experts and weights of each choice, and the order of the rows.
    kept, spared = T * E * _FLOAT + T * K * (_INDEX + _FLOAT) + (R + T * K) * _INDEX, 0
    if fused_activation(config) is not None:
        kept += R * outputs * e  # what fc1 gave
    else:
        alike = _mlp(config, R, F, shape)
        kept, spared = kept + alike.kept + 2 * R * H * e, alike.spared
    gathered_rows = 0 if shape.gathers_gradient else R * H * e
    gradient = E * H * e if shape.rounds_expert_gradients else 0
    temporary = max(
        gathered_rows + R * F * e + gradient * F,  # the output's gradient by row, through fc2
        R * H * e + gradient * outputs,  # x by row, for fc1's gradient
        R * H * e,  # the gradient of x by row
        R * (F + H) * e,  # forward: hidden units, and what fc2 makes of them
    )
    if shared := config.moe_shared_expert_intermediate_size:
        alike = _mlp(config, T, shared, shape)
        kept, spared, temporary = kept + alike.kept, spared + alike.spared, max(temporary, alike.temporary)
        if config.moe_shared_expert_gate:
            kept += T * (H + 1) * e
    return LayerBytes(kept, spared, temporary)
