"""What a method has to know of a layer, out of what the layer's dense MLP did on a text.

Shapes: T tokens, H hidden_size, F dense width, N experts.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.upcycling.activity import sizes
from ckptbridge.converters.upcycling.calibration import fitted_scale
from ckptbridge.converters.upcycling.carving import carved
from ckptbridge.converters.upcycling.fitted_routers import fitted_rows, representative_rows
from ckptbridge.converters.upcycling.measured import LayerMeasurement, MlpSample
from ckptbridge.converters.upcycling.neurons import DenseMlp
from ckptbridge.converters.upcycling.partition import partition
from ckptbridge.converters.upcycling.routers import router_rows
from ckptbridge.converters.upcycling.spec import DENSE_METHODS, PARTITIONS, UpcycleSpec


def needs_text(spec: UpcycleSpec) -> bool:
    """Whether a method for dense models cannot do without a text; any may be given one to calibrate its factor."""
    spec = spec.resolved()
    return spec.method in DENSE_METHODS and (spec.clusters_neurons or spec.router_init in ("neurons", "fitted"))


def measure_layer(
    spec: UpcycleSpec, config: ModelConfig, sample: MlpSample, mlp: DenseMlp, rows: torch.Tensor | None = None
) -> LayerMeasurement:
    """What `upcycled` has to know of one layer of a dense model with this config.

    `rows` is the router, where prompts give it. The experts' neurons where the method clusters them; the router's rows
    where they are made of neurons; and the factor of the experts' outputs where the formula's is not exact: for
    partitions, and for softmax weights that are not divided by their sum.
    """
    spec = spec.resolved()
    measured = LayerMeasurement(router_rows=rows)
    sizes_TF = sizes(sample, mlp) if needs_text(spec) else None
    if sizes_TF is not None and spec.clusters_neurons:
        measured = replace(carved(spec, mlp.layer, sizes_TF), router_rows=rows)
    cut = partition(spec, mlp.layer, mlp.width, measured)
    std = spec.router_std
    if sizes_TF is not None and spec.router_init == "neurons":
        found = representative_rows(sizes_TF, cut.groups[0], mlp, sample.input_TH, std)
        measured = replace(measured, router_rows=found)
    elif sizes_TF is not None and spec.router_init == "fitted":
        measured = replace(measured, router_rows=fitted_rows(sizes_TF, cut.groups[0], sample.input_TH, std))
    if spec.method not in PARTITIONS and spec.router != "pre-softmax":
        return measured
    router_NH = router_rows(spec, config, mlp.layer, mlp.fc1.dtype, measured).read()
    return replace(measured, scale=fitted_scale(spec, sample, mlp, cut, router_NH))
