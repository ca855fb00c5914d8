"""A checkpoint's tensors into a decoder's parameters, one by one; refused whole unless names and shapes agree."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.fold import folded
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.tensors import Checkpoint, LazyTensor
from ckptbridge.trainer.decoder import Decoder
from ckptbridge.trainer.router import Router

_READ_BYTES = 64 << 20
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias")


def empty_decoder(config: ModelConfig, backend: str, dtype: torch.dtype, device: torch.device) -> Decoder:
    """A decoder in memory whose parameters are NaN: what nobody writes afterwards shows in `check_values`."""
    with torch.device("meta"):
        decoder = Decoder(config, backend)
    decoder = decoder.to(dtype)
    for module in decoder.modules():
        if isinstance(module, Router) and module.expert_bias is not None:
            module.expert_bias.data = module.expert_bias.data.float()  # rounded, it would choose other experts
    decoder = decoder.to_empty(device=device)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.fill_(float("nan"))
    return decoder


def load_weights(decoder: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy every tensor of the checkpoint into the parameter of its name; see `load_tensors`."""
    load_tensors(dict(decoder.named_parameters()), checkpoint)


def load_tensors(targets: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    """Copy every tensor of the checkpoint into the target of its name, cast to the target's dtype.

    A vocabulary padded beyond the model's own loses its padding rows. Raises BadInputError before anything is
    copied, listing every missing, unexpected and misshapen name (layers folded), if the checkpoint is not this
    model's. At most 64 MiB are read at a time.
    """
    check_names_and_shapes(targets, checkpoint)
    with torch.no_grad():
        for name, target in targets.items():
            _copy(checkpoint[name], target)


def read_as(tensor: LazyTensor, dtype: torch.dtype) -> Tensor:
    """The whole tensor in a dtype; at most 64 MiB of it are in memory in its own as well."""
    made = torch.empty(tensor.shape, dtype=dtype)
    _copy(tensor, made)
    return made


def check_names_and_shapes(targets: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    """Raises BadInputError listing every missing, unexpected and misshapen name (layers folded)."""
    problems = [f"missing: {name}" for name in folded(n for n in targets if n not in checkpoint)]
    problems += [f"unexpected: {name}" for name in folded(n for n in checkpoint if n not in targets)]
    wrong: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for name in (name for name in targets if name in checkpoint):
        expected, found = tuple(targets[name].shape), tuple(checkpoint[name].shape)
        padded = name in _VOCABULARY and found[0] > expected[0] and found[1:] == expected[1:]
        if found != expected and not padded:
            wrong.setdefault((expected, found), []).append(name)
    for (expected, found), names in wrong.items():
        for name in folded(names):
            problems.append(f"shape of {name}: the model has {list(expected)}, the checkpoint {list(found)}")
    if problems:
        raise BadInputError(
            "the checkpoint is not this model's:\n  " + "\n  ".join(problems) + "\n"
            "does its config.json (or its saved args) belong to these weights?"
        )


def _copy(source: LazyTensor, target: Tensor) -> None:
    step = max(1, _READ_BYTES // max(1, source.row_nbytes, source.work_row_nbytes))
    for start in range(0, target.shape[0], step):
        stop = min(start + step, target.shape[0])
        target[start:stop].copy_(source.read_rows(start, stop))


def check_values(decoder: Decoder) -> None:
    """Refuse weights that no training produces: raises BadInputError with every offender (see `unlikely_weights`)."""
    if problems := unlikely_weights(decoder):
        raise BadInputError(
            "these weights cannot be a model's:\n  " + "\n  ".join(problems) + "\nis the checkpoint damaged?"
        )


def unlikely_weights(decoder: Decoder) -> list[str]:
    """What no training produces, a line each: NaN, infinity, a root mean square above 1000, a blank matrix.

    Matrices that may start at zero are let through: biases, routers, shared experts, and the projections back
    into the residual stream (linear_proj, linear_fc2), which some add-on layers begin with, and norms that are
    around zero.
    """
    problems: dict[str, list[str]] = {}
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            norm = torch.linalg.vector_norm(parameter, dtype=torch.float32)
            size = (norm / parameter.numel() ** 0.5).item()
            if not torch.isfinite(norm):
                problems.setdefault("holds NaN or infinity, or was never written", []).append(name)
            elif size > 1000:
                problems.setdefault("has a root mean square above 1000", []).append(name)
            elif size == 0 and not _may_be_zero(name, norms=decoder.config.layernorm_zero_centered_gamma):
                problems.setdefault("is zero throughout", []).append(name)
    return [f"{name} {problem}" for problem, names in problems.items() for name in folded(names)]


def _may_be_zero(name: str, *, norms: bool) -> bool:
    parts = ("bias", "router", "shared_experts", "linear_proj.weight", "linear_fc2.weight")
    return any(part in name for part in parts) or (norms and "norm" in name)
