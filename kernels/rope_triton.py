"""The Triton kernels of `rope`: a row is a head of a token, in the packed order; `rope` says what they compute."""

# Shapes: T tokens, G query groups, X heads of a group (its queries, its key, its value), D head dim, HALF pairs of
# channels that turn.

from __future__ import annotations

from ckptbridge.kernels.backend import jit, tl


@jit
def forward_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    inverse_rms_ptr,
    rows,
    S,
    eps,
    G: tl.constexpr,
    X: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = row // (G * X)
    head = row % X  # of the group
    group = row // X  # of all tokens
    is_key = (head == X - 2)[:, None]
    is_value = (head == X - 1)[:, None]
    is_query = ~is_key & ~is_value
    source = row.to(tl.int64)[:, None] * D
    # Of a query the first, of keys and values the second is where it goes.
    query = (group * (X - 2) + head).to(tl.int64)[:, None] * D
    key = group.to(tl.int64)[:, None] * D

    channel = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (row < rows)[:, None] & (channel < HALF)
    first = tl.load(qkv_ptr + source + channel, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(qkv_ptr + source + HALF + channel, mask=mask, other=0.0).to(tl.float32)
    if BLOCK_REST > 0:
        rest_channel = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        rest_mask = (row < rows)[:, None] & (rest_channel < D)
        rest = tl.load(qkv_ptr + source + rest_channel, mask=rest_mask, other=0.0).to(tl.float32)

    dtype = q_ptr.dtype.element_ty
    if inverse_rms_ptr is not None:
        square = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        if BLOCK_REST > 0:
            square += tl.sum(rest * rest, 1)
        inverse_rms = tl.rsqrt(square / D + eps)
        tl.store(inverse_rms_ptr + group * (X - 1) + head, inverse_rms, mask=(row < rows) & (head < X - 1))
        inverse_rms = inverse_rms[:, None]
        weight = _weight(q_weight_ptr, k_weight_ptr, channel, HALF, is_key)
        first = tl.where(is_value, first, _rounded(_rounded(first * inverse_rms, dtype) * weight, dtype))
        weight = _weight(q_weight_ptr + HALF, k_weight_ptr + HALF, channel, HALF, is_key)
        second = tl.where(is_value, second, _rounded(_rounded(second * inverse_rms, dtype) * weight, dtype))
        if BLOCK_REST > 0:
            weight = _weight(q_weight_ptr, k_weight_ptr, rest_channel, D, is_key)
            rest = tl.where(is_value, rest, _rounded(rest * inverse_rms, dtype) * weight)

    angle = (token % S)[:, None] * HALF + channel
    cos = tl.load(cos_ptr + angle, mask=mask & ~is_value, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=mask & ~is_value, other=0.0).to(tl.float32)
    turned_first = _rounded(first * cos, dtype) - _rounded(second * sin, dtype)
    turned_second = _rounded(second * cos, dtype) + _rounded(first * sin, dtype)
    turned_first = tl.where(is_value, first, turned_first).to(dtype)
    turned_second = tl.where(is_value, second, turned_second).to(dtype)
    tl.store(q_ptr + query + channel, turned_first, mask=mask & is_query)
    tl.store(q_ptr + query + HALF + channel, turned_second, mask=mask & is_query)
    tl.store(k_ptr + key + channel, turned_first, mask=mask & is_key)
    tl.store(k_ptr + key + HALF + channel, turned_second, mask=mask & is_key)
    tl.store(v_ptr + key + channel, turned_first, mask=mask & is_value)
    tl.store(v_ptr + key + HALF + channel, turned_second, mask=mask & is_value)
    if BLOCK_REST > 0:
        tl.store(q_ptr + query + rest_channel, rest.to(dtype), mask=rest_mask & is_query)
        tl.store(k_ptr + key + rest_channel, rest.to(dtype), mask=rest_mask & is_key)
        tl.store(v_ptr + key + rest_channel, rest.to(dtype), mask=rest_mask & is_value)


@jit
def _rounded(x, dtype: tl.constexpr):
    return x.to(dtype).to(tl.float32)


@jit
def _weight(q_weight_ptr, k_weight_ptr, channel, end: tl.constexpr, is_key):
    """The weight of each head's norm, for channels below `end`."""
    of_query = tl.load(q_weight_ptr + channel, mask=channel < end, other=0.0).to(tl.float32)
    of_key = tl.load(k_weight_ptr + channel, mask=channel < end, other=0.0).to(tl.float32)
    return tl.where(is_key, of_key, of_query)


@jit
def _of_three(q_ptr, k_ptr, v_ptr, query, key, mask, is_key, is_value):
    """What lies at offset `query` of the first or, of keys and values, at `key` of the second and third."""
    x = tl.load(q_ptr + query, mask=mask & ~is_key & ~is_value, other=0.0).to(tl.float32)
    x += tl.load(k_ptr + key, mask=mask & is_key, other=0.0).to(tl.float32)
    x += tl.load(v_ptr + key, mask=mask & is_value, other=0.0).to(tl.float32)
    return x


@jit
def backward_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    inverse_rms_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    d_qkv_ptr,
    partial_ptr,
    rows,
    S,
    G: tl.constexpr,
    X: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    channel = tl.arange(0, BLOCK_HALF)[None, :]
    dtype = d_qkv_ptr.dtype.element_ty
    if partial_ptr is not None:
        q_first = tl.zeros([BLOCK_ROWS, BLOCK_HALF], dtype=tl.float32)
        q_second = tl.zeros([BLOCK_ROWS, BLOCK_HALF], dtype=tl.float32)
        k_first = tl.zeros([BLOCK_ROWS, BLOCK_HALF], dtype=tl.float32)
        k_second = tl.zeros([BLOCK_ROWS, BLOCK_HALF], dtype=tl.float32)
    if BLOCK_REST > 0:
        rest_channel = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        if partial_ptr is not None:
            q_rest = tl.zeros([BLOCK_ROWS, BLOCK_REST], dtype=tl.float32)
            k_rest = tl.zeros([BLOCK_ROWS, BLOCK_REST], dtype=tl.float32)

    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)):
        row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        token = row // (G * X)
        head = row % X  # of the group
        group = row // X  # of all tokens
        is_key = (head == X - 2)[:, None]
        is_value = (head == X - 1)[:, None]
        packed = row.to(tl.int64)[:, None] * D
        query = (group * (X - 2) + head).to(tl.int64)[:, None] * D
        key = group.to(tl.int64)[:, None] * D

        mask = (row < rows)[:, None] & (channel < HALF)
        first = _of_three(dq_ptr, dk_ptr, dv_ptr, query + channel, key + channel, mask, is_key, is_value)
        second = _of_three(dq_ptr, dk_ptr, dv_ptr, query + HALF + channel, key + HALF + channel, mask, is_key, is_value)
        angle = (token % S)[:, None] * HALF + channel
        cos = tl.load(cos_ptr + angle, mask=mask & ~is_value, other=1.0).to(tl.float32)  # values do not turn
        sin = tl.load(sin_ptr + angle, mask=mask & ~is_value, other=0.0).to(tl.float32)
        d_first = first * cos + second * sin
        d_second = second * cos - first * sin
        if BLOCK_REST > 0:
            rest_mask = (row < rows)[:, None] & (rest_channel < D)
            d_rest = _of_three(
                dq_ptr, dk_ptr, dv_ptr, query + rest_channel, key + rest_channel, rest_mask, is_key, is_value
            )

        if partial_ptr is not None:
            # Values have no norm: their rows are zero here, and 1/rms and weight one.
            is_normed = (row < rows) & (head < X - 1)
            at = group * (X - 1) + head
            inverse_rms = tl.load(inverse_rms_ptr + at, mask=is_normed, other=1.0)[:, None]
            x = qkv_ptr + packed
            first = tl.load(x + channel, mask=mask & ~is_value, other=0.0).to(tl.float32) * inverse_rms
            second = tl.load(x + HALF + channel, mask=mask & ~is_value, other=0.0).to(tl.float32) * inverse_rms
            # The weight met the rounded rows in the forward pass.
            d_weight = d_first * _rounded(first, dtype)
            q_first += tl.where(is_key, 0.0, d_weight)
            k_first += tl.where(is_key, d_weight, 0.0)
            d_weight = d_second * _rounded(second, dtype)
            q_second += tl.where(is_key, 0.0, d_weight)
            k_second += tl.where(is_key, d_weight, 0.0)
            weight = _weight(q_weight_ptr, k_weight_ptr, channel, HALF, is_key)
            d_first *= tl.where(is_value, 1.0, weight)
            weight = _weight(q_weight_ptr + HALF, k_weight_ptr + HALF, channel, HALF, is_key)
            d_second *= tl.where(is_value, 1.0, weight)
            projection = tl.sum(d_first * first, 1) + tl.sum(d_second * second, 1)
            if BLOCK_REST > 0:
                rest = tl.load(x + rest_channel, mask=rest_mask & ~is_value, other=0.0).to(tl.float32) * inverse_rms
                d_weight = d_rest * _rounded(rest, dtype)
                q_rest += tl.where(is_key, 0.0, d_weight)
                k_rest += tl.where(is_key, d_weight, 0.0)
                weight = _weight(q_weight_ptr, k_weight_ptr, rest_channel, D, is_key)
                d_rest *= tl.where(is_value, 1.0, weight)
                projection += tl.sum(d_rest * rest, 1)
            projection = projection[:, None] / D
            d_first = inverse_rms * (d_first - first * projection)
            d_second = inverse_rms * (d_second - second * projection)
            if BLOCK_REST > 0:
                d_rest = inverse_rms * (d_rest - rest * projection)

        tl.store(d_qkv_ptr + packed + channel, d_first.to(dtype), mask=mask)
        tl.store(d_qkv_ptr + packed + HALF + channel, d_second.to(dtype), mask=mask)
        if BLOCK_REST > 0:
            tl.store(d_qkv_ptr + packed + rest_channel, d_rest.to(dtype), mask=rest_mask)

    if partial_ptr is not None:
        sums = partial_ptr + tl.program_id(0) * 2 * D
        channel = tl.arange(0, BLOCK_HALF)
        mask = channel < HALF
        tl.store(sums + channel, tl.sum(q_first, 0), mask=mask)
        tl.store(sums + HALF + channel, tl.sum(q_second, 0), mask=mask)
        tl.store(sums + D + channel, tl.sum(k_first, 0), mask=mask)
        tl.store(sums + D + HALF + channel, tl.sum(k_second, 0), mask=mask)
        if BLOCK_REST > 0:
            channel = 2 * HALF + tl.arange(0, BLOCK_REST)
            tl.store(sums + channel, tl.sum(q_rest, 0), mask=channel < D)
            tl.store(sums + D + channel, tl.sum(k_rest, 0), mask=channel < D)
