"""Packed rows of queries, keys and values, split: queries and keys normalised head by head, and turned by position.

One pass from the packed rows that one matrix product gives to what attention takes, and one pass back, which writes
the whole gradient of the packed rows. Values are copied on the way, both times: a view of theirs would keep all of the
packed rows alive as long as attention keeps its values.

The arithmetic inside is fp32, and roundings are those of Hugging Face's Qwen3: the normalised head, its product with
the weight, both products of each turned channel and their sum are rounded to the dtype of the rows.

Memory-bound. Floor, in passes of T x D over HBM, of N queries and G keys: forward and backward 2 (N + 2 G)
(read and write all), and backward with norms N + G more, of the packed rows, which are kept for them. With norms 1/rms
of each head is kept as well, 4 bytes.
"""

# Shapes: B sequences, S their length, T = B*S tokens, N heads, G query groups, X = N/G + 2 heads of a group (its
# queries, its key, its value), D head dim, R pairs of channels that turn.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ckptbridge.kernels import rope_triton
from ckptbridge.kernels.arguments import check_shape, check_tensor
from ckptbridge.kernels.backend import Backend, compiled, num_multiprocessors, require_backend
from ckptbridge.kernels.main_gradient import main_gradient_of
from ckptbridge.kernels.rms_norm import rms_norm_reference

MAX_HEAD_DIM = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitQkvConfig:
    """Launch knobs. A program works on so many heads at a time; warps are those of a program."""

    block_rows_forward: int
    block_rows_backward: int
    num_warps: int = 4
    # With norms the backward pass is a fixed number of programs that stride over the heads, each with its own sums of
    # the weights' gradients.
    programs_per_multiprocessor: int = 8

    @classmethod
    def from_shape(cls, head_dim: int) -> SplitQkvConfig:
        """Knobs for heads of `head_dim` channels."""
        width = 1 << (head_dim - 1).bit_length()
        # 32 elements a thread of 4 warps; 16 in the backward pass, where up to three tensors are read and the sums of
        # two weights' gradients stay in registers.
        return cls(block_rows_forward=max(1, 4096 // width), block_rows_backward=max(1, 2048 // width))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first 2 R channels of the heads x [..., D]: channel i against channel R + i. cos and sin: [..., R]."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*turned, rest) if rest.shape[-1] else turned, -1)


def split_qkv_reference(
    qkv_BSGXD: Tensor,
    cos_SR: Tensor,
    sin_SR: Tensor,
    q_weight_D: Tensor | None = None,
    k_weight_D: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition; autograd differentiates it. Also takes fp64, which then is fp64 throughout."""
    q, k, v = qkv_BSGXD.split((qkv_BSGXD.shape[3] - 2, 1, 1), dim=3)
    q_BSND, k_BSGD, v_BSGD = q.flatten(2, 3), k.squeeze(3), v.squeeze(3)
    if q_weight_D is not None and k_weight_D is not None:
        q_BSND = rms_norm_reference(q_BSND, q_weight_D, eps)
        k_BSGD = rms_norm_reference(k_BSGD, k_weight_D, eps)
    cos, sin = cos_SR[:, None], sin_SR[:, None]
    return rotate(q_BSND, cos, sin), rotate(k_BSGD, cos, sin), v_BSGD


def split_qkv(
    qkv_BSGXD: Tensor,
    cos_SR: Tensor,
    sin_SR: Tensor,
    q_weight_D: Tensor | None = None,
    k_weight_D: Tensor | None = None,
    eps: float = 1e-6,
    *,
    backend: Backend = "reference",
    config: SplitQkvConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, S, N, D], keys [B, S, G, D] and values [B, S, G, D] of packed rows.

    qkv_BSGXD: contiguous, fp32 or bf16; of each group its queries, its key, its value. Queries and keys are normalised
    over D by their weights (fp32 or bf16) if those are given, both or neither; then the first 2 R channels of each are
    turned by the angles of their positions, whose cosines and sines have the dtype of the rows. Weights' gradients go
    to their main gradients where they have them. `config` overrides the launch knobs of the triton backend. Raises
    ValueError for arguments that do not fit and BackendError when `backend` cannot run on the device of the rows.
    """
    _check(qkv_BSGXD, cos_SR, sin_SR, q_weight_D, k_weight_D)
    require_backend(backend, qkv_BSGXD.device)
    if backend == "reference":
        return split_qkv_reference(qkv_BSGXD, cos_SR, sin_SR, q_weight_D, k_weight_D, eps)
    if backend == "torch":
        return compiled(split_qkv_reference)(qkv_BSGXD, cos_SR, sin_SR, q_weight_D, k_weight_D, eps)
    config = config or SplitQkvConfig.from_shape(qkv_BSGXD.shape[-1])
    return _SplitQkv.apply(qkv_BSGXD, cos_SR, sin_SR, q_weight_D, k_weight_D, eps, config)


def _check(
    qkv_BSGXD: Tensor, cos_SR: Tensor, sin_SR: Tensor, q_weight_D: Tensor | None, k_weight_D: Tensor | None
) -> None:
    check_tensor("split_qkv", "qkv_BSGXD", qkv_BSGXD)
    if qkv_BSGXD.ndim != 5 or qkv_BSGXD.shape[3] < 3 or not 2 <= qkv_BSGXD.shape[4] <= MAX_HEAD_DIM:
        raise ValueError(
            "split_qkv: qkv_BSGXD: expected [B, S, G, queries of a group + 2, D], at least one query and D from 2 to "
            f"{MAX_HEAD_DIM}, found shape {tuple(qkv_BSGXD.shape)}"
        )
    S, D = qkv_BSGXD.shape[1], qkv_BSGXD.shape[4]
    check_tensor("split_qkv", "cos_SR", cos_SR, like=qkv_BSGXD)
    check_tensor("split_qkv", "sin_SR", sin_SR, like=qkv_BSGXD)
    if cos_SR.ndim != 2 or not 1 <= cos_SR.shape[1] <= D // 2 or cos_SR.dtype != qkv_BSGXD.dtype:
        raise ValueError(
            f"split_qkv: cos_SR: expected {qkv_BSGXD.dtype} of 1 to {D // 2} pairs of channels, "
            f"found {cos_SR.dtype} of shape {tuple(cos_SR.shape)}"
        )
    check_shape("split_qkv", "cos_SR", cos_SR, (S, cos_SR.shape[1]), "a row for each position")
    check_shape("split_qkv", "sin_SR", sin_SR, tuple(cos_SR.shape), "that of cos_SR")
    if sin_SR.dtype != cos_SR.dtype:
        raise ValueError(f"split_qkv: sin_SR: expected dtype {cos_SR.dtype} of cos_SR, found {sin_SR.dtype}")
    if (q_weight_D is None) != (k_weight_D is None):
        raise ValueError("split_qkv: expected weights for queries and keys or for neither, found one")
    for name, weight in (("q_weight_D", q_weight_D), ("k_weight_D", k_weight_D)):
        if weight is not None:
            check_tensor("split_qkv", name, weight, like=qkv_BSGXD)
            check_shape("split_qkv", name, weight, (D,), "the width of a head")


class _SplitQkv(torch.autograd.Function):
    """The triton backend. Keeps the angles and, with norms, the packed rows and 1/rms of each head."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv_BSGXD: Tensor,
        cos_SR: Tensor,
        sin_SR: Tensor,
        q_weight_D: Tensor | None,
        k_weight_D: Tensor | None,
        eps: float,
        config: SplitQkvConfig,
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, S, G, X, D = qkv_BSGXD.shape
        q_BSND = qkv_BSGXD.new_empty(B, S, G * (X - 2), D)
        k_BSGD, v_BSGD = qkv_BSGXD.new_empty(B, S, G, D), qkv_BSGXD.new_empty(B, S, G, D)
        inverse_rms = None
        if q_weight_D is not None:
            inverse_rms = torch.empty(B * S * G * (X - 1), dtype=torch.float32, device=qkv_BSGXD.device)
        rows = B * S * G * X
        if rows > 0:
            rope_triton.forward_kernel[(-(-rows // config.block_rows_forward),)](
                qkv_BSGXD,
                cos_SR,
                sin_SR,
                q_weight_D,
                k_weight_D,
                q_BSND,
                k_BSGD,
                v_BSGD,
                inverse_rms,
                rows,
                S,
                eps,
                BLOCK_ROWS=config.block_rows_forward,
                **_sizes(qkv_BSGXD, cos_SR),
                num_warps=config.num_warps,
            )
        ctx.shape, ctx.config = qkv_BSGXD.shape, config
        ctx.main_gradients = [None if w is None else main_gradient_of(w) for w in (q_weight_D, k_weight_D)]
        ctx.save_for_backward(
            None if inverse_rms is None else qkv_BSGXD, cos_SR, sin_SR, q_weight_D, k_weight_D, inverse_rms
        )
        return q_BSND, k_BSGD, v_BSGD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cos_SR, sin_SR, q_weight, k_weight, inverse_rms = ctx.saved_tensors
        config, (B, S, G, X, D) = ctx.config, ctx.shape
        d_qkv = dq.new_empty(ctx.shape)
        rows = B * S * G * X
        programs, partial = -(-rows // config.block_rows_backward), None
        if inverse_rms is not None:
            programs = min(programs, config.programs_per_multiprocessor * num_multiprocessors(dq.device))
            partial = torch.empty(programs, 2, D, dtype=torch.float32, device=dq.device)
        if rows > 0:
            rope_triton.backward_kernel[(programs,)](
                qkv,
                cos_SR,
                sin_SR,
                q_weight,
                k_weight,
                inverse_rms,
                dq.contiguous(),
                dk.contiguous(),
                dv.contiguous(),
                d_qkv,
                partial,
                rows,
                S,
                BLOCK_ROWS=config.block_rows_backward,
                **_sizes(d_qkv, cos_SR),
                num_warps=config.num_warps,
            )
        # One row of sums a program and a fixed order of rows and of this sum: the same bits at every run on a device.
        d_weights: list[Tensor | None] = [None, None]
        for i, weight in enumerate((q_weight, k_weight)):
            if partial is None or not ctx.needs_input_grad[3 + i]:
                continue
            d_weight, main = partial[:, i].sum(0), ctx.main_gradients[i]
            if main is None:
                d_weights[i] = d_weight.to(weight.dtype)
            else:
                main.add(d_weight)
        return d_qkv, None, None, *d_weights, None, None


def _sizes(qkv_BSGXD: Tensor, cos_SR: Tensor) -> dict[str, int]:
    """What a kernel is compiled for."""
    _, _, G, X, D = qkv_BSGXD.shape
    half = cos_SR.shape[1]
    rest = D - 2 * half
    return {
        "G": G,
        "X": X,
        "D": D,
        "HALF": half,
        "BLOCK_HALF": 1 << (half - 1).bit_length(),
        "BLOCK_REST": 1 << (rest - 1).bit_length() if rest else 0,
    }
