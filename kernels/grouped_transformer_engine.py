"""Grouped products by Transformer Engine: cuBLAS, a product an expert, on several streams. For comparison.

It takes the number of each expert's rows from the host, so every product waits for `ends_E`, and none can be part of a
CUDA graph. A weight gradient is summed in fp32 in place, as in ours.
"""

# Shapes: R routed rows, E experts, K depth of a sum, N output columns; O outputs and I inputs of an expert.

from __future__ import annotations

import importlib
from collections.abc import Sequence

from torch import Tensor


def transformer_engine_matmul(a_RK: Tensor, weight: Tensor, ends_E: Tensor, *, transposed: bool) -> Tensor:
    """Each row times its expert's matrix, [E, K, N], or with `transposed` the transpose of [E, N, K]: [R, N]."""
    out_RN = a_RK.new_empty(a_RK.shape[0], weight.shape[1 if transposed else 2])
    counts = _counts(ends_E)
    # cuBLAS counts in columns: the first letter is about the weight, the second about the rows.
    _grouped_gemm(weight, _parts(a_RK, counts), [out_RN], counts, layout="TN" if transposed else "NN", one_output=True)
    return out_RN


def transformer_engine_weight_gradient(
    d_RO: Tensor, x_RI: Tensor, ends_E: Tensor, out_EOI: Tensor, *, accumulate: bool
) -> None:
    """Each expert's d^T x, written to fp32 or bf16 memory or added to fp32."""
    counts = _counts(ends_E)
    d, x, out = _parts(d_RO, counts), _parts(x_RI, counts), list(out_EOI.unbind(0))
    _grouped_gemm(x, d, out, counts, layout="NT", accumulate=accumulate)


def _grouped_gemm(
    first: Sequence[Tensor] | Tensor,
    second: Sequence[Tensor],
    out: list[Tensor],
    counts: list[int],
    *,
    layout: str,
    accumulate: bool = False,
    one_output: bool = False,
) -> None:
    te = importlib.import_module("transformer_engine.pytorch.cpp_extensions")
    te.general_grouped_gemm(
        list(first),
        list(second),
        out,
        [None] * len(counts),  # no quantisers: bf16
        out[0].dtype,
        layout=layout,
        m_splits=counts,
        grad=layout == "NT",
        accumulate=accumulate,
        single_output=one_output,
    )


def _counts(ends_E: Tensor) -> list[int]:
    """How many rows each expert has. Waits for the device."""
    ends = ends_E.tolist()
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _parts(rows: Tensor, counts: list[int]) -> Sequence[Tensor]:
    return rows[: sum(counts)].split(counts)
