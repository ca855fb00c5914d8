"""Every way to write a model that a generated list holds, and whether Megatron could be asked for it.

`expected` says from the sizes alone whether a layout is possible. It is written for this list and shares nothing with
the converter, so that a refusal nobody expects and a layout that should have been refused both show.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import open_model
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.reshard import plan_reshard

STACKED, PER_LAYER = "torch_dist", "torch_dist, layers in keys"
LEGACY = ("legacy te", "legacy te-sequential", "legacy local", "legacy oldest")
FORMATS = (STACKED, PER_LAYER, *LEGACY)


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to write a Megatron checkpoint."""

    form: str
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int | None = None
    first: int | None = None
    last: int | None = None

    @property
    def layout(self) -> ParallelLayout:
        sizes = {"tp": self.tp, "pp": self.pp, "vpp": self.vpp, "ep": self.ep, "etp": self.etp}
        return ParallelLayout(**sizes, first_stage_layers=self.first, last_stage_layers=self.last)

    @property
    def to(self) -> str:
        return "torch" if self.form.startswith("legacy") else "torch_dist"

    def options(self) -> ConvertOptions:
        names = {"legacy_names": self.form.removeprefix("legacy ")} if self.to == "torch" else {}
        return ConvertOptions(
            layout=self.layout,
            per_layer_keys=self.form == PER_LAYER,
            max_file_size=300_000,
            workers=1,
            **names,
        )

    def __str__(self) -> str:
        sizes = {"tp": self.tp, "pp": self.pp, "vpp": self.vpp, "ep": self.ep}
        told = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        told += [f"{name} {size}" for name in ("etp", "first", "last") if (size := getattr(self, name)) is not None]
        return f"{self.form} ({' '.join(told) or 'one rank'})"


def ways(is_moe: bool) -> list[Way]:
    """The whole list for a model, in a fixed order."""
    pipelines = [(1, 1, None, None)]
    for pp, vpp in ((2, 1), (2, 2), (4, 1), (4, 2), (3, 1)):
        ends = ((None, None), (1, None), (None, 1), (1, 1), (2, None), (3, 1), (2, 2), (None, 3))
        pipelines += [(pp, vpp, first, last) for first, last in ends]
    experts = (
        [(ep, etp) for ep in (1, 2, 4, 8, 3) for etp in (None, 1, 2, 4)] if is_moe else [(1, None), (1, 1), (2, None)]
    )
    return [
        Way(form=form, tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp, first=first, last=last)
        for form, tp, (pp, vpp, first, last), (ep, etp) in itertools.product(FORMATS, (1, 2, 4, 3), pipelines, experts)
    ]


def expected(way: Way, config: ModelConfig) -> str:
    """Why a layout is impossible; "" when it is possible."""
    if config.num_attention_heads % way.tp or config.num_query_groups % way.tp:
        return "heads do not split"
    experts, layers = config.num_moe_experts, range(config.num_layers)
    if any(not config.is_moe_layer(i) for i in layers) and config.ffn_hidden_size % way.tp:
        return "ffn does not split"
    etp = way.tp if way.etp is None else way.etp
    if experts is None:
        if way.ep > 1 or (way.etp or 1) > 1:
            return "no experts"
    elif experts % way.ep or (config.moe_ffn_hidden_size or 0) % etp:
        return "experts do not split"
    elif (config.moe_shared_expert_intermediate_size or 0) % way.tp:
        return "shared expert does not split"
    if not _layers_fit(way, config.num_layers):
        return "layers do not split"
    if way.to == "torch":
        if experts is not None and (etp > way.tp or way.tp % etp):
            return "no legacy name tells the experts' ranks"
        if way.form == "legacy oldest" and (experts is not None or config.qk_layernorm):
            return "the oldest names have no such modules"
    return ""


def _layers_fit(way: Way, num_layers: int) -> bool:
    """By dealing them: the ends take theirs, the others the same number each, every rank's in equal chunks."""
    ranks = [0] * way.pp
    if way.first is not None:
        ranks[0] = way.first
    if way.last is not None:
        ranks[-1] = way.last
    others = [i for i, taken in enumerate(ranks) if not taken]
    left = num_layers - sum(ranks)
    if left < 0 or (way.pp == 1 and (way.first or way.last)):
        return False
    while left > 0 and others:
        for i in others:
            ranks[i] += 1
        left -= len(others)
    return left == 0 and all(count % way.vpp == 0 for count in ranks)


@dataclass
class Tally:
    """What became of a list: counts, reasons of refusals, and everything that went wrong."""

    identical: int = 0
    resharded: int = 0
    refused: dict[str, int] = field(default_factory=dict[str, int])
    failures: list[str] = field(default_factory=list[str])


class Traveller:
    """Takes one model there and back, in a scratch folder."""

    def __init__(self, source: Path, scratch: Path, tally: Tally) -> None:
        self.source, self.scratch, self.tally = source, scratch, tally
        self.model = open_model(source)
        self.held = tensors(source)

    def there_and_back(self, way: Way) -> None:
        """HF -> X -> HF. A refusal is compared with what was to be expected."""
        target, back = self.scratch / "there", self.scratch / "back"
        try:
            if self._refused_rightly(way, target):
                return
            execute(plan_conversion(self.model, target, way.to, way.options()))  # type: ignore[arg-type]
            if told := self._difference(target, back):
                self.tally.failures.append(f"{self.source.name} as {way}: {told}")
            else:
                self.tally.identical += 1
        except Exception as error:
            self.tally.failures.append(f"{self.source.name} as {way}: {type(error).__name__}: {error}")
        finally:
            for folder in self.scratch.iterdir():
                shutil.rmtree(folder)

    def through(self, way: Way, other: Way) -> None:
        """HF -> X -> reshard Y -> HF, both possible."""
        target, again, back = (self.scratch / name for name in ("there", "again", "back"))
        try:
            execute(plan_conversion(self.model, target, way.to, way.options()))  # type: ignore[arg-type]
            execute(plan_reshard(open_model(target), again, other.to, other.options()))  # type: ignore[arg-type]
            if told := self._difference(again, back):
                self.tally.failures.append(f"{self.source.name} as {way}, then {other}: {told}")
            else:
                self.tally.resharded += 1
        except Exception as error:
            self.tally.failures.append(f"{self.source.name} as {way}, then {other}: {type(error).__name__}: {error}")
        finally:
            for folder in self.scratch.iterdir():
                shutil.rmtree(folder)

    def _refused_rightly(self, way: Way, target: Path) -> bool:
        reason = expected(way, self.model.config)
        try:
            plan_conversion(self.model, target, way.to, way.options())  # type: ignore[arg-type]
        except BadInputError as error:
            if not reason:
                raise
            self.tally.refused[reason] = self.tally.refused.get(reason, 0) + 1
            if target.exists():
                raise AssertionError("was refused, but left something") from error
            return True
        if reason:
            raise AssertionError(f"was not refused, although: {reason}")
        return False

    def _difference(self, megatron: Path, back: Path) -> str:
        execute(plan_conversion(open_model(megatron), back, "hf", ConvertOptions(workers=1)))
        found = tensors(back)
        if found.keys() != self.held.keys():
            return f"names differ: {sorted(found.keys() ^ self.held.keys())[:4]}"
        for name, tensor in self.held.items():
            if tensor.dtype != found[name].dtype or not torch.equal(bits(tensor), bits(found[name])):
                return f"{name} differs"
        if (back / "config.json").read_bytes() != (self.source / "config.json").read_bytes():
            return "config.json differs"
        return ""


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a Hugging Face folder, by safetensors' own reader."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def bits(tensor: Tensor) -> Tensor:
    """The bytes, so that a NaN equals itself and minus zero does not equal zero."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def possible(config: ModelConfig) -> Iterator[Way]:
    """The ways of the list in which this model can be written."""
    return (way for way in ways(config.num_moe_experts is not None) if not expected(way, config))
