"""A model run layer by layer: of the one at work its attention is in memory, and then its MLP's matrices in blocks.

The modules are the decoder's own, in fp32 with the reference kernels, whatever the dtype of the checkpoint.
Shapes: S tokens of a sequence, T tokens of all sequences, H hidden_size, F ffn width, V vocab_size, N experts,
R routed rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ckptbridge.converters.mcore.keys import layer_of
from ckptbridge.converters.model import Model, decoder_tensors
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.tensors import Checkpoint, LazyTensor, rows
from ckptbridge.kernels.gather import gather_rows, sum_rows
from ckptbridge.kernels.order import Order
from ckptbridge.trainer.activations import activated
from ckptbridge.trainer.attention import Positions, positions
from ckptbridge.trainer.computed import COMPUTED, refuse_beyond
from ckptbridge.trainer.decoder import Layer, logits_of, multiplied
from ckptbridge.trainer.loading import check_names_and_shapes, load_tensors, read_as
from ckptbridge.trainer.mixture import Mixture
from ckptbridge.trainer.norm import Norm, NormLinear

_PART = 2048
"""Tokens that an MLP or a mixture is given together; its matrices are read again for the next ones."""
_EXPERT_PART = 256
"""Rows of what stands between an expert's matrices that are activated together: it is the widest of all."""
_BLOCK_BYTES = 64 << 20
"""Of the matrix of an MLP or an expert, or of the output matrix, in fp32, in memory together."""
_LAYERS = "decoder.layers."
_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"

OnProgress = Callable[[int, int], None]
"""Called with the number of layers that are done, and of all."""
Feed = Callable[[int, Layer, Tensor], Tensor]
"""Called with the number of a layer, the layer and the residual stream [T, H] behind its attention; returns what the
MLP or the mixture adds [T, H]."""
OnHidden = Callable[[str, Tensor], None]
"""Called with a stage ("embedding", "decoder.layers.3", "decoder.final_layernorm") and its output [T, H]."""


class StreamedModel:
    """A checkpoint of any format whose parts are read when they are asked for and forgotten when they are dropped."""

    def __init__(self, model: Model) -> None:
        refuse_beyond(model.config, COMPUTED, "this package's decoder")
        self.config, self.tensors = model.config, model.tensors
        self._layers: list[dict[str, LazyTensor]] = [{} for _ in range(model.config.num_layers)]
        for name, tensor in model.tensors.items():
            if name.startswith(_LAYERS):
                self._layers[layer_of(name) or 0][name] = tensor

    def embedded(self, ids_T: Tensor) -> Tensor:
        """Rows of the embedding [T, H]; only those that the text has are read."""
        table = self.tensors[_EMBEDDING]
        words, places_T = ids_T.unique(return_inverse=True)
        held = torch.cat([table.read_rows(word, word + 1) for word in words.tolist()]).float()
        return multiplied(held, self.config.embedding_multiplier)[places_T]

    def layer(self, number: int) -> Layer:
        """One layer; the matrices of its MLP or mixture are read when they are used, all else is there.

        Raises BadInputError if names or shapes are not those of the config.
        """
        found, prefix = self._layers[number], f"{_LAYERS}{number}."
        with torch.device("meta"):
            layer = Layer(self.config, number, "reference").float().requires_grad_(False)
        expected = {prefix + name: parameter for name, parameter in layer.named_parameters()}
        check_names_and_shapes(expected, decoder_tensors(found, self.config))
        if isinstance(layer.mlp, Mixture):
            layer.mlp.experts = StreamedExperts(self.config, found, f"{prefix}mlp.experts.experts.")
        absent = {
            f"mlp.{name}.weight": module
            for name, module in layer.mlp.named_modules()
            if isinstance(module, nn.Linear | NormLinear)
        }
        here: dict[str, Tensor] = {}
        for name, parameter in list(layer.named_parameters()):
            if name not in absent:
                where, _, short = name.rpartition(".")
                held = nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False)
                setattr(layer.get_submodule(where), short, held)
                here[prefix + name] = held
        load_tensors(here, {name: found[name] for name in here})
        for name, module in absent.items():
            # Not a hook: those would know the module, and it them, until the garbage is collected.
            how = "product" if hasattr(module, "product") else "forward"
            setattr(module, how, partial(linear_in_blocks, found[prefix + name], module.bias))
        return layer

    def final_norm(self) -> Norm:
        """The norm behind the last layer, read."""
        prefix = "decoder.final_layernorm."
        normed = Norm(self.config.hidden_size, self.config, "reference").float().requires_grad_(False)
        targets = {prefix + name: parameter for name, parameter in normed.named_parameters()}
        load_tensors(targets, {name: tensor for name, tensor in self.tensors.items() if name.startswith(prefix)})
        return normed

    def logit_blocks(self, normed_TH: Tensor, block_bytes: int = _BLOCK_BYTES) -> Iterator[tuple[int, Tensor]]:
        """Logits of all tokens for some words at a time: (first word, logits [T, some of V]).

        Models of one vocabulary and hidden_size give the same blocks.
        """
        tied = self.config.share_embeddings_and_output_weights
        weight_VH, bias_V = self.tensors[_EMBEDDING if tied else _OUTPUT], self.tensors.get("output_layer.bias")
        count = self.config.vocab_size
        step = max(1, block_bytes // (4 * self.config.hidden_size))
        for first in range(0, count, step):
            block = (first, min(first + step, count))
            bias = None if bias_V is None else bias_V.read_rows(*block).float()
            yield first, logits_of(normed_TH, read_as(rows(weight_VH, *block), torch.float32), bias, self.config)


def linear_in_blocks(weight: LazyTensor, bias: Tensor | None, x: Tensor, block_bytes: int = _BLOCK_BYTES) -> Tensor:
    """What a linear layer gives, some of its outputs at a time: so much of the weight is read and dropped."""
    step = max(1, block_bytes // (4 * weight.shape[1]))
    blocks = [(start, min(start + step, weight.shape[0])) for start in range(0, weight.shape[0], step)]
    out = torch.cat([F.linear(x, read_as(rows(weight, *block), torch.float32)) for block in blocks], -1)
    return out if bias is None else out + bias


class StreamedExperts(nn.Module):
    """The routed experts in place of the decoder's own; each is read, used for its rows and dropped.

    Experts that are the same tensors (copies of one) are read once.
    """

    def __init__(self, config: ModelConfig, tensors: Checkpoint, prefix: str) -> None:
        super().__init__()
        self.config = config
        self.alike: dict[tuple[int, ...], list[int]] = {}
        self.matrices: list[dict[str, LazyTensor]] = []
        for expert in range(config.num_moe_experts or 0):
            start = f"{prefix}{expert}."
            parts = ("linear_fc1.weight", "linear_fc1.bias", "linear_fc2.weight", "linear_fc2.bias")
            held = {part: tensors[start + part] for part in parts if start + part in tensors}
            self.matrices.append(held)
            self.alike.setdefault(tuple(id(tensor) for tensor in held.values()), []).append(expert)

    def forward(self, x_TH: Tensor, weights_TK: Tensor, order: Order) -> Tensor:
        """As the decoder's: the sum of what each token's experts give, by weight."""
        x_RH = gather_rows(x_TH, order)
        out_RH = torch.empty_like(x_RH)
        numbers_by_expert = torch.arange(len(x_RH)).tensor_split(order.ends_E.cpu().long())
        for experts in self.alike.values():
            numbers = torch.cat([numbers_by_expert[expert] for expert in experts])
            if len(numbers):
                out_RH[numbers] = self._through(self.matrices[experts[0]], x_RH[numbers])
        return sum_rows(out_RH, order, weights_TK)

    def _through(self, expert: dict[str, LazyTensor], x_RH: Tensor) -> Tensor:
        wide = self._product(expert, "linear_fc1", x_RH)
        hidden_RF = torch.cat([activated(part, self.config, "reference") for part in wide.split(_EXPERT_PART)])
        return self._product(expert, "linear_fc2", hidden_RF)

    def _product(self, expert: dict[str, LazyTensor], linear: str, x: Tensor) -> Tensor:
        bias = expert.get(f"{linear}.bias")
        return linear_in_blocks(expert[f"{linear}.weight"], None if bias is None else read_as(bias, torch.float32), x)


class ResidualStream:
    """The hidden states of several sequences on their way through a model; tokens of all of them lie in one row."""

    def __init__(self, model: StreamedModel, sequences: Sequence[Tensor]) -> None:
        self.model = model
        self.lengths = [len(ids_S) for ids_S in sequences]
        self.x_TH = model.embedded(torch.cat(list(sequences)))
        self._where: dict[int, Positions] = {}

    def attend(self, layer: Layer) -> None:
        """Attention, each sequence by itself; its weights are dropped then."""
        parts = self.x_TH.split(self.lengths)
        self.x_TH = torch.cat([layer.attended(x_SH[None], self._positions(len(x_SH)))[0] for x_SH in parts])
        layer.self_attention.to("meta")

    def add(self, layer: Layer, out_TH: Tensor) -> None:
        """What an MLP or a mixture made of the stream joins it."""
        self.x_TH = layer.added(self.x_TH, out_TH)

    def advance(self, number: int, feed: Feed) -> None:
        """A whole layer, which is read and dropped here."""
        layer = self.model.layer(number)
        self.attend(layer)
        self.add(layer, feed(number, layer, self.x_TH))

    def normed(self) -> Tensor:
        """The stream behind the final norm: what logits are computed from."""
        return self.model.final_norm()(self.x_TH)

    def _positions(self, length: int) -> Positions:
        if length not in self._where:
            self._where[length] = positions(self.model.config, length, self.x_TH.device, torch.float32)
        return self._where[length]


def fed(number: int, layer: Layer, x_TH: Tensor) -> Tensor:
    """What the layer's MLP or mixture makes of the stream behind attention, some tokens at a time."""
    return torch.cat([layer.fed(x)[0] for x in x_TH.split(_PART)])


def stream(
    model: Model,
    sequences: Sequence[Tensor],
    feed: Feed = fed,
    on_hidden: OnHidden | None = None,
    on_progress: OnProgress | None = None,
) -> Tensor:
    """Run sequences of token ids [S] through the model; returns the normed last hidden states [T, H].

    `feed` may look at the MLP, or stand in for it. Raises NotSupportedError for what the decoder does not compute.
    """
    streamed = StreamedModel(model)
    flow = ResidualStream(streamed, sequences)
    observe = on_hidden or _nothing
    observe("embedding", flow.x_TH)
    for number in range(model.config.num_layers):
        flow.advance(number, feed)
        observe(f"{_LAYERS}{number}", flow.x_TH)
        if on_progress is not None:
            on_progress(number + 1, model.config.num_layers)
    normed_TH = flow.normed()
    observe("decoder.final_layernorm", normed_TH)
    return normed_TH


def _nothing(stage: str, output: Tensor) -> None:
    pass
