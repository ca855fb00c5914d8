"""Layer-wise distillation (LaDiMo): each mixture learns to give what the dense MLP in its place gave on a text.

The dense model runs once over the text, layer by layer. Where a layer becomes a mixture, its router and experts are
trained on the MLP's own inputs and outputs, and what came of it goes into a file: memory holds the residual stream of
the text and one layer with Adam's moments, and a run that was stopped goes on behind the last layer that has a file.
A layer that got no better stays as it was.

Shapes: T tokens, H hidden_size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.mcore.keys import decoder_name, expert_of
from ckptbridge.converters.model import Model, decoder_tensors
from ckptbridge.converters.safetensors_header import read_header
from ckptbridge.converters.tensors import Checkpoint, InMemory, LazyTensor
from ckptbridge.converters.upcycling.drawn import generator_for
from ckptbridge.kernels.backend import choose_backend
from ckptbridge.trainer.decoder import Layer
from ckptbridge.trainer.loading import load_tensors
from ckptbridge.trainer.mixture import Mixture
from ckptbridge.trainer.optimizer import Optimizer
from ckptbridge.trainer.recipe import OptimizerSection
from ckptbridge.trainer.schedule import Schedule
from ckptbridge.trainer.text_ids import read_text, text_ids, windows
from ckptbridge.trainer.upcycle_recipe import DistillSection
from ckptbridge.trainer.upcycling.samples import mlp_input
from ckptbridge.trainer.upcycling.scratch import DistilledLayer, Scratch
from ckptbridge.trainer.upcycling.streaming import OnProgress, fed, stream

_WINDOW = 512
"""Tokens that attend to each other; shorter where the model is trained on less."""
_HELD_OUT = 8
"""One token is held out for so many that are trained on: errors are told of tokens that no layer was trained on."""
_FEWEST = 4
"""Tokens that make two sequences: one to train on, one to measure on. `tokens` of one less hold out the fourth."""
_AT_ONCE = 2048
"""Tokens that a layer is measured on together."""

OnLayer = Callable[[DistilledLayer], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillationText:
    """Token ids [T] and the sequences they are cut into, of which the last ones are held out."""

    ids_T: Tensor
    sequences: tuple[Tensor, ...]

    @property
    def trained(self) -> int:
        """How many tokens there are to train on; they come first."""
        held_out = max(1, len(self.sequences) // (_HELD_OUT + 1))
        return sum(len(ids) for ids in self.sequences[: len(self.sequences) - held_out])


def distillation_text(dense: Model, options: DistillSection, text: Path | None = None) -> DistillationText:
    """What the layers of a model are trained on; `text` is read where the options name none.

    Raises BadInputError for a text that is too short or has no tokenizer, and for too few tokens.
    """
    if options.tokens < _FEWEST - 1:
        raise BadInputError(
            f"distill.tokens is {options.tokens}: it must be at least {_FEWEST - 1}, so that there are sequences to "
            "train on and to measure on"
        )
    named = options.text or text
    words = None if named is None else read_text(named)
    ids_T, described = text_ids([dense], words, options.tokens + -(-options.tokens // _HELD_OUT))
    if len(ids_T) < _FEWEST:
        where = described if named is None else f"{named}: the text"
        raise BadInputError(
            f"{where} has {len(ids_T)} tokens: distillation needs at least {_FEWEST}, of which some are held out; "
            "name a longer text with --distill-text FILE"
        )
    length = max(2, min(_WINDOW, dense.config.max_position_embeddings, len(ids_T) // 2))
    return DistillationText(ids_T=ids_T, sequences=tuple(windows(ids_T, length)))


def distilled(
    dense: Model,
    mixture: Model,
    options: DistillSection,
    work: Path,
    *,
    seed: int = 0,
    text: DistillationText | None = None,
    on_layer: OnLayer | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[Model, list[DistilledLayer]]:
    """The mixture with the weights that training gave its layers, which lie in files of `work`, and how each fared.

    `mixture` is what `dense` was made into; without a `text` it is the one that the options name. The same call finds
    the files of an earlier one, and ends with the same bytes as one that nothing stopped (with as many threads of one
    machine). Raises BadInputError for a text that is too short or has no tokenizer, StorageError if the disk fails.
    """
    text = text or distillation_text(dense, options)
    key = _key(dense, mixture, options, text.ids_T, seed)
    found: dict[str, LazyTensor] = {}
    told: list[DistilledLayer] = []

    def feed(number: int, layer: Layer, x_TH: Tensor) -> Tensor:
        out_TH = fed(number, layer, x_TH)
        if mixture.config.is_moe_layer(number):
            scratch = Scratch(work, number, key)
            if (outcome := scratch.outcome()) is None:
                rows = _Rows(mlp_input(layer, x_TH), out_TH, text.trained)
                outcome = _trained(mixture, number, rows, options, seed, scratch)
            found.update(read_header(scratch.weights))
            told.append(outcome)
            if on_layer is not None:
                on_layer(outcome)
        return out_TH

    with torch.no_grad():
        stream(dense, text.sequences, feed, on_progress=on_progress)
    model = replace(
        mixture, tensors={**mixture.tensors, **found}, derivation=f"{mixture.derivation} distilled {key[:16]}"
    )
    return model, told


@dataclass(frozen=True, slots=True)
class _Rows:
    """A layer's inputs and outputs [T, H]; the first `trained` are there to train on."""

    input_TH: Tensor
    output_TH: Tensor
    trained: int

    def batches(self, options: DistillSection, seed: int, layer: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`options.tokens` rows in a drawn order, a batch at a time; when all were seen, again in another order."""
        left, epoch = options.tokens, 0
        while left:
            order = torch.randperm(self.trained, generator=generator_for(seed, "distil", layer, epoch))
            for rows in order[:left].split(options.batch):
                yield self.input_TH[rows], self.output_TH[rows]
                left -= len(rows)
            epoch += 1

    def steps(self, options: DistillSection) -> int:
        whole, rest = divmod(options.tokens, self.trained)
        return whole * -(-self.trained // options.batch) + -(-rest // options.batch)


def _trained(
    model: Model, layer: int, rows: _Rows, options: DistillSection, seed: int, scratch: Scratch
) -> DistilledLayer:
    """Train one layer, keep what came of it, and tell how far it was and is from the dense one."""
    prefix = f"decoder.layers.{layer}.mlp."
    before = {name: tensor for name, tensor in model.tensors.items() if name.startswith(prefix)}
    mixture = _module(model, before, prefix)
    first = _error(mixture, rows)
    _train(mixture, rows, options, seed, layer)
    parameters = {prefix + name: parameter.detach() for name, parameter in mixture.named_parameters()}
    after: dict[str, LazyTensor] = {}
    with torch.no_grad():
        for name, tensor in before.items():
            held, expert = parameters[decoder_name(name)], expert_of(name)
            rounded = (held if expert is None else held[expert]).to(tensor.dtype)
            (held if expert is None else held[expert]).copy_(rounded)
            after[name] = InMemory(rounded)
    last = _error(mixture, rows)
    is_better = last < first
    outcome = DistilledLayer(layer=layer, before=first, after=last if is_better else first)
    scratch.keep(after if is_better else before, outcome)
    return outcome


def _module(model: Model, tensors: Checkpoint, prefix: str) -> Mixture:
    """The layer as the trainer has it, in fp32, on a GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        mixture = Mixture(model.config, choose_backend("auto", device).name)
    mixture = mixture.float().to_empty(device=device)
    parameters = {prefix + name: parameter for name, parameter in mixture.named_parameters()}
    load_tensors(parameters, decoder_tensors(tensors, model.config))
    return mixture


@torch.enable_grad()
def _train(mixture: Mixture, rows: _Rows, options: DistillSection, seed: int, layer: int) -> None:
    optimizer = Optimizer(mixture, OptimizerSection(lr=options.lr, weight_decay=0.0))
    schedule = Schedule(lr=options.lr, min_lr=0.0, warmup_steps=0, total_steps=rows.steps(options))
    scale = rows.output_TH[: rows.trained].square().sum(-1).mean().item() or 1.0
    device = mixture.router.weight.device
    for step, (input_TH, output_TH) in enumerate(rows.batches(options, seed, layer), start=1):
        made_TH, _ = mixture(input_TH.to(device))
        ((made_TH - output_TH.to(device)).square().sum(-1).mean() / scale).backward()
        optimizer.step(schedule.at(step))


@torch.no_grad()
def _error(mixture: Mixture, rows: _Rows) -> float:
    """|mixture - dense| / |dense| on the rows that are held out."""
    device = mixture.router.weight.device
    difference = total = 0.0
    for input_TH, output_TH in zip(
        rows.input_TH[rows.trained :].split(_AT_ONCE), rows.output_TH[rows.trained :].split(_AT_ONCE), strict=True
    ):
        made_TH = mixture(input_TH.to(device))[0].cpu()
        difference += (made_TH - output_TH).double().square().sum().item()
        total += output_TH.double().square().sum().item()
    return (difference / total) ** 0.5 if total else 0.0


def _key(dense: Model, mixture: Model, options: DistillSection, ids_T: Tensor, seed: int) -> str:
    """A digest of what decides the result, by which a later run knows the files."""
    digest = hashlib.sha256(f"{mixture.derivation} {mixture.dtype} {options!r} {seed}".encode())
    digest.update(ids_T.numpy().tobytes())
    for path in sorted(p for p in dense.path.rglob("*") if p.is_file()):
        stat = path.stat()
        digest.update(f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}".encode())
    return digest.hexdigest()
