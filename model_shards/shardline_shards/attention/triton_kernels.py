"""Triton kernels of paged attention: chunks of prompts in tiles, single tokens in splits of keys.

Tiles have rows of several queries times all query heads of one KV head, so that a block of keys is
read once for them (Dao 2023, "FlashAttention-2"). A lone query has too few rows to keep a GPU busy:
its keys are cut into splits of one size, whose partial results are merged in their order ("flash
decoding", Dao et al. 2023). Where a split begins depends on the sequence alone, and so does the
result. Each kernel leaves the other's sequences out.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_seqs", "table_stride"])
def attend_chunks(
    output,
    query,
    key,
    value,
    query_start,
    kv_lens,
    block_tables,
    num_seqs,
    scale,
    query_stride,
    head_stride,
    block_stride,
    table_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """A tile of ROWS rows for one KV head; program (tile, kv_head).

    `output` [num_tokens, num_heads, head_dim] is dense, `query` dense in its last dimension.
    """
    TOKENS: tl.constexpr = ROWS // GROUP
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = _sequence_of(query_start, num_seqs, tile, TOKENS)
    first_row = tl.load(query_start + sequence)
    query_len = tl.load(query_start + sequence + 1) - first_row
    first_token = (tile - (first_row // TOKENS + sequence)) * TOKENS
    if query_len == 1 or first_token >= query_len:
        return
    kv_len = tl.load(kv_lens + sequence)
    rows = tl.arange(0, ROWS)
    tokens = first_token + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    is_row = (rows < TOKENS * GROUP) & (tokens < query_len)
    positions = kv_len - query_len + tokens
    places = (first_row + tokens).to(tl.int64)
    loaded = _load_rows(query + places * query_stride + heads * head_stride, is_row, HEAD_DIM, DIM)
    first_position = kv_len - query_len + first_token
    first_key = 0
    if WINDOW > 0:
        first_key = tl.maximum(first_position - WINDOW + 1, 0) // KEYS * KEYS
    last_key = tl.minimum(first_position + TOKENS, kv_len)
    _, total, sums = _attend(
        loaded,
        key + kv_head * HEAD_DIM,
        value + kv_head * HEAD_DIM,
        block_tables + sequence.to(tl.int64) * table_stride,
        positions,
        first_key,
        last_key,
        scale,
        block_stride,
        NUM_KV_HEADS * HEAD_DIM,
        HEAD_DIM,
        DIM,
        BLOCK_SIZE,
        WINDOW,
        SOFTCAP,
        ROWS,
        KEYS,
    )
    _store_rows(
        output + (places * (NUM_KV_HEADS * GROUP) + heads) * HEAD_DIM,
        sums / total[:, None],
        is_row,
        HEAD_DIM,
        DIM,
    )


@triton.jit(do_not_specialize=["max_splits", "table_stride"])
def attend_singles(
    output,
    partial_sums,
    partial_scales,
    query,
    key,
    value,
    query_start,
    kv_lens,
    block_tables,
    scale,
    max_splits,
    query_stride,
    head_stride,
    block_stride,
    table_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    IS_SHARED: tl.constexpr,
):
    """Every num_shares-th split of a lone query; program (sequence, kv_head, share).

    With one share the result is `output`. Else each split leaves `partial_sums`
    [num_seqs, num_heads, max_splits, head_dim], and in `partial_scales` [.., 2] the largest score
    and the sum of weights, both in fp32, for `merge_splits`.
    """
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    share = tl.program_id(2)
    row = tl.load(query_start + sequence).to(tl.int64)
    if tl.load(query_start + sequence + 1) - row != 1:
        return
    kv_len = tl.load(kv_lens + sequence)
    first = _first_split(kv_len, WINDOW, SPLIT)
    num_splits = tl.cdiv(kv_len, SPLIT)
    rows = tl.arange(0, ROWS)
    is_row = rows < GROUP
    heads = kv_head * GROUP + rows
    loaded = _load_rows(query + row * query_stride + heads * head_stride, is_row, HEAD_DIM, DIM)
    positions = tl.zeros([ROWS], tl.int32) + kv_len - 1
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DIM], tl.float32)
    for split in range(first + share, num_splits, tl.num_programs(2)):
        split_largest, split_total, split_sums = _attend(
            loaded,
            key + kv_head * HEAD_DIM,
            value + kv_head * HEAD_DIM,
            block_tables + sequence * table_stride,
            positions,
            split * SPLIT,
            tl.minimum(split * SPLIT + SPLIT, kv_len),
            scale,
            block_stride,
            NUM_KV_HEADS * HEAD_DIM,
            HEAD_DIM,
            DIM,
            BLOCK_SIZE,
            WINDOW,
            SOFTCAP,
            ROWS,
            KEYS,
        )
        if IS_SHARED:
            place = (sequence * (NUM_KV_HEADS * GROUP) + heads) * max_splits + split
            _store_rows(partial_sums + place * HEAD_DIM, split_sums, is_row, HEAD_DIM, DIM)
            tl.store(partial_scales + 2 * place, split_largest, mask=is_row)
            tl.store(partial_scales + 2 * place + 1, split_total, mask=is_row)
        else:
            largest, total, sums = _merge(
                largest, total, sums, split_largest, split_total, split_sums
            )
    if not IS_SHARED:
        place = row * (NUM_KV_HEADS * GROUP) + heads
        _store_rows(output + place * HEAD_DIM, sums / total[:, None], is_row, HEAD_DIM, DIM)


@triton.jit(do_not_specialize=["max_splits"])
def merge_splits(
    output,
    partial_sums,
    partial_scales,
    query_start,
    kv_lens,
    max_splits,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """What `attend_singles` has left of the splits, in their order; program (sequence, head)."""
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = tl.load(query_start + sequence).to(tl.int64)
    if tl.load(query_start + sequence + 1) - row != 1:
        return
    kv_len = tl.load(kv_lens + sequence)
    base = (sequence * NUM_HEADS + head) * max_splits
    one = tl.arange(0, 1)
    largest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    sums = tl.zeros([1, DIM], tl.float32)
    for split in range(_first_split(kv_len, WINDOW, SPLIT), tl.cdiv(kv_len, SPLIT)):
        place = base + split + one
        largest, total, sums = _merge(
            largest,
            total,
            sums,
            tl.load(partial_scales + 2 * place),
            tl.load(partial_scales + 2 * place + 1),
            _load_rows(partial_sums + place * HEAD_DIM, one == 0, HEAD_DIM, DIM),
        )
    place = row * NUM_HEADS + head + one
    _store_rows(output + place * HEAD_DIM, sums / total[:, None], one == 0, HEAD_DIM, DIM)


@triton.jit
def _load_rows(starts, is_row, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """The heads [rows, DIM] at the pointers `starts` [rows]; 0 beside them and where no row is."""
    dims = tl.arange(0, DIM)
    is_there = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    return tl.load(starts[:, None] + dims[None, :], mask=is_there, other=0.0)


@triton.jit
def _store_rows(starts, values, is_row, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """The same way back, in the dtype that lies there."""
    dims = tl.arange(0, DIM)
    is_there = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    values = values.to(starts.dtype.element_ty)
    tl.store(starts[:, None] + dims[None, :], values, mask=is_there)


@triton.jit
def _merge(largest, total, sums, split_largest, split_total, split_sums):
    """What `_attend` has found for some keys, and for those behind them, as if for all."""
    new_largest = tl.maximum(largest, split_largest)
    old, new = tl.exp2(largest - new_largest), tl.exp2(split_largest - new_largest)
    total = total * old + split_total * new
    return new_largest, total, sums * old[:, None] + split_sums * new[:, None]


@triton.jit
def _sequence_of(query_start, num_seqs, tile, TOKENS: tl.constexpr):
    """The last sequence whose first tile is not behind `tile`.

    Sequence i is given the tiles from query_start[i] // TOKENS + i on, which are enough: there is
    one more for each sequence than all queries together fill.
    """
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // TOKENS + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _first_split(kv_len, WINDOW: tl.constexpr, SPLIT: tl.constexpr):
    first = 0
    if WINDOW > 0:
        first = tl.maximum(kv_len - WINDOW, 0) // SPLIT
    return first


@triton.jit
def _attend(
    query,
    key,
    value,
    block_table,
    positions,
    first_key,
    last_key,
    scale,
    block_stride,
    slot_stride: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """`query` [ROWS, DIM] over keys [first_key, last_key), as far as `positions` [ROWS] see them.

    The largest score of each row (base 2), its sum of weights, and its sum of weighted values
    [ROWS, DIM], not yet divided.
    """
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DIM], tl.float32)
    dims = tl.arange(0, DIM)
    for start in range(first_key, last_key, KEYS):
        places = start + tl.arange(0, KEYS)
        is_key = places < last_key
        blocks = tl.load(block_table + places // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
        offsets = blocks * block_stride + places % BLOCK_SIZE * slot_stride
        if HEAD_DIM == DIM:
            is_loaded = is_key[:, None]
        else:
            is_loaded = is_key[:, None] & (dims < HEAD_DIM)[None, :]
        keys = tl.load(key + offsets[:, None] + dims[None, :], mask=is_loaded, other=0.0)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee")
        if SOFTCAP > 0:
            scores = _cap(scores * scale, SOFTCAP) * 1.4426950408889634
        else:
            scores = scores * (scale * 1.4426950408889634)
        is_seen = (places[None, :] <= positions[:, None]) & is_key[None, :]
        if WINDOW > 0:
            is_seen = is_seen & (positions[:, None] - places[None, :] < WINDOW)
        scores = tl.where(is_seen, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        # Rows that have seen nothing yet: -inf less -inf would be no number.
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(largest - shift)
        values = tl.load(value + offsets[:, None] + dims[None, :], mask=is_loaded, other=0.0)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None]
        sums = tl.dot(weights.to(values.dtype), values, sums, input_precision="ieee")
        largest = new_largest
    return largest, total, sums


@triton.jit
def _cap(scores, SOFTCAP: tl.constexpr):
    """SOFTCAP * tanh(scores / SOFTCAP), without overflow for large scores."""
    shrunk = tl.exp2(tl.abs(scores) * (-2 * 1.4426950408889634 / SOFTCAP))
    capped = SOFTCAP * (1 - shrunk) / (1 + shrunk)
    return tl.where(scores < 0, -capped, capped)
