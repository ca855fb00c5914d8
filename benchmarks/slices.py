"""The four slices that trainers are timed on: layers of published models in their real shapes, a few of them each.

A slice has a vocabulary of 32,768 words, so that its head does not drown its layers, and steps of one micro-batch of
16,384 tokens. What a step has to reach on it, and what memory it may take, stands beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ckptbridge.converters.model_config import ModelConfig

PEAK_TFLOPS = 989.0
"""Dense bf16 products of an H100 or H200 SXM, as NVIDIA states them: what MFU is counted against."""


@dataclass(frozen=True, slots=True)
class Target:
    """A figure to reach, and one to aim at."""

    least: float
    aim: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Layers of one model, and the batch that passes through them.

    Targets are TFLOP/s of model FLOPs; `peak_gib` is with fp32 moments, then with bf16 moments.
    """

    name: str
    config: ModelConfig
    sequence_length: int
    micro_batch_size: int
    forward_backward: Target
    step: Target
    peak_gib: tuple[float, float]

    @property
    def tokens(self) -> int:
        return self.sequence_length * self.micro_batch_size

    def flops(self) -> float:
        """Model FLOPs of one forward and backward pass over the slice's micro-batch: three times the forward pass."""
        return 3.0 * self.tokens * forward_flops(self.config, self.sequence_length)


def forward_flops(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of a forward pass, per token: two for each weight that the token meets, and causal attention.

    Scores and values are counted for the half of all pairs that causal order leaves. Routers and the head are counted;
    embedding look-ups, norms, softmaxes, activations and whatever is computed a second time are not.
    """
    heads = config.num_attention_heads * config.kv_channels
    groups = config.num_query_groups * config.kv_channels
    matrices = 3 if config.gated_linear_unit else 2
    attention = 2 * config.hidden_size * (2 * heads + 2 * groups) + 2 * sequence_length * heads
    total = 2 * config.hidden_size * config.vocab_size + config.num_layers * attention
    for layer in range(config.num_layers):
        if not config.is_moe_layer(layer):
            total += 2 * matrices * config.hidden_size * config.ffn_hidden_size
            continue
        routed = config.moe_router_topk * (config.moe_ffn_hidden_size or 0)
        shared = config.moe_shared_expert_intermediate_size or 0
        total += 2 * config.hidden_size * (matrices * (routed + shared) + (config.num_moe_experts or 0))
    return float(total)


def _config(*, width: int, layers: int, experts: int, topk: int, shared: int = 0, **shape: int | bool) -> ModelConfig:
    return ModelConfig(
        num_layers=layers,
        ffn_hidden_size=shared or width,
        kv_channels=128,
        vocab_size=32768,
        rotary_base=500_000.0,
        max_position_embeddings=8192,
        num_moe_experts=experts,
        moe_ffn_hidden_size=width,
        moe_router_topk=topk,
        moe_shared_expert_intermediate_size=shared or None,
        moe_aux_loss_coeff=1e-2,
        **shape,  # type: ignore[arg-type]
    )


_ALL = (
    Slice(
        name="llama3-e8t2",
        config=_config(
            hidden_size=4096, num_attention_heads=32, num_query_groups=8, width=14336, layers=2, experts=8, topk=2
        ),
        sequence_length=8192,
        micro_batch_size=2,
        forward_backward=Target(600, 625),
        step=Target(500, 530),
        peak_gib=(60, 50),
    ),
    Slice(
        name="mixtral-8x22b",
        config=_config(
            hidden_size=6144, num_attention_heads=48, num_query_groups=8, width=16384, layers=1, experts=8, topk=2
        ),
        sequence_length=4096,
        micro_batch_size=4,
        forward_backward=Target(605, 622),
        step=Target(505, 530),
        peak_gib=(54, 47),
    ),
    Slice(
        name="qwen2-57b-a14b",
        config=_config(
            hidden_size=3584,
            num_attention_heads=28,
            num_query_groups=4,
            width=2560,
            layers=2,
            experts=64,
            topk=8,
            shared=20480,
        ),
        sequence_length=4096,
        micro_batch_size=4,
        forward_backward=Target(590, 615),
        step=Target(480, 510),
        peak_gib=(80, 66),
    ),
    Slice(
        name="qwen3-30b-a3b",
        config=_config(
            hidden_size=2048,
            num_attention_heads=32,
            num_query_groups=4,
            width=768,
            layers=4,
            experts=128,
            topk=8,
            qk_layernorm=True,
        ),
        sequence_length=4096,
        micro_batch_size=4,
        forward_backward=Target(430, 510),
        step=Target(350, 400),
        peak_gib=(49, 41),
    ),
)
SLICES = {slice_.name: slice_ for slice_ in _ALL}
TINY = Slice(
    name="tiny",
    config=ModelConfig(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        vocab_size=256,
        num_moe_experts=8,
        moe_ffn_hidden_size=48,
        moe_aux_loss_coeff=1e-2,
    ),
    sequence_length=32,
    micro_batch_size=2,
    forward_backward=Target(0, 0),
    step=Target(0, 0),
    peak_gib=(0, 0),
)
"""For a run that only shows whether the programs run; no figure of it means anything."""
