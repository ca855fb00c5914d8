"""Compile the grouped products for a GPU that is not here, and print a JSON line for each kernel.

python -m tests.kernels.compiled 90
"""

from __future__ import annotations

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget

from ckptbridge.kernels import grouped_config
from ckptbridge.kernels import grouped_matmul as matmul
from ckptbridge.kernels import grouped_weight_gradient as gradient
from ckptbridge.kernels.grouped_config import DEFAULT, SMALL, GroupedConfig

# Shapes: R rows, E experts, K the depth of a product with rows, N its columns.
E, R, K, N = 8, 4096, 1536, 2048


class Absent:
    """A driver without a device, which a compiler asks for its target alone."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def on_meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def variants(capability: int) -> list[tuple[str, GroupedConfig]]:
    """What the table has for this GPU, each kind of product with each config; else the default of all kinds."""
    entries = grouped_config._table().get(f"{capability // 10}.{capability % 10}", [])
    listed = {(entry["product"]["kind"], GroupedConfig(**entry["config"])) for entry in entries}
    if listed:
        return sorted(listed, key=str)
    config = SMALL if capability == 120 else DEFAULT
    return [(kind, config) for kind in ("transposed", "plain", "gathered", "weight_gradient")]


def compile_variant(kind: str, config: GroupedConfig, *, special: bool) -> int:
    """Bytes of shared memory. `special`: a weight gradient that leaves its squares, else one that is added to."""
    ends_E, indices = on_meta(E, dtype=torch.int32), on_meta(R, dtype=torch.int32)
    is_gluon = config.engine == "gluon"
    if is_gluon:
        from ckptbridge.kernels import grouped_hopper as hopper
    if kind in ("weight_gradient", "of_gathered_d", "of_gathered_x"):
        d, x, out = on_meta(R, N), on_meta(R, K), on_meta(E, N, K, dtype=torch.float32)
        squares = on_meta(132, config.block_rows, dtype=torch.float32) if special else None
        if is_gluon:
            kernel = hopper.weight_gradient_kernel
            arguments, knobs = hopper.weight_gradient_arguments(
                d, x, ends_E, out, squares, accumulate=not special, config=config
            )
        else:
            kernel = gradient._weight_gradient_kernel
            rows = (indices if kind == "of_gathered_d" else None, indices if kind == "of_gathered_x" else None)
            arguments, knobs = gradient.weight_gradient_arguments(
                d, x, ends_E, *rows, out, squares, accumulate=not special, config=config
            )
    else:
        transposed = kind != "plain"
        a, weight, out, table = on_meta(R, K), on_meta(E, N, K), on_meta(R, N), on_meta(99, 4, dtype=torch.int32)
        weight = weight if transposed else on_meta(E, K, N)
        if is_gluon:
            kernel = hopper.matmul_kernel
            arguments, knobs = hopper.matmul_arguments(a, weight, out, table, transposed=transposed, config=config)
        else:
            kernel = matmul._matmul_kernel
            rows = indices if kind == "gathered" else None
            arguments, knobs = matmul.matmul_arguments(
                a, weight, rows, out, table, transposed=transposed, config=config
            )
    return kernel.warmup(*arguments, grid=(1,), **knobs).metadata.shared


def main() -> None:
    capability = int(sys.argv[1])
    triton.runtime.driver.set_active(Absent(capability))
    for kind, config in variants(capability):
        for special in (False, True) if "gradient" in kind else (False,):
            shared = compile_variant(kind, config, special=special)
            made = {"kind": kind, "engine": config.engine, "shared": shared, "config": str(config)}
            sys.stdout.write(json.dumps(made) + "\n")


if __name__ == "__main__":
    main()
