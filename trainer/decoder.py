"""The decoder: Megatron-Core's parameter names and packed layouts, run as single-device code.

Its state_dict names are the names of `converters.model.decoder_tensors`, so a converted checkpoint is its
state. With the reference kernels on a CPU it is also the oracle that shows a converter's mistake: a table
that is wrong in both directions survives every round trip, but not this forward pass.

Shapes: B batch, S sequence, T = B*S tokens, H hidden_size, V vocab_size, E experts, M mixture layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ckptbridge.converters.errors import NotSupportedError
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.kernels.backend import operations_backend
from ckptbridge.kernels.embedding import embedding
from ckptbridge.kernels.linear import linear
from ckptbridge.trainer.activations import fc1_rows, hidden_units
from ckptbridge.trainer.attention import Positions, SelfAttention, positions
from ckptbridge.trainer.computed import COMPUTED, refuse_beyond
from ckptbridge.trainer.further_layers import FurtherLayers
from ckptbridge.trainer.latent_attention import LatentAttention
from ckptbridge.trainer.mixture import Balance, Mixture
from ckptbridge.trainer.norm import LinearNorm, Norm, NormLinear

OnStage = Callable[[str, Tensor], None]
"""Called with the name of a module ("decoder.layers.3") and its output [B, S, ...]."""

RunLayer = Callable[..., Any]
"""Called with a layer's number, the layer and its inputs; returns what the layer gives."""


@dataclass(frozen=True, slots=True)
class DecoderOutput:
    """The last hidden states (normed, [B, S, H]) and how each mixture layer spread its tokens, by layer number."""

    hidden_BSH: Tensor
    balance: dict[int, Balance]

    def balance_loss(self) -> Tensor:
        """The sum over mixture layers of their load-balancing losses; each is 1 when even. Zero for a dense model."""
        losses = [balance.loss for balance in self.balance.values()]
        return torch.stack(losses).sum() if losses else self.hidden_BSH.new_zeros((), dtype=torch.float32)

    def z_loss(self) -> Tensor:
        """The sum over mixture layers of the mean square of their routers' logsumexp. Zero for a dense model."""
        losses = [balance.z_loss for balance in self.balance.values()]
        return torch.stack(losses).sum() if losses else self.hidden_BSH.new_zeros((), dtype=torch.float32)


class Decoder(nn.Module):
    """A decoder-only model built from its config alone; on the meta device it costs no memory.

    `backend` names the kernels ("reference", "torch", "triton"), or has layers of NVIDIA's modules
    ("transformer_engine"). Parameters are not initialised: see `loading`.
    """

    def __init__(self, config: ModelConfig, backend: str = "reference") -> None:
        super().__init__()
        refuse_beyond(config, COMPUTED, "this package's decoder")
        layer_of, backend = layer_maker(config, backend), operations_backend(backend)
        self.config, self.backend = config, backend
        self.run_layer: RunLayer = _computed_at_once
        """How a layer is computed; `activation_memory` has other ways that keep less for the backward pass."""
        self._trained_at: dict[int, Positions] = {}
        """By length: a captured step reads them by address, whatever other lengths come after."""
        self.embedding = Embedding(config, backend)
        self.decoder = Layers(config, backend, layer_of)
        if config.mtp_num_layers:
            self.mtp = FurtherLayers(config, backend, layer_of)
        if not config.share_embeddings_and_output_weights:
            self.output_layer = nn.Linear(config.hidden_size, config.vocab_size, bias=config.add_output_layer_bias)

    def forward(self, tokens_BS: Tensor, on_stage: OnStage | None = None) -> DecoderOutput:
        """Hidden states of every token; `on_stage` sees the embedding, each layer and the final norm."""
        observe = on_stage or _nothing
        weight_VH = self.embedding.word_embeddings.weight
        x_BSH = self.embedding(tokens_BS)
        observe("embedding", x_BSH)
        where = positions(self.config, tokens_BS.shape[1], x_BSH.device, weight_VH.dtype)
        if torch.is_grad_enabled():
            self._trained_at[tokens_BS.shape[1]] = where
        balance: dict[int, Balance] = {}
        pending_BSH: Tensor | None = None
        for number, layer in enumerate(self.decoder.layers):
            x_BSH, pending_BSH, spread = self.run_layer(number, layer, x_BSH, pending_BSH, where)
            if on_stage is not None:
                on_stage(f"decoder.layers.{number}", x_BSH if pending_BSH is None else x_BSH + pending_BSH)
            if spread is not None:
                balance[number] = spread
        _, normed_BSH = self.decoder.final_layernorm.behind_sum(x_BSH, pending_BSH)
        observe("decoder.final_layernorm", normed_BSH)
        return DecoderOutput(normed_BSH, balance)

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
    logits = linear(hidden, weight_VH, bias_V)
    if config.logits_divisor != 1:
        logits = logits / config.logits_divisor
    if config.final_logit_softcapping is not None:
        logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
    return logits


class Embedding(nn.Module):
    """Rows of the embedding by token id, times `embedding_multiplier` rounded to their dtype."""

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.multiplier = config.embedding_multiplier
        self.word_embeddings = WordEmbeddings(config.vocab_size, config.hidden_size, backend)

    def forward(self, tokens: Tensor) -> Tensor:
        return multiplied(self.word_embeddings(tokens), self.multiplier)


def multiplied(rows: Tensor, multiplier: float) -> Tensor:
    """Rows of the embedding times a multiplier that is rounded to their dtype."""
    return rows if multiplier == 1 else rows * torch.tensor(multiplier, dtype=rows.dtype)


class WordEmbeddings(nn.Module):
    """Rows of a matrix by token id. (nn.Embedding would draw 28 million normal numbers for SmolLM2 first.)"""

    def __init__(self, vocab_size: int, hidden_size: int, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, tokens: Tensor) -> Tensor:
        return embedding(tokens, self.weight, backend=self.backend)


class Layers(nn.Module):
    def __init__(self, config: ModelConfig, backend: str, layer_of: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer_of(number) for number in range(config.num_layers))
        self.final_layernorm = Norm(config.hidden_size, config, backend)


class Layer(nn.Module):
    """Attention, then an MLP or a mixture of experts, each added to the residual stream.

    What was computed last is not added at once: it stays pending until a norm needs the sum, and adds it on its way.
    """

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

    def forward(
        self, x_BSH: Tensor, pending_BSH: Tensor | None, where: Positions
    ) -> tuple[Tensor, Tensor | None, Balance | None]:
        """The residual stream, what is still to be added to it, and how a mixture spread its tokens."""
        x_BSH, normed_BSH = self._before_attention().behind_sum(x_BSH, pending_BSH)
        attended_BSH = self._scaled(self.self_attention(normed_BSH, where))
        x_BSH, normed_BSH = self._before_mlp().behind_sum(x_BSH, attended_BSH)
        out_BSH, balance = self._fed(normed_BSH)
        return x_BSH, self._scaled(out_BSH), balance

    def attended(self, x_BSH: Tensor, where: Positions) -> Tensor:
        """The residual stream behind attention."""
        x_BSH, normed_BSH = self._before_attention().behind_sum(x_BSH, None)
        return self.added(x_BSH, self.self_attention(normed_BSH, where))

    def fed(self, x: Tensor) -> tuple[Tensor, Balance | None]:
        """What the MLP or the mixture makes of the residual stream [..., H] behind attention."""
        return self._fed(self._before_mlp().behind_sum(x, None)[1])

    def added(self, x: Tensor, out: Tensor) -> Tensor:
        """The residual stream and what is added to it."""
        return x + self._scaled(out)

    def _before_attention(self) -> Norm | NormLinear:
        is_latent = isinstance(self.self_attention, LatentAttention)
        return self.input_layernorm if is_latent else self.self_attention.linear_qkv

    def _before_mlp(self) -> Norm | NormLinear:
        return self.mlp.linear_fc1 if isinstance(self.mlp, Mlp) else self.pre_mlp_layernorm

    def _fed(self, normed: Tensor) -> tuple[Tensor, Balance | None]:
        if isinstance(self.mlp, Mlp):
            return self.mlp(normed), None
        out_TH, balance = self.mlp(normed.flatten(0, -2))
        return out_TH.view_as(normed), balance

    def _scaled(self, out: Tensor) -> Tensor:
        return out if self.multiplier == 1 else out * self.multiplier


def layer_maker(config: ModelConfig, backend: str) -> Callable[[int], nn.Module]:
    """What makes the layer of a number; NVIDIA's modules are imported for their own backend alone."""
    if backend != "transformer_engine":
        return lambda number: Layer(config, number, backend)
    from ckptbridge.trainer.transformer_engine.layer import TransformerEngineLayer

    return lambda number: TransformerEngineLayer(config, number)


class Mlp(nn.Module):
    """Two linear layers, the norms around them theirs. Of a gated unit fc1's rows are gate_proj, then up_proj."""

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        hidden, ffn, bias = config.hidden_size, config.ffn_hidden_size, config.add_mlp_bias
        self.linear_fc1 = NormLinear(hidden, fc1_rows(config, ffn), config, backend, bias=bias)
        self.linear_fc2 = LinearNorm(ffn, hidden, config, backend, bias=bias)

    def forward(self, normed: Tensor) -> Tensor:
        """Of what the norm of `linear_fc1` gave."""
        wide = self.linear_fc1.product(normed)
        return self.linear_fc2(hidden_units(wide, self.config, self.backend))


def _computed_at_once(number: int, layer: Callable[..., Any], *inputs: Any) -> Any:
    return layer(*inputs)


def _nothing(name: str, output: Tensor) -> None:
    pass
