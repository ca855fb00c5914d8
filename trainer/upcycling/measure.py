"""What methods that look at activations have to know of each layer, by running the source on texts.

Shapes: T tokens of all sequences, H hidden_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.model import Model
from ckptbridge.converters.upcycling.branch_train_mix import averaged
from ckptbridge.converters.upcycling.layers import chosen_layers
from ckptbridge.converters.upcycling.measured import LayerMeasurement, Measured, MixtureSample, MlpSample
from ckptbridge.converters.upcycling.measuring import measure_layer, needs_text
from ckptbridge.converters.upcycling.mixture_measuring import measure_mixture_layer, mixture_needs_text
from ckptbridge.converters.upcycling.neurons import DenseMlp
from ckptbridge.converters.upcycling.routers import drawn_std
from ckptbridge.converters.upcycling.semantics import check
from ckptbridge.converters.upcycling.spec import MIXTURE_METHODS, PARTITIONS, UpcycleSpec
from ckptbridge.trainer.text_ids import read_text, text_ids, windows
from ckptbridge.trainer.upcycling.prompts import (
    ExpertPrompts,
    prompt_sequences,
    read_prompts,
    refuse_unused_prompts,
    rows_by_prompts,
    rows_of_router,
)
from ckptbridge.trainer.upcycling.samples import sample_mixtures, sample_mlps
from ckptbridge.trainer.upcycling.streaming import OnProgress

CALIBRATION_TOKENS = 4096
"""Of a text file. What the widest MLP of 8 billion parameters does on so many takes 235 MB."""
_WINDOW = 1024
"""Tokens that attend to each other."""


def measure(
    model: Model,
    spec: UpcycleSpec,
    sequences: Sequence[Tensor] = (),
    prompts: Sequence[ExpertPrompts] = (),
    *,
    others: Sequence[Model] = (),
    on_progress: OnProgress | None = None,
) -> Measured:
    """What `upcycled` has to be given for this spec; nothing is run, and nothing returned, where it needs nothing.

    `sequences` are token ids [S] of the text to calibrate with, `prompts` those of `router_init: hidden-state`. The
    model is run layer by layer; with `others` (branch-train-mix) it is the average of them all, whose attention and
    embedding the mixture has. Raises BadInputError for a spec that cannot be built, for a text or prompts that it
    needs and that are missing, and for prompts of another number of experts.
    """
    spec = spec.resolved()
    check(spec, model.config)
    if spec.method in MIXTURE_METHODS:
        return _of_mixture(model, spec, sequences, on_progress)
    by_prompts = spec.router_init == "hidden-state"
    by_text = needs_text(spec) or (bool(sequences) and (spec.method in PARTITIONS or spec.router == "pre-softmax"))
    if needs_text(spec) and not sequences:
        _refuse_without_text(spec)
    if by_prompts:
        _check_prompts(spec, prompts)
    if not by_text and not by_prompts:
        return {}
    source = averaged((model, *others)) if others else model
    return _Dense(source, spec, sequences if by_text else (), prompts if by_prompts else ()).measured(on_progress)


def measure_files(
    model: Model,
    spec: UpcycleSpec,
    calibrate: Path | None,
    prompts: Path | None,
    *,
    others: Sequence[Model] = (),
    on_progress: OnProgress | None = None,
) -> Measured:
    """The same from a text file, of which the first 4096 tokens are taken, and a file of prompts (see prompts.py).

    Raises BadInputError besides for prompts that this spec does not use.
    """
    if prompts is not None:
        refuse_unused_prompts(prompts, spec.resolved())
    sequences: list[Tensor] = []
    if calibrate is not None:
        ids_T, _ = text_ids([model], read_text(calibrate), CALIBRATION_TOKENS)
        sequences = windows(ids_T, min(_WINDOW, model.config.max_position_embeddings))
    given = [] if prompts is None else read_prompts(prompts, [model], spec)
    return measure(model, spec, sequences, given, others=others, on_progress=on_progress)


def _of_mixture(
    model: Model, spec: UpcycleSpec, sequences: Sequence[Tensor], on_progress: OnProgress | None
) -> Measured:
    if not mixture_needs_text(spec, model.config):
        return {}
    if not sequences:
        _refuse_without_text(spec)
    measured: dict[int, LayerMeasurement] = {}

    def on_sample(sample: MixtureSample) -> None:
        measured[sample.layer] = measure_mixture_layer(spec, model.config, sample)

    sample_mixtures(model, sequences, on_sample, on_progress)
    return measured


class _Dense:
    """Text and prompts go through the model together; the text's tokens come first."""

    def __init__(
        self, model: Model, spec: UpcycleSpec, sequences: Sequence[Tensor], prompts: Sequence[ExpertPrompts]
    ) -> None:
        self.model, self.spec, self.prompts = model, spec, prompts
        self.sequences = [*sequences, *prompt_sequences(prompts)]
        self.text_tokens = sum(map(len, sequences))
        self.is_chosen = chosen_layers(spec.layers, model.config.num_layers)
        self.found: dict[int, LayerMeasurement] = {}

    def measured(self, on_progress: OnProgress | None) -> Measured:
        sample_mlps(self.model, self.sequences, self._sampled, on_progress)
        return self.found

    def _sampled(self, sample: MlpSample) -> None:
        if not self.is_chosen[sample.layer]:
            return
        config, count, rows = self.model.config, self.text_tokens, None
        if self.prompts:
            rows = rows_by_prompts(self.prompts, sample.input_TH[count:], drawn_std(self.spec, config))
        if not count:
            self.found[sample.layer] = LayerMeasurement(router_rows=rows)
            return
        text = MlpSample(
            layer=sample.layer,
            input_TH=sample.input_TH[:count],
            hidden_TF=sample.hidden_TF[:count],
            output_TH=sample.output_TH[:count],
        )
        self.found[sample.layer] = measure_layer(self.spec, config, text, self._mlp(sample.layer), rows)

    def _mlp(self, layer: int) -> DenseMlp:
        fc1, fc2 = (self.model.tensors[f"decoder.layers.{layer}.mlp.linear_fc{number}.weight"] for number in (1, 2))
        return DenseMlp(layer, fc1, fc2, self.model.config.ffn_hidden_size, self.model.config.gated_linear_unit)


def _refuse_without_text(spec: UpcycleSpec) -> None:
    by_method = spec.method in MIXTURE_METHODS or spec.clusters_neurons
    what = f"method {spec.method}" if by_method else f"router_init {spec.router_init}"
    raise BadInputError(f"{what} decides by activations: give a text with --calibrate FILE")


def _check_prompts(spec: UpcycleSpec, prompts: Sequence[ExpertPrompts]) -> None:
    if not prompts:
        raise BadInputError("router_init hidden-state needs prompts: give them with --prompts FILE")
    if len(prompts) != rows_of_router(spec):
        raise BadInputError(
            f"prompts are given for {len(prompts)} rows of the router, but it has {rows_of_router(spec)}: one for each "
            + ("expert" if rows_of_router(spec) == spec.num_experts else f"group of {spec.granularity} experts")
        )
