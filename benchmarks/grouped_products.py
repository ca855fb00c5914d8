"""The grouped matrix products of a mixture layer's training step, for the models that are trained here."""

# Shapes: T tokens, E experts, K top-k, R = T K routed rows, H hidden size, F width of a half of [gate_proj; up_proj].

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ckptbridge.kernels.grouped_config import Product

DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A mixture layer. `T` is a training step's tokens on one GPU."""

    name: str
    E: int
    K: int
    H: int
    F: int
    T: int = 16384


MODELS = [
    Model(name="qwen3-30b-a3b", E=128, K=8, H=2048, F=768),
    Model(name="qwen2-57b-a14b", E=64, K=8, H=3584, F=2560),
    Model(name="llama3-e8t2", E=8, K=2, H=4096, F=14336),
    Model(name="mixtral-8x22b", E=8, K=2, H=6144, F=16384),
]
TINY = [Model(name="tiny", E=4, K=2, H=64, F=48, T=40)]


@dataclass(frozen=True, slots=True)
class Job:
    """One product of one model: `width` columns out of sums over `depth`; a weight gradient is [width, depth]."""

    model: Model
    name: str
    width: int
    depth: int
    transposed: bool = False
    is_gradient: bool = False
    gathered: str = ""  # which operand: a, d or x

    @property
    def R(self) -> int:
        return self.model.T * self.model.K

    @property
    def flops(self) -> int:
        return 2 * self.R * self.width * self.depth

    @property
    def product(self) -> Product:
        """What the winner is stored under."""
        if self.is_gradient:
            kind = f"of_gathered_{self.gathered}" if self.gathered else "weight_gradient"
            return Product(kind=kind, E=self.model.E, rows=self.width, columns=self.depth, depth=self.R)
        kind = "gathered" if self.gathered else "transposed" if self.transposed else "plain"
        return Product(kind=kind, E=self.model.E, rows=self.R, columns=self.width, depth=self.depth)


def jobs_of(model: Model) -> list[Job]:
    H, F = model.H, model.F
    return [
        Job(model, "fc1", 2 * F, H, transposed=True),
        Job(model, "fc1_wgrad", 2 * F, H, is_gradient=True),
        Job(model, "fc1_dgrad", H, 2 * F),
        Job(model, "fc1_gathered", 2 * F, H, transposed=True, gathered="a"),
        Job(model, "fc2", H, F, transposed=True),
        Job(model, "fc2_wgrad", H, F, is_gradient=True),
        Job(model, "fc2_dgrad", F, H),
        Job(model, "fc1_wgrad_gathered", 2 * F, H, is_gradient=True, gathered="x"),
        Job(model, "fc2_wgrad_gathered", H, F, is_gradient=True, gathered="d"),
    ]


@dataclass(slots=True)
class Operands:
    """The tensors of a job. `first` is a or d, `second` the weight or x; `out` is written."""

    first: Tensor
    second: Tensor
    out: Tensor
    ends_E: Tensor
    tokens_R: Tensor


def operands_of(job: Job, device: torch.device | str) -> Operands:
    """Random ones with a random routing. On the device "meta": shapes and types alone, for compiling."""
    model, R = job.model, job.R
    real = str(device) != "meta"
    generator = torch.Generator(device).manual_seed(0) if real else None

    def draw(*shape: int) -> Tensor:
        tensor = torch.empty(shape, dtype=DTYPE, device=device)
        return tensor.normal_(generator=generator) if real else tensor

    first_rows = model.T if job.gathered in ("a", "d") else R
    if job.is_gradient:
        first, second = draw(first_rows, job.width), draw(model.T if job.gathered == "x" else R, job.depth)
        out = torch.empty(model.E, job.width, job.depth, dtype=torch.float32, device=device)
    else:
        first = draw(first_rows, job.depth)
        second = draw(model.E, job.width, job.depth) if job.transposed else draw(model.E, job.depth, job.width)
        out = torch.empty(R, job.width, dtype=DTYPE, device=device)
    if not real:
        indices = torch.empty(R, dtype=torch.int32, device=device)
        return Operands(first, second, out, indices[: model.E], indices)
    # Uneven routing: some experts are liked up to twice as much as others.
    liking = torch.rand(model.E, device=device, generator=generator)
    noise = torch.rand(model.T, model.E, device=device, generator=generator).log().neg().log().neg()
    experts_R = (liking.add(1).log() + noise).topk(model.K, dim=1).indices.flatten()
    order = experts_R.argsort(stable=True)
    ends_E = torch.bincount(experts_R, minlength=model.E).cumsum(0).int()
    return Operands(first, second, out, ends_E, (order // model.K).int())
