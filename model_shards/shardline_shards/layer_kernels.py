"""Triton kernels of a decoder layer on a GPU: what lies between its products and its attention.

Each reads and writes its rows once. Roundings are those of the library's modules: a sum of hidden
states, a normed value before its weight, and an activation are rounded to the dtype of the model.
"""

import triton
import triton.language as tl


@triton.jit
def add_norm(
    summed,
    normed,
    hidden,
    delta,
    weight,
    width,
    eps,
    HAS_DELTA: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row of `summed = hidden + delta` and of its RMS norm; all are [num_tokens, width].

    Without a delta, `summed` is not written.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    is_there = columns < width
    values = tl.load(hidden + row * width + columns, mask=is_there, other=0.0)
    if HAS_DELTA:
        added = tl.load(delta + row * width + columns, mask=is_there, other=0.0)
        values = (values.to(tl.float32) + added.to(tl.float32)).to(values.dtype)
        tl.store(summed + row * width + columns, values, mask=is_there)
    exact = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(exact * exact, 0) / width + eps)
    factors = tl.load(weight + columns, mask=is_there, other=0.0)
    tl.store(
        normed + row * width + columns,
        (exact * scale).to(values.dtype) * factors,
        mask=is_there,
    )


@triton.jit
def multiply_silu(output, gate_up, num_columns, COLUMNS: tl.constexpr):
    """`silu(gate) * up` of one row; `gate_up` [num_tokens, 2 * num_columns], gates first."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_there = columns < num_columns
    gate = tl.load(gate_up + 2 * row * num_columns + columns, mask=is_there, other=0.0)
    up = tl.load(gate_up + (2 * row + 1) * num_columns + columns, mask=is_there, other=0.0)
    exact = gate.to(tl.float32)
    active = (exact / (1 + tl.exp(-exact))).to(gate.dtype)
    tl.store(output + row * num_columns + columns, active * up, mask=is_there)


@triton.jit
def rotate_and_write(
    qkv,
    key,
    value,
    cos,
    sin,
    query_norm,
    key_norm,
    slots,
    eps,
    block_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """HEADS heads of one token: queries are turned in place, keys and values go to their slot.

    `qkv` [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]; `cos` and `sin`
    [num_tokens, head_dim] in fp32, whose halves are alike; norms [head_dim], before the turning.
    """
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dims = tl.arange(0, HALF)
    middle: tl.constexpr = HEAD_DIM // 2
    is_there = (heads < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & (dims < middle)[None, :]
    is_query = heads < NUM_HEADS
    is_key = (heads >= NUM_HEADS) & (heads < NUM_HEADS + NUM_KV_HEADS)
    is_value = heads >= NUM_HEADS + NUM_KV_HEADS
    row = qkv + token * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
    place = row + heads[:, None] * HEAD_DIM + dims[None, :]
    low = tl.load(place, mask=is_there, other=0.0)
    high = tl.load(place + middle, mask=is_there, other=0.0)
    slot = tl.load(slots + token)
    target = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * (NUM_KV_HEADS * HEAD_DIM)
    value_place = target + (heads[:, None] - NUM_HEADS - NUM_KV_HEADS) * HEAD_DIM + dims[None, :]
    tl.store(value + value_place, low, mask=is_there & is_value[:, None])
    tl.store(value + value_place + middle, high, mask=is_there & is_value[:, None])
    is_dim = dims < middle
    if HAS_NORMS:
        low, high = _norm_heads(
            low, high, is_query, query_norm, key_norm, eps, dims, is_dim, HEAD_DIM
        )
    angle = token * HEAD_DIM + dims
    cosines = tl.load(cos + angle, mask=is_dim, other=0.0)[None, :]
    sines = tl.load(sin + angle, mask=is_dim, other=0.0)[None, :]
    exact_low, exact_high = low.to(tl.float32), high.to(tl.float32)
    turned_low = (exact_low * cosines - exact_high * sines).to(low.dtype)
    turned_high = (exact_high * cosines + exact_low * sines).to(low.dtype)
    tl.store(place, turned_low, mask=is_there & is_query[:, None])
    tl.store(place + middle, turned_high, mask=is_there & is_query[:, None])
    key_place = target + (heads[:, None] - NUM_HEADS) * HEAD_DIM + dims[None, :]
    tl.store(key + key_place, turned_low, mask=is_there & is_key[:, None])
    tl.store(key + key_place + middle, turned_high, mask=is_there & is_key[:, None])


@triton.jit
def _norm_heads(
    low, high, is_query, query_norm, key_norm, eps, dims, is_dim, HEAD_DIM: tl.constexpr
):
    """RMS norm of each head, queries with one weight and keys with the other."""
    middle: tl.constexpr = HEAD_DIM // 2
    exact_low, exact_high = low.to(tl.float32), high.to(tl.float32)
    squares = tl.sum(exact_low * exact_low, 1) + tl.sum(exact_high * exact_high, 1)
    scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
    query_low = tl.load(query_norm + dims, mask=is_dim, other=0.0)[None, :]
    query_high = tl.load(query_norm + middle + dims, mask=is_dim, other=0.0)[None, :]
    key_low = tl.load(key_norm + dims, mask=is_dim, other=0.0)[None, :]
    key_high = tl.load(key_norm + middle + dims, mask=is_dim, other=0.0)[None, :]
    weight_low = tl.where(is_query[:, None], query_low, key_low)
    weight_high = tl.where(is_query[:, None], query_high, key_high)
    return (
        (exact_low * scale).to(low.dtype) * weight_low,
        (exact_high * scale).to(low.dtype) * weight_high,
    )
