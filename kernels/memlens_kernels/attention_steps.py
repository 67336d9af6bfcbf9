"""The steps that the attention kernels share: load a tile, hide pairs, fold one more block in.

Softmax is computed in powers of two: scores are multiplied by scale · log2(e), so that `exp2` gives the exponential. The
meaning and layout of the arguments are those of `memlens_kernels.attention`.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "LOG2E",
    "fold_gradient",
    "fold_keys",
    "fold_queries",
    "hide",
    "load_lse",
    "load_tile",
    "store_tile",
    "write_rows",
]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_tile(
    pointer, start, stride, bound, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, EDGE: tl.constexpr
):  # fmt: skip
    """ROWS rows from `start` of a (bound, DIM) matrix as (ROWS, BLOCK_DIM), zero where there is no row (EDGE) or no dim."""
    rows, dims = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_DIM)[None, :]
    # the long step is one 64-bit product; inside a tile 32 bits do
    at = pointer + tl.cast(start, tl.int64) * stride + (rows * stride + dims)
    if EDGE:
        return tl.load(at, mask=(rows < bound - start) & (dims < DIM), other=0.0)
    if DIM != BLOCK_DIM:
        return tl.load(at, mask=dims < DIM, other=0.0)
    return tl.load(at)


@triton.jit
def store_tile(pointer, value, start, bound, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Write ROWS rows from `start` of a contiguous (bound, DIM) matrix."""
    rows, dims = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_DIM)[None, :]
    at = pointer + tl.cast(start, tl.int64) * DIM + (rows * DIM + dims)
    tl.store(at, value.to(pointer.dtype.element_ty), mask=(rows < bound - start) & (dims < DIM))


@triton.jit
def hide(
    scores, rows, keys, mask, mask_row, mask_key, q_len, k_len, offset,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Scores with -inf at the pairs that may not attend: past the end or the diagonal (EDGE), or False in the mask.

    `rows` and `keys` are the indices along the two axes of the tile, one as a column and one as a row.
    """
    if EDGE:
        seen = keys < k_len
        if CAUSAL:
            seen = seen & (keys <= offset + rows)
        scores = tl.where(seen, scores, -float("inf"))
    if MASK:
        at = mask + tl.cast(rows, tl.int64) * mask_row + tl.cast(keys, tl.int64) * mask_key
        allowed = tl.load(at, mask=(rows < q_len) & (keys < k_len), other=0)
        scores = tl.where(allowed != 0, scores, -float("inf"))
    return scores


@triton.jit
def fold_keys(
    top, total, held, q_tile, k, v, k_row, v_row, mask, mask_row, mask_key, rows, start, q_len, k_len, offset, scale_log2,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The running maximum, denominator and output of a query block after one more key block."""
    keys = start + tl.arange(0, BLOCK_K)
    k_tile = load_tile(k, start, k_row, k_len, BLOCK_K, DIM, BLOCK_D, EDGE)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale_log2
    scores = hide(
        scores, rows[:, None], keys[None, :], mask, mask_row, mask_key, q_len, k_len, offset, CAUSAL, MASK, EDGE
    )  # fmt: skip
    new_top = tl.maximum(top, tl.max(scores, 1))
    shift = new_top
    if EDGE or MASK:  # a row that has seen nothing yet
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    weights = tl.exp2(scores - shift[:, None])
    fade = tl.exp2(top - shift)
    total = total * fade + tl.sum(weights, 1)
    v_tile = load_tile(v, start, v_row, k_len, BLOCK_K, VALUE_DIM, BLOCK_V, EDGE)
    held = tl.dot(weights.to(v_tile.dtype), v_tile, held * fade[:, None], input_precision=PRECISION)
    return new_top, total, held


@triton.jit
def write_rows(
    out, lse, top, total, held, head_id, first_row, q_len,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Divide once and store out and lse of a query block; a row that saw nothing gets 0 and -inf."""
    rows = first_row + tl.arange(0, BLOCK_Q)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    store_tile(out + head_id * q_len * VALUE_DIM, held / total[:, None], first_row, q_len, BLOCK_Q, VALUE_DIM, BLOCK_V)
    natural = (top + tl.log2(total)) / LOG2E
    tl.store(lse + head_id * q_len + rows, tl.where(empty, -float("inf"), natural), mask=rows < q_len)


@triton.jit
def load_lse(lse, rows, q_len):
    """lse in powers of two; +inf for a row that is not there or saw nothing, so that its probabilities are 0."""
    value = tl.load(lse + rows, mask=rows < q_len, other=float("inf"))
    return tl.where(value == -float("inf"), float("inf"), value * LOG2E)


@triton.jit
def fold_queries(
    dk_tile, dv_tile, k_tile, v_tile, q, dout, lse, delta, q_row, do_row, mask, mask_row, mask_key, keys, start,
    q_len, k_len, offset, scale_log2,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK (before scale) and dV of a key block after one more query block."""
    rows = start + tl.arange(0, BLOCK_Q)
    q_tile = load_tile(q, start, q_row, q_len, BLOCK_Q, DIM, BLOCK_D, True)
    # the tile is (keys, queries): P and dS come out as they are multiplied
    scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale_log2
    scores = hide(
        scores, rows[None, :], keys[:, None], mask, mask_row, mask_key, q_len, k_len, offset, CAUSAL, MASK, EDGE
    )  # fmt: skip
    p = tl.exp2(scores - load_lse(lse, rows, q_len)[None, :])
    do_tile = load_tile(dout, start, do_row, q_len, BLOCK_Q, VALUE_DIM, BLOCK_V, True)
    dv_tile = tl.dot(p.to(do_tile.dtype), do_tile, dv_tile, input_precision=PRECISION)
    dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)
    ds = p * (dp - tl.load(delta + rows, mask=rows < q_len, other=0.0)[None, :])
    dk_tile = tl.dot(ds.to(q_tile.dtype), q_tile, dk_tile, input_precision=PRECISION)
    return dk_tile, dv_tile


@triton.jit
def fold_gradient(
    dq_tile, q_tile, do_tile, lse_row, delta_row, k, v, k_row, v_row, mask, mask_row, mask_key, rows, start,
    q_len, k_len, offset, scale_log2,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ (before scale) of a query block after one more key block."""
    keys = start + tl.arange(0, BLOCK_K)
    k_tile = load_tile(k, start, k_row, k_len, BLOCK_K, DIM, BLOCK_D, EDGE)
    v_tile = load_tile(v, start, v_row, k_len, BLOCK_K, VALUE_DIM, BLOCK_V, EDGE)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale_log2
    scores = hide(
        scores, rows[:, None], keys[None, :], mask, mask_row, mask_key, q_len, k_len, offset, CAUSAL, MASK, EDGE
    )  # fmt: skip
    p = tl.exp2(scores - lse_row[:, None])
    ds = p * (tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION) - delta_row[:, None])
    return tl.dot(ds.to(k_tile.dtype), k_tile, dq_tile, input_precision=PRECISION)
