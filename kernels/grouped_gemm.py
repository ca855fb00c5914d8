"""Matrix products of a mixture of experts: rows that are sorted by expert, each times its expert's matrix.

`ends_E` says on the device where each expert's rows end: nobody waits for it, and a step of any routing is the same
CUDA graph. Rows from ends_E[-1] on belong to nobody: they may hold anything, NaN too, and no result reads them.

| backend            | runs                                                                                       |
|--------------------|--------------------------------------------------------------------------------------------|
| reference          | an expert after another, sums in fp32; on a GPU it waits for ends_E                        |
| torch              | torch._grouped_mm; a weight gradient is rounded to bf16 on its way                         |
| triton             | the kernels of this package; gathers on load, sums weight gradients in fp32 in place       |
| quack              | QuACK's kernels, see `grouped_quack.py`; sums weight gradients in fp32 in place            |
| transformer_engine | cuBLAS by Transformer Engine, likewise; waits for ends_E, so it cannot be in a CUDA graph  |

All but triton copy gathered rows first.

Compute-bound: 2 R N K operations each.
"""

# Shapes: R routed rows, T tokens, E experts, K depth of a sum, N output columns; O outputs and I inputs of an expert.

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ckptbridge.kernels.arguments import check_shape, check_tensor
from ckptbridge.kernels.grouped_backend import MULTIPLES_OF_8, ProductsBackend, require_products
from ckptbridge.kernels.grouped_config import GroupedConfig, Product, config_for
from ckptbridge.kernels.grouped_matmul import launch_matmul
from ckptbridge.kernels.grouped_quack import quack_matmul, quack_weight_gradient
from ckptbridge.kernels.grouped_transformer_engine import (
    transformer_engine_matmul,
    transformer_engine_weight_gradient,
)
from ckptbridge.kernels.grouped_weight_gradient import launch_weight_gradient


def grouped_matmul(
    a: Tensor,
    weight: Tensor,
    ends_E: Tensor,
    *,
    transposed: bool,
    rows_R: Tensor | None = None,
    backend: ProductsBackend = "reference",
    config: GroupedConfig | None = None,
) -> Tensor:
    """Multiply each row by its expert's matrix, or by that matrix's transpose: [R, N].

    a: [R, K]; with `rows_R`, [T, K], and row r of the product is that of a[rows_R[r]], or zero where rows_R[r] is -1.
    weight: [E, N, K] if `transposed` (the layout of a linear layer's weight), else [E, K, N].
    ends_E: int32 [E], not decreasing; expert e has the rows [ends_E[e - 1], ends_E[e]). What the product holds from
    row ends_E[-1] on is undefined. fp32 (reference alone) or bf16; `config` overrides the knobs of the triton backend.
    Not differentiable by itself. Raises ValueError for an argument that does not fit, and BackendError when `backend`
    cannot run on the device of `a`.
    """
    operation = "grouped_matmul"
    _check_operands(operation, a=a, weight=weight, ends_E=ends_E, rows_R=rows_R)
    E, N, K = weight.shape if transposed else (weight.shape[0], weight.shape[2], weight.shape[1])
    check_shape(operation, "a", a, (a.shape[0], K), f"the depth of weight {tuple(weight.shape)}")
    check_shape(operation, "ends_E", ends_E, (E,), "the experts of weight")
    _require(operation, backend, a, N, K)
    R = a.shape[0] if rows_R is None else rows_R.shape[0]
    if backend == "triton":
        out_RN = a.new_empty(R, N)
        kind = "gathered" if rows_R is not None else "transposed" if transposed else "plain"
        config = config or config_for(Product(kind=kind, E=E, rows=R, columns=N, depth=K), a.device)
        launch_matmul(a, weight, ends_E, rows_R, out_RN, transposed=transposed, config=config)
        return out_RN
    a = a if rows_R is None else _gathered(a, rows_R)
    weight_EKN = weight.transpose(1, 2) if transposed else weight
    if backend == "torch":
        return torch._grouped_mm(a, weight_EKN, offs=ends_E)
    if backend == "quack":
        return quack_matmul(a, weight_EKN, ends_E)
    if backend == "transformer_engine":
        return transformer_engine_matmul(a, weight, ends_E, transposed=transposed)
    return grouped_matmul_reference(a, weight_EKN, ends_E)


def grouped_matmul_reference(a_RK: Tensor, weight_EKN: Tensor, ends_E: Tensor) -> Tensor:
    """The definition. Also takes fp64, which then is fp64 throughout."""
    out_RN = a_RK.new_empty(a_RK.shape[0], weight_EKN.shape[2])
    for expert, rows in _rows_of_experts(ends_E):
        out_RN[rows] = (_wide(a_RK[rows]) @ _wide(weight_EKN[expert])).to(a_RK.dtype)
    return out_RN


def grouped_weight_gradient(
    d: Tensor,
    x: Tensor,
    ends_E: Tensor,
    out_EOI: Tensor,
    *,
    accumulate: bool,
    d_rows_R: Tensor | None = None,
    x_rows_R: Tensor | None = None,
    sums_squares: bool = False,
    backend: ProductsBackend = "reference",
    config: GroupedConfig | None = None,
) -> Tensor | None:
    """Write each expert's sum over its rows of d^T x into out_EOI, or add it to what is there.

    With `sums_squares` returns fp32 numbers that add up to the squares of all of out_EOI, where the backend has them in
    registers: triton, of an fp32 gradient that is written and not added to. Else None.

    d: [R, O]; with `d_rows_R`, [T, O], of which row r is d[d_rows_R[r]], or zeros where that is -1. x: [R, I], and
    `x_rows_R`, likewise. ends_E as in `grouped_matmul`. out_EOI: [E, O, I], fp32 or bf16; to accumulate, fp32. An
    expert without rows counts as a sum of zero. Raises as `grouped_matmul` does.
    """
    operation = "grouped_weight_gradient"
    _check_operands(operation, d=d, x=x, ends_E=ends_E, d_rows_R=d_rows_R, x_rows_R=x_rows_R)
    check_tensor(operation, "out_EOI", out_EOI, like=d)
    E, outputs, inputs = ends_E.shape[0], d.shape[1], x.shape[1]
    check_shape(operation, "out_EOI", out_EOI, (E, outputs, inputs), "the experts of ends_E, the columns of d and of x")
    if accumulate and out_EOI.dtype != torch.float32:
        raise ValueError(f"{operation}: out_EOI: expected torch.float32 to accumulate in, found {out_EOI.dtype}")
    rows = {len(d) if d_rows_R is None else len(d_rows_R), len(x) if x_rows_R is None else len(x_rows_R)}
    if len(rows) > 1:
        raise ValueError(f"{operation}: expected as many rows of d as of x, found {' and '.join(map(str, rows))}")
    _require(operation, backend, d, outputs, inputs)
    if backend == "triton":
        kind = (
            "of_gathered_x" if x_rows_R is not None else "of_gathered_d" if d_rows_R is not None else "weight_gradient"
        )
        product = Product(kind=kind, E=E, rows=outputs, columns=inputs, depth=rows.pop())
        config = config or config_for(product, d.device)
        sums_squares = sums_squares and out_EOI.dtype == torch.float32 and not accumulate
        return launch_weight_gradient(
            d, x, ends_E, d_rows_R, x_rows_R, out_EOI, accumulate=accumulate, sums_squares=sums_squares, config=config
        )
    d = d if d_rows_R is None else _gathered(d, d_rows_R)
    x = x if x_rows_R is None else _gathered(x, x_rows_R)
    if backend == "torch":
        gradient = torch._grouped_mm(d.t(), x, offs=ends_E)
        out_EOI.add_(gradient) if accumulate else out_EOI.copy_(gradient)
    elif backend == "quack":
        quack_weight_gradient(d, x, ends_E, out_EOI, accumulate=accumulate)
    elif backend == "transformer_engine":
        transformer_engine_weight_gradient(d, x, ends_E, out_EOI, accumulate=accumulate)
    else:
        for expert, rows_of_expert in _rows_of_experts(ends_E):
            gradient = _wide(d[rows_of_expert]).t() @ _wide(x[rows_of_expert])
            out_EOI[expert] = out_EOI[expert] + gradient if accumulate else gradient
    return None


def _check_operands(operation: str, *, ends_E: Tensor, **operands: Tensor | None) -> None:
    """Matrices of one dtype, indices of int32, all on one device."""
    matrices = {name: tensor for name, tensor in operands.items() if not name.endswith("_R") and tensor is not None}
    like = next(iter(matrices.values()))
    for name, tensor in matrices.items():
        check_tensor(operation, name, tensor, like=like)
        if tensor.dtype != like.dtype:
            raise ValueError(f"{operation}: {name}: expected {like.dtype} like the others, found {tensor.dtype}")
        if tensor.ndim != (dimensions := 3 if name == "weight" else 2):
            expected = f"expected {dimensions} dimensions"
            raise ValueError(f"{operation}: {name}: {expected}, found shape {tuple(tensor.shape)}")
    indices = {name: tensor for name, tensor in operands.items() if name.endswith("_R")} | {"ends_E": ends_E}
    for name, tensor in indices.items():
        if tensor is None:
            continue
        if tensor.dtype != torch.int32 or tensor.ndim != 1 or not tensor.is_contiguous():
            raise ValueError(
                f"{operation}: {name}: expected a contiguous vector of torch.int32, "
                f"found {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
        if tensor.device != like.device:
            raise ValueError(f"{operation}: {name}: expected device {like.device}, found {tensor.device}")


def _require(operation: str, backend: ProductsBackend, operand: Tensor, *widths: int) -> None:
    require_products(backend, operand.device)
    if backend != "reference" and operand.dtype != torch.bfloat16:
        raise ValueError(f"{operation}: backend {backend}: expected torch.bfloat16, found {operand.dtype}")
    if backend in MULTIPLES_OF_8 and any(width % 8 for width in widths):
        found = " and ".join(map(str, widths))
        raise ValueError(f"{operation}: backend {backend}: expected widths of a multiple of 8, found {found}")


def _gathered(tensor: Tensor, rows_R: Tensor) -> Tensor:
    """A copy of the rows; zeros for -1. Indices behind the last expert's rows are garbage, so they are clamped."""
    present_R = (rows_R >= 0) & (rows_R < len(tensor))
    rows = tensor.index_select(0, rows_R.clamp(0, max(len(tensor) - 1, 0)))
    return rows.masked_fill_(~present_R[:, None], 0)


def _rows_of_experts(ends_E: Tensor) -> Iterator[tuple[int, slice]]:
    begin = 0
    for expert, end in enumerate(ends_E.tolist()):
        yield expert, slice(begin, end)
        begin = end


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
