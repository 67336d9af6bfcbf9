"""The steps that the split decoding kernels share: fold one block of scored keys in, and write what a span came to.

A program works on the rows of one kv head over one span of keys and leaves a part (out, lse); parts are joined by their lse.
Scores are in powers of two, as in `memlens_kernels.attention_steps`.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["fold", "write_part"]


@triton.jit
def fold(top, total, held, scores, value, PRECISION: tl.constexpr):
    """The running maximum (M), denominator (M) and output (M, V) after scores (M, N), -inf where hidden, of values (N, V)."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet
    weights = tl.exp2(scores - shift[:, None])
    fade = tl.exp2(top - shift)
    held = tl.dot(weights.to(value.dtype), value, held * fade[:, None], input_precision=PRECISION)
    return new_top, total * fade + tl.sum(weights, 1), held


@triton.jit
def write_part(
    out, lse, top, total, held, first_row, rows, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Out (rows, VALUE_DIM) divided by the denominator, and the natural-log lse (rows), -inf where nothing was seen."""
    m, c = first_row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V)
    filled = total > 0
    safe = tl.where(filled, total, 1.0)
    at = out + m.to(tl.int64)[:, None] * VALUE_DIM + c[None, :]
    value = (held / safe[:, None]).to(out.dtype.element_ty)
    tl.store(at, value, mask=(m < rows)[:, None] & (c < VALUE_DIM)[None, :])
    log = tl.where(filled, (top + tl.log2(safe)) / 1.4426950408889634, float("-inf"))
    tl.store(lse + m, log, mask=m < rows)
