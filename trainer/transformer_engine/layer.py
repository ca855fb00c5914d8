"""A decoder layer on Transformer Engine's modules, with the names and the answers of `trainer.decoder.Layer`.

Norms, linear layers, attention, rotation, the activation and the grouped products are NVIDIA's. Which expert gets
which row, and the weighted sum of rows behind the experts, are this package's: there is one router, whatever computes.
Transformer Engine reads on the host how many rows each expert has, so steps are no CUDA graph.

Shapes: T tokens, H hidden_size, F ffn width, E experts, K top-k, R = T*K routed rows.
"""

from __future__ import annotations

import transformer_engine.pytorch as te
from torch import Tensor, nn

from ckptbridge.converters.errors import NotSupportedError
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.kernels.backend import operations_backend
from ckptbridge.kernels.gather import gather_rows, sum_rows
from ckptbridge.kernels.order import Order
from ckptbridge.trainer.attention import Positions
from ckptbridge.trainer.computed import ALWAYS, refuse_beyond
from ckptbridge.trainer.mixture import Balance, Mixture
from ckptbridge.trainer.rope import attention_factor
from ckptbridge.trainer.transformer_engine.attention import SelfAttention, rotation_angles
from ckptbridge.trainer.transformer_engine.linear import GroupedLinear, Linear, NormLinear

COMPUTED = ALWAYS | {
    *("rotary_percent", "window_layers", "softmax_scale", "mtp_num_layers"),
    *("moe_router_score_function", "moe_router_enable_expert_bias", "moe_router_topk_scaling_factor"),
    *("moe_router_num_groups", "moe_router_group_topk", "moe_router_group_max"),
}
"""The fields of a config that these layers know: Llama's kind, dense or with experts, however those are chosen."""


class TransformerEngineLayer(nn.Module):
    """Attention, then an MLP or a mixture of experts, each added to the residual stream.

    Raises NotSupportedError for a model that these modules do not compute.
    """

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__()
        refuse_beyond(config, COMPUTED, "the transformer_engine backend")
        if attention_factor(config) != 1:
            raise NotSupportedError(
                "the transformer_engine backend rotates by plain cosines and sines, and this model's RoPE scaling "
                "multiplies them; use the triton backend"
            )
        self.config = config
        self.self_attention = SelfAttention(config, number)
        if config.is_moe_layer(number):
            self.pre_mlp_layernorm = te.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon, device="meta")
            self.mlp: TransformerEngineMixture | Mlp = TransformerEngineMixture(config)
        else:
            self.mlp = Mlp(config)

    def forward(
        self, x_BSH: Tensor, pending_BSH: Tensor | None, where: Positions
    ) -> tuple[Tensor, Tensor | None, Balance | None]:
        """The residual stream behind the layer [B, S, H], nothing pending, and how a mixture spread its tokens."""
        if pending_BSH is not None:
            x_BSH = x_BSH + pending_BSH
        angles = rotation_angles(self.config, x_BSH.shape[1], x_BSH.device)
        x_BSH = x_BSH + self.self_attention(x_BSH, angles)
        if isinstance(self.mlp, Mlp):
            return x_BSH + self.mlp(x_BSH), None, None
        out_TH, balance = self.mlp(self.pre_mlp_layernorm(x_BSH).flatten(0, 1))
        return x_BSH + out_TH.view_as(x_BSH), None, balance


class Mlp(nn.Module):
    """Norm, fc1, SwiGLU, fc2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear_fc1 = NormLinear(config.hidden_size, 2 * config.ffn_hidden_size, config)
        self.activation = te.ops.SwiGLU()
        self.linear_fc2 = Linear(config.ffn_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(self.activation(self.linear_fc1(x)))


class TransformerEngineMixture(Mixture):
    """This package's router in front of Transformer Engine's experts, shared or not."""

    def __init__(self, config: ModelConfig) -> None:
        backend = operations_backend("transformer_engine")
        super().__init__(config, backend)
        self.experts = Experts(config, backend)  # type: ignore[assignment]
        if self.shared_experts is not None:
            shared = config.moe_shared_expert_intermediate_size or 0
            self.shared_experts.linear_fc1 = Linear(config.hidden_size, 2 * shared)  # type: ignore[assignment]
            self.shared_experts.linear_fc2 = Linear(shared, config.hidden_size)  # type: ignore[assignment]


class Experts(nn.Module):
    """The routed experts; called as `trainer.mixture.Experts`."""

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.backend = backend
        experts, hidden, ffn = config.num_moe_experts or 0, config.hidden_size, config.moe_ffn_hidden_size or 0
        fc1, fc2 = GroupedLinear(experts, 2 * ffn, hidden), GroupedLinear(experts, hidden, ffn)
        self.experts = nn.ModuleDict({"linear_fc1": fc1, "linear_fc2": fc2})
        self.activation = te.ops.SwiGLU()

    def forward(self, x_TH: Tensor, weights_TK: Tensor, order: Order) -> Tensor:
        """The sum of what each token's experts give, by weight: [T, H]."""
        rows_RH = gather_rows(x_TH, order, backend=self.backend)
        ends = order.ends_E.tolist()
        rows_E = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        if ends[-1] != rows_RH.shape[0]:
            raise NotSupportedError(
                "the transformer_engine backend drops and pads no tokens: use the triton backend for a capacity factor"
            )
        hidden_RF = self.activation(self.experts["linear_fc1"](rows_RH, rows_E))
        return sum_rows(self.experts["linear_fc2"](hidden_RF, rows_E), order, weights_TK, backend=self.backend)
