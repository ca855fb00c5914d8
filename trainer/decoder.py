"""The decoder: Megatron-Core's parameter names and packed layouts, run as single-device code.

Its state_dict names are the names of `converters.model.decoder_tensors`, so a converted checkpoint is its
state. With the reference kernels on a CPU it is also the oracle that shows a converter's mistake: a table
that is wrong in both directions survives every round trip, but not this forward pass.

Shapes: B batch, S sequence, T = B*S tokens, H hidden_size, V vocab_size, E experts, M mixture layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ckptbridge.converters.errors import NotSupportedError
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.trainer.activations import activated, fc1_rows
from ckptbridge.trainer.attention import Positions, SelfAttention, positions
from ckptbridge.trainer.computed import COMPUTED, refuse_beyond
from ckptbridge.trainer.further_layers import FurtherLayers
from ckptbridge.trainer.latent_attention import LatentAttention
from ckptbridge.trainer.mixture import Balance, Mixture
from ckptbridge.trainer.norm import LinearNorm, Norm, NormLinear

OnStage = Callable[[str, Tensor], None]
"""Called with the name of a module ("decoder.layers.3") and its output [B, S, ...]."""


@dataclass(frozen=True, slots=True)
class DecoderOutput:
    """The last hidden states (normed, [B, S, H]) and how each mixture layer spread its tokens, by layer number."""

    hidden_BSH: Tensor
    balance: dict[int, Balance]

    def balance_loss(self) -> Tensor:
        """The sum over mixture layers of their load-balancing losses; each is 1 when even. Zero for a dense model."""
        losses = [balance.loss for balance in self.balance.values()]
        return torch.stack(losses).sum() if losses else self.hidden_BSH.new_zeros((), dtype=torch.float32)


class Decoder(nn.Module):
    """A decoder-only model built from its config alone; on the meta device it costs no memory.

    `backend` names the kernels ("reference", "torch", "triton"). Parameters are not initialised: see `loading`.
    """

    def __init__(self, config: ModelConfig, backend: str = "reference") -> None:
        super().__init__()
        refuse_beyond(config, COMPUTED, "this package's decoder")
        self.config = config
        self.embedding = Embedding(config)
        self.decoder = Layers(config, backend)
        if config.mtp_num_layers:
            self.mtp = FurtherLayers(config, backend, lambda number: Layer(config, number, backend))
        if not config.share_embeddings_and_output_weights:
            self.output_layer = nn.Linear(config.hidden_size, config.vocab_size, bias=config.add_output_layer_bias)

    def forward(self, tokens_BS: Tensor, on_stage: OnStage | None = None) -> DecoderOutput:
        """Hidden states of every token; `on_stage` sees the embedding, each layer and the final norm."""
        observe = on_stage or _nothing
        weight_VH = self.embedding.word_embeddings.weight
        x_BSH = self.embedding(tokens_BS)
        observe("embedding", x_BSH)
        where = positions(self.config, tokens_BS.shape[1], x_BSH.device, weight_VH.dtype)
        balance: dict[int, Balance] = {}
        for number, layer in enumerate(self.decoder.layers):
            x_BSH, spread = layer(x_BSH, where)
            observe(f"decoder.layers.{number}", x_BSH)
            if spread is not None:
                balance[number] = spread
        x_BSH = self.decoder.final_layernorm(x_BSH)
        observe("decoder.final_layernorm", x_BSH)
        return DecoderOutput(x_BSH, balance)

    @property
    def output_weight_VH(self) -> Tensor:
        """The matrix that turns hidden states into logits: the output layer's, or the embedding's when tied."""
        tied = self.config.share_embeddings_and_output_weights
        return self.embedding.word_embeddings.weight if tied else self.output_layer.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., H] that `forward` returned."""
        bias_V = self.output_layer.bias if self.config.add_output_layer_bias else None
        return logits_of(hidden, self.output_weight_VH, bias_V, self.config)


def logits_of(hidden: Tensor, weight_VH: Tensor, bias_V: Tensor | None, config: ModelConfig) -> Tensor:
    """Logits [..., V] of normed hidden states [..., H], by the output matrix or some of its rows."""
    logits = F.linear(hidden, weight_VH, bias_V)
    if config.logits_divisor != 1:
        logits = logits / config.logits_divisor
    if config.final_logit_softcapping is not None:
        logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
    return logits


class Embedding(nn.Module):
    """Rows of the embedding by token id, times `embedding_multiplier` rounded to their dtype."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.multiplier = config.embedding_multiplier
        self.word_embeddings = WordEmbeddings(config.vocab_size, config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return multiplied(self.word_embeddings(tokens), self.multiplier)


def multiplied(rows: Tensor, multiplier: float) -> Tensor:
    """Rows of the embedding times a multiplier that is rounded to their dtype."""
    return rows if multiplier == 1 else rows * torch.tensor(multiplier, dtype=rows.dtype)


class WordEmbeddings(nn.Module):
    """Rows of a matrix by token id. (nn.Embedding would draw 28 million normal numbers for SmolLM2 first.)"""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class Layers(nn.Module):
    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, number, backend) for number in range(config.num_layers))
        self.final_layernorm = Norm(config.hidden_size, config, backend)


class Layer(nn.Module):
    """Attention, then an MLP or a mixture of experts, each added to the residual stream."""

    def __init__(self, config: ModelConfig, number: int, backend: str) -> None:
        super().__init__()
        self.multiplier = config.residual_multiplier
        self.self_attention: SelfAttention | LatentAttention
        if config.multi_latent_attention:
            self.input_layernorm = Norm(config.hidden_size, config, backend)
            self.self_attention = LatentAttention(config, backend)
        else:
            self.self_attention = SelfAttention(config, number, backend)
        if config.is_moe_layer(number):
            if config.post_layernorm or not config.pre_layernorm:
                raise NotSupportedError("this package's decoder has a norm before a mixture of experts, none behind it")
            self.pre_mlp_layernorm = Norm(config.hidden_size, config, backend)
            self.mlp: Mixture | Mlp = Mixture(config, backend)
        else:
            self.mlp = Mlp(config, backend)

    def forward(self, x_BSH: Tensor, where: Positions) -> tuple[Tensor, Balance | None]:
        x_BSH = self.attended(x_BSH, where)
        out_BSH, balance = self.fed(x_BSH)
        return self.added(x_BSH, out_BSH), balance

    def attended(self, x_BSH: Tensor, where: Positions) -> Tensor:
        """The residual stream behind attention."""
        normed_BSH = self.input_layernorm(x_BSH) if isinstance(self.self_attention, LatentAttention) else x_BSH
        return self.added(x_BSH, self.self_attention(normed_BSH, where))

    def fed(self, x: Tensor) -> tuple[Tensor, Balance | None]:
        """What the MLP or the mixture makes of the residual stream [..., H] behind attention."""
        if isinstance(self.mlp, Mlp):
            return self.mlp(x), None
        out_TH, balance = self.mlp(self.pre_mlp_layernorm(x).flatten(0, -2))
        return out_TH.view_as(x), balance

    def added(self, x: Tensor, out: Tensor) -> Tensor:
        """The residual stream and what is added to it."""
        return x + (out if self.multiplier == 1 else out * self.multiplier)


class Mlp(nn.Module):
    """Two linear layers, the norms around them theirs. Of a gated unit fc1's rows are gate_proj, then up_proj."""

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        hidden, ffn, bias = config.hidden_size, config.ffn_hidden_size, config.add_mlp_bias
        self.linear_fc1 = NormLinear(hidden, fc1_rows(config, ffn), config, backend, bias=bias)
        self.linear_fc2 = LinearNorm(ffn, hidden, config, backend, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(activated(self.linear_fc1(x), self.config, self.backend))


def _nothing(name: str, output: Tensor) -> None:
    pass
