"""Dense -> mixture of experts, as a view: no tensor is read until the result is written.

Notation of He et al. 2024 (arXiv 2410.07524): granularity G = dense width / expert width, N experts are E = N / G
copies of the dense MLP, T is top-k. Expert e = group * G + shard holds neurons [shard * F/G, (shard + 1) * F/G).
The E router rows are drawn once each and repeated G times, so a token whose T is a multiple of G always meets
whole groups: every shard equally often. Under weights that sum to one the mixture equals the dense MLP when each
expert's output is scaled by G.

SwiGLU is linear in up_proj and down_proj but not in gate_proj, so the scale is split between those two; the
published cube root on all three is off by 13-26 % of the MLP's output. Factors are powers of two where G is one,
so that bf16 weights lose nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.fields import IRRELEVANT, write_config
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.mcore.keys import layer_of
from ckptbridge.converters.model import Model
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.registry import family_named
from ckptbridge.converters.tensors import Checkpoint, Computed, LazyTensor, Zeros, columns, join_rows, rows, scaled

Method = Literal["copy", "virtual-group"]

TARGETS = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
"""The Hugging Face class that each dense family becomes unless another is named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpcycleSpec:
    """How to upcycle. `num_experts` is N, `topk` T, `granularity` G of the module's notation."""

    num_experts: int
    topk: int
    granularity: int = 1
    method: Method | None = None
    """None: copy for granularity 1, virtual-group above."""
    to: str | None = None
    """The family of the result; None takes the one that fits the source."""
    router_std: float | None = None
    """Standard deviation of the router's rows; None takes the model's own initialisation."""
    seed: int = 0

    @property
    def resolved_method(self) -> Method:
        return self.method or ("copy" if self.granularity == 1 else "virtual-group")

    def check(self, dense: ModelConfig) -> None:
        """Raises BadInputError, naming the numbers, for what cannot compute what the dense model computes."""
        n, t, g = self.num_experts, self.topk, self.granularity
        if self.method not in (None, "copy", "virtual-group"):
            raise BadInputError(f"method is {self.method!r}; known are 'copy' and 'virtual-group'")
        if not 0 <= self.seed < 2**40:
            raise BadInputError(f"seed is {self.seed}: it must lie between 0 and 2**40")
        if self.router_std is not None and not 0 <= self.router_std < math.inf:
            raise BadInputError(f"router_std is {self.router_std}: it must be a number from 0")
        if dense.num_moe_experts is not None:
            raise BadInputError(
                f"the source has {dense.num_moe_experts} experts already: only dense models are upcycled"
            )
        if min(n, t, g) < 1:
            raise BadInputError(f"num_experts {n}, topk {t} and granularity {g} must each be at least 1")
        if self.resolved_method == "copy" and g != 1:
            raise BadInputError(f"method copy makes whole copies, but granularity is {g}; use --method virtual-group")
        if n % g:
            raise BadInputError(f"num_experts {n} is not a multiple of granularity {g}: a group would lack a shard")
        if dense.ffn_hidden_size % g:
            raise BadInputError(f"the MLP's width {dense.ffn_hidden_size} is not a multiple of granularity {g}")
        if t % g:
            raise BadInputError(
                f"topk {t} is not a multiple of granularity {g}: a token would meet some shards more often "
                "than others, "
                f"and the result would not compute what the dense model does. Use --topk {max(g, t // g * g)} "
                f"or {(t // g + 1) * g}"
            )
        if t > n:
            raise BadInputError(f"topk {t} exceeds num_experts {n}")


def upcycled(source: Model, spec: UpcycleSpec) -> Model:
    """The source as a mixture of experts that computes the same function; nothing is read yet.

    Raises BadInputError for numbers that do not fit, NotSupportedError for a target that cannot express the model.
    """
    spec.check(source.config)
    family, notes = _target(source, spec)
    config = _config(source.config, spec, family)
    tensors = _tensors(source.tensors, source.config, config, spec)
    return replace(
        source,
        family=family,
        config=config,
        tensors=tensors,
        hf_config=_hf_config(source, family, config),
        hf_config_file=None,
        notes=(*source.notes, *notes),
        derivation=repr(spec),
    )


def _target(source: Model, spec: UpcycleSpec) -> tuple[Family, list[str]]:
    known = TARGETS.get(source.family.name)
    if known is None:
        raise NotSupportedError(
            f"{source.path}: {source.family.name} cannot be upcycled; dense families are {', '.join(TARGETS)}"
        )
    name = spec.to or known
    if name not in TARGETS.values():
        raise NotSupportedError(
            f"--to {name}: not a mixture of experts; known are {', '.join(sorted(set(TARGETS.values())))}"
        )
    family = family_named(name)
    notes = [
        f"{source.family.architecture} becomes {family.architecture}" + ("" if spec.to else ", the class that fits it")
    ]
    if name == "mixtral" and spec.granularity > 1:
        notes.append(
            "transformers computes Mixtral's router in the model's dtype: in bf16 0.2-0.4 % of tokens tie "
            "across groups "
            "and meet a shard twice; verify in fp32, train with the router in fp32"
        )
    if spec.granularity > 1 and spec.router_std is None:
        notes.append(
            "the router is drawn with the model's own standard deviation; tokens then lie near the borders between "
            "groups, and training tears groups apart: SmolLM2 got worse in its first 16 steps, and better with "
            "--router-std 0.3"
        )
    if name == "qwen2_moe":
        notes.append(
            "Qwen2Moe wants a shared expert: its down_proj is zero, so that it adds nothing until it is trained"
        )
    return family, notes


def _config(dense: ModelConfig, spec: UpcycleSpec, family: Family) -> ModelConfig:
    width = dense.ffn_hidden_size // spec.granularity
    has_shared_expert = family.name == "qwen2_moe"
    config = replace(
        dense,
        ffn_hidden_size=width if family.name == "mixtral" else dense.ffn_hidden_size,
        num_moe_experts=spec.num_experts,
        moe_ffn_hidden_size=width,
        moe_layer_freq=1,
        moe_router_topk=spec.topk,
        moe_router_pre_softmax=False,
        moe_shared_expert_intermediate_size=width if has_shared_expert else None,
        moe_shared_expert_gate=has_shared_expert,
        moe_aux_loss_coeff=0.001,
    )
    write_config(family.fields, config)
    return config


def _hf_config(source: Model, family: Family, config: ModelConfig) -> dict[str, Any]:
    kept = {name: value for name, value in source.hf_config.items() if name.endswith("_token_id") and value is not None}
    kept |= {
        n: source.hf_config[n]
        for n in IRRELEVANT.names
        if n in ("use_cache", "torch_dtype", "dtype") and n in source.hf_config
    }
    return {
        **kept,
        "architectures": [family.architecture],
        "model_type": family.name,
        **write_config(family.fields, config),
    }


def scale_factors(scale: float) -> tuple[float, float]:
    """(factor of up_proj, factor of down_proj) with product `scale`; the first is the power of two next to its root."""
    up = 2.0 ** math.floor(math.log2(scale) / 2)
    return up, scale / up


def _tensors(dense: Checkpoint, old: ModelConfig, new: ModelConfig, spec: UpcycleSpec) -> Checkpoint:
    up_factor, down_factor = scale_factors(float(spec.granularity))
    width = old.ffn_hidden_size // spec.granularity
    made: dict[str, LazyTensor] = {}
    for name, tensor in dense.items():
        head, mlp, tail = name.partition(".mlp.")
        if not mlp:
            made[name] = tensor
        elif tail == "linear_fc1.layer_norm_weight":
            made[f"{head}.pre_mlp_layernorm.weight"] = tensor
            made[f"{head}.mlp.router.weight"] = _router(new, spec, layer_of(name) or 0, tensor.dtype)
        elif tail == "linear_fc1.weight":
            shards = [
                _fc1_shard(tensor, old.ffn_hidden_size, j * width, width, up_factor) for j in range(spec.granularity)
            ]
            made |= _experts(head, "linear_fc1", shards, spec)
            if new.moe_shared_expert_intermediate_size:
                shared = _fc1_shard(tensor, old.ffn_hidden_size, 0, new.moe_shared_expert_intermediate_size, 1.0)
                made[f"{head}.mlp.shared_experts.linear_fc1.weight"] = shared
        else:
            shards = [scaled(columns(tensor, j * width, (j + 1) * width), down_factor) for j in range(spec.granularity)]
            made |= _experts(head, "linear_fc2", shards, spec)
            if shared_width := new.moe_shared_expert_intermediate_size:
                zeros = Zeros((new.hidden_size, shared_width), tensor.dtype)
                made[f"{head}.mlp.shared_experts.linear_fc2.weight"] = zeros
                made[f"{head}.mlp.shared_experts.gate_weight"] = Zeros((1, new.hidden_size), tensor.dtype)
    return made


def _experts(head: str, matrix: str, shards: list[LazyTensor], spec: UpcycleSpec) -> dict[str, LazyTensor]:
    return {
        f"{head}.mlp.experts.experts.{expert}.{matrix}.weight": shards[expert % spec.granularity]
        for expert in range(spec.num_experts)
    }


def _fc1_shard(fc1: LazyTensor, ffn: int, start: int, width: int, up_factor: float) -> LazyTensor:
    """[gate_proj; up_proj] of neurons [start, start + width)."""
    gate_proj = rows(fc1, start, start + width)
    up_proj = rows(fc1, ffn + start, ffn + start + width)
    return join_rows([gate_proj, scaled(up_proj, up_factor)])


def _router(config: ModelConfig, spec: UpcycleSpec, layer: int, dtype: torch.dtype) -> LazyTensor:
    """One row a group, repeated for its shards. Seeded by (seed, layer): any rank, order or resume draws the same."""
    groups = spec.num_experts // spec.granularity
    std = config.init_method_std if spec.router_std is None else spec.router_std

    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(spec.seed * 1_000_003 + layer)
        drawn = torch.randn(groups, config.hidden_size, generator=generator) * std
        return drawn.to(dtype).repeat_interleave(spec.granularity, 0)

    return Computed((spec.num_experts, config.hidden_size), dtype, _rows_of(draw))


def _rows_of(make: Callable[[], Tensor]) -> Callable[[int, int], Tensor]:
    return lambda start, stop: make()[start:stop]
