"""Two checkpoints of any formats compared tensor by tensor, and why they differ where the reason can be known.

Both are compared as Megatron-Core parameters, so a Hugging Face folder and a torch_dist folder of one model have
no difference. Equal bytes are found by digest, in blocks; only a pair that differs is read into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ckptbridge.converters.block_causes import scale_cause
from ckptbridge.converters.blocks import digest_of
from ckptbridge.converters.layout import GATED, QKV
from ckptbridge.converters.mcore.keys import expert_of, layer_of
from ckptbridge.converters.model import Model
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.tensors import InMemory, LazyTensor

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One parameter that is not the same on both sides."""

    name: str
    cause: str
    """What would turn A into B, or "values differ"."""
    max_abs: float | None = None
    relative: float | None = None
    """|A - B| / |A| over the whole tensor; None where shapes differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffReport:
    """All differences; none means that both are one model, bit for bit."""

    a: str
    b: str
    equal: int
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    config: tuple[str, ...]
    """Fields of the configuration that differ: `name: A, B`."""
    differences: tuple[Difference, ...]

    @property
    def same(self) -> bool:
        return not (self.only_a or self.only_b or self.config or self.differences)

    def to_json(self) -> dict[str, Any]:
        return {"same": self.same, **asdict(self)}


def diff(a: Model, b: Model, progress: Progress | None = None) -> DiffReport:
    """Compare every parameter of two opened checkpoints, and what was passed through beside them.

    Raises BadInputError when a file turns out broken.
    """
    every_a, every_b = {**a.tensors, **a.beside}, {**b.tensors, **b.beside}
    shared = [name for name in every_a if name in every_b]
    total = sum(every_a[name].nbytes for name in shared)
    done = equal = 0
    unequal: dict[str, tuple[str, str]] = {}
    for name in shared:
        left, right = every_a[name], every_b[name]
        digests = digest_of(left), digest_of(right)
        if (left.shape, left.dtype, digests[0]) == (right.shape, right.dtype, digests[1]):
            equal += 1
        else:
            unequal[name] = digests
        done += left.nbytes
        if progress:
            progress(done, total)
    find = _Causes(a, b, unequal)
    return DiffReport(
        a=str(a.path),
        b=str(b.path),
        equal=equal,
        only_a=tuple(name for name in every_a if name not in every_b),
        only_b=tuple(name for name in every_b if name not in every_a),
        config=tuple(_config_differences(a.config, b.config)),
        differences=tuple(find.difference(name) for name in unequal),
    )


def _config_differences(a: ModelConfig, b: ModelConfig) -> Iterator[str]:
    left, right = asdict(a), asdict(b)
    yield from (f"{name}: {left[name]}, {right[name]}" for name in left if left[name] != right[name])


class _Causes:
    """Names the reason of a difference by trying what is known to go wrong."""

    def __init__(self, a: Model, b: Model, unequal: Mapping[str, tuple[str, str]]) -> None:
        self.a, self.b = a, b
        self._tensors = {**a.tensors, **a.beside}, {**b.tensors, **b.beside}
        self._layouts = {move.name: move.layout for move in a.family.moves(a.config)}
        self._named = {digest: name for name, (digest, _) in unequal.items()}
        self._digests_b = {name: digest for name, (_, digest) in unequal.items()}

    def difference(self, name: str) -> Difference:
        left, right = self._tensors[0][name], self._tensors[1][name]
        if cause := self._from_elsewhere(name):
            return _measured(name, cause, left, right)
        if left.shape != right.shape:
            transposed = left.shape == right.shape[::-1] and torch.equal(left.read().T, right.read())
            cause = "transposed" if transposed else f"shape {list(left.shape)} in A, {list(right.shape)} in B"
            return Difference(name=name, cause=cause)
        return _measured(name, self._within(name, left.read(), right.read()), left, right)

    def _from_elsewhere(self, name: str) -> str | None:
        """Whether B holds another parameter of A here: experts or layers that changed places."""
        other = self._named.get(self._digests_b[name])
        if other is None or other == name:
            return None
        if layer_of(other) == layer_of(name) and expert_of(other) is not None:
            return f"expert {expert_of(name)} holds expert {expert_of(other)} of A"
        return f"holds {other} of A"

    def _within(self, name: str, a: Tensor, b: Tensor) -> str:
        """What was done to the tensor's own values."""
        if a.dtype != b.dtype and (cause := _rounded(a, b)):
            return cause
        a, b = a.float(), b.float()
        if a.ndim == 2 and a.shape[0] == a.shape[1] and torch.equal(a.T, b):
            return "transposed"
        if (layout := self._layouts.get(name)) is None:  # passed through
            return _scale(a, b) or "values differ"
        if layout.name == GATED.name and torch.equal(torch.cat(a.chunk(2)[::-1]), b):
            return "gate_proj and up_proj swapped"
        if layout.name == QKV.name and (cause := _qkv_order(a, b, self.a.config)):
            return cause
        parts = [layout.unpack(side, self.a.config) for side in (self.a.tensors[name], self.b.tensors[name])]
        return scale_cause(*parts) or _scale(a, b) or "values differ"


def _rounded(a: Tensor, b: Tensor) -> str | None:
    """Which side is the other one rounded to its dtype: the narrower, also where no value needed it."""
    sides = sorted(((a, "A"), (b, "B")), key=lambda side: -side[0].dtype.itemsize)
    for (whole, here), (rounded, there) in (sides, sides[::-1]):
        if torch.equal(whole.to(rounded.dtype), rounded):
            return f"{_word(whole)} in {here}, rounded to {_word(rounded)} in {there}"
    return None


def _qkv_order(a: Tensor, b: Tensor, config: ModelConfig) -> str | None:
    q, k, v = (part.read() for part in QKV.unpack(InMemory(a), config))
    if torch.equal(torch.cat([q, k, v]), b):
        return "q, k and v stand one after the other in B, interleaved by group in A"
    if torch.equal(QKV.pack([InMemory(q), InMemory(v), InMemory(k)], config).read(), b):
        return "k and v swapped"
    other_q, other_k, other_v = (part.read() for part in QKV.unpack(InMemory(b), config))
    if torch.equal(torch.cat([other_q, other_k, other_v]), a):
        return "q, k and v stand one after the other in A, interleaved by group in B"
    if all(torch.equal(_sorted_rows(x), _sorted_rows(y)) for x, y in ((q, other_q), (k, other_k), (v, other_v))):
        return "the rows of q, k or v in another order (rope interleave, or heads moved)"
    return None


def _sorted_rows(tensor: Tensor) -> Tensor:
    return cast(Tensor, torch.unique(tensor.reshape(len(tensor), -1), dim=0))


def _scale(a: Tensor, b: Tensor) -> str | None:
    """A constant factor between the two, as a scale that was skipped or applied twice leaves it."""
    known = a.abs() > 1e-3 * a.abs().max()
    ratios = (b[known] / a[known]).double()
    if not ratios.numel():
        return None
    factor = ratios.median().item()
    if abs(factor - 1) > 0.01 and bool(((ratios - factor).abs() <= 0.01 * abs(factor)).all()):
        return f"scaled by {factor:.4g}"
    return None


def _measured(name: str, cause: str, left: LazyTensor, right: LazyTensor) -> Difference:
    if left.shape != right.shape:
        return Difference(name=name, cause=cause)
    a, b = left.read().double(), right.read().double()
    norm, distance = _norm(a), _norm(a - b)
    relative = distance / norm if norm else None
    return Difference(name=name, cause=cause, max_abs=(a - b).abs().max().item(), relative=relative)


def _norm(tensor: Tensor) -> float:
    return tensor.square().sum().sqrt().item()


def _word(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
