"""Steps that the linear-attention kernels share: tiles, products, decays, and the pairs of a chunk with their gradients.

No exponent is positive and no decay is a difference of running sums: per channel, the pairs of a chunk are split by the level at
which a later and an earlier block of SIZE rows meet, and each side is decayed up to the border between them.

DECAY is 0 (none), 1 (one per head) or 2 (one per key channel); C rows a chunk, BK >= KEY channels, LOW the type of operands.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["decays", "load", "pairs", "pairs_backward", "product", "shared", "store"]


@triton.jit
def load(pointer, row, column, rows, columns: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A (ROWS, COLUMNS) tile of a contiguous (rows, columns) matrix, zero outside it."""
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    at = pointer + tl.cast(row, tl.int64) * columns + column + (i * columns + j)
    if columns % COLUMNS == 0:
        return tl.load(at, mask=i < rows - row, other=0.0)
    else:
        return tl.load(at, mask=(i < rows - row) & (j < columns - column), other=0.0)


@triton.jit
def store(pointer, value, row, column, rows, columns: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    at = pointer + tl.cast(row, tl.int64) * columns + column + (i * columns + j)
    tl.store(at, value.to(pointer.dtype.element_ty), mask=(i < rows - row) & (j < columns - column))


@triton.jit
def product(a, b, LOW: tl.constexpr):
    """a b accumulated in float32; LOW is the type of the operands."""
    if tl.float32 == LOW:
        return tl.dot(a, b, input_precision="ieee")
    return tl.dot(a.to(LOW), b.to(LOW))


@triton.jit
def decays(g, row, length, KEY: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr):
    """Shares kept from the chunk's start up to and with each row, after each row to its end, and over all of it."""
    i = tl.arange(0, C)
    if DECAY == 1:
        at = g + tl.cast(row, tl.int64) + i
        here = tl.load(at, mask=i < length - row, other=0.0)
        later = tl.load(at + 1, mask=(i < C - 1) & (i + 1 < length - row), other=0.0)
        start, end = tl.cumsum(here, 0), tl.cumsum(later, 0, reverse=True)
        return tl.exp(start)[:, None], tl.exp(end)[:, None], tl.exp(tl.sum(here, 0))
    else:
        here = load(g, row, 0, length, KEY, C, BK)
        later = tl.where(i[:, None] < C - 1, load(g, row + 1, 0, length, KEY, C, BK), 0.0)
        start, end = tl.cumsum(here, 0), tl.cumsum(later, 0, reverse=True)
        return tl.exp(start), tl.exp(end), tl.exp(tl.sum(here, 0))[:, None]


@triton.jit
def between(g, row, length, C: tl.constexpr):
    """Share kept from row j to row i, (C, C), per head; what it holds above the diagonal is not used."""
    i = tl.arange(0, C)
    here = tl.load(g + tl.cast(row, tl.int64) + i, mask=i < length - row, other=0.0)
    return tl.exp(tl.cumsum(tl.where(i[:, None] > i[None, :], here[:, None], 0.0), 0))


@triton.jit
def border(g, row, length, KEY: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr):
    """Per channel, shares kept between each row and the border of two blocks of SIZE: (later rows, earlier rows), else 0."""
    i = tl.arange(0, C)[:, None]
    later = (i // SIZE) % 2 == 1
    here = load(g, row, 0, length, KEY, C, BK)
    after = tl.where(i % SIZE < SIZE - 1, load(g, row + 1, 0, length, KEY, C, BK), 0.0)
    up = tl.reshape(tl.cumsum(tl.reshape(here, (C // SIZE, SIZE, BK)), 1), (C, BK))
    down = tl.reshape(tl.cumsum(tl.reshape(after, (C // SIZE, SIZE, BK)), 1, reverse=True), (C, BK))
    return tl.where(later, tl.exp(up), 0.0), tl.where(later, 0.0, tl.exp(down))


@triton.jit
def meets(C: tl.constexpr, SIZE: tl.constexpr):
    """The pairs of rows whose blocks of SIZE are the two halves of one block, (C, C)."""
    i = tl.arange(0, C)
    return (i // (2 * SIZE))[:, None] == (i // (2 * SIZE))[None, :]


@triton.jit
def pairs(
    q_tile, k_tile, g, row, length, KEY: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    DECAY: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """q_i·k_j, decayed from j to i, for j <= i, else 0."""
    i = tl.arange(0, C)
    if DECAY == 2:
        scores = tl.where(i[:, None] == i[None, :], tl.sum(q_tile.to(tl.float32) * k_tile, 1)[:, None], 0.0)
        for level in tl.static_range(LEVELS):
            late, early = border(g, row, length, KEY, BK, C, 2**level)
            met = product(q_tile * late, tl.trans(k_tile * early), LOW)
            scores += tl.where(meets(C, 2**level), met, 0.0)
        return scores
    else:
        scores = product(q_tile, tl.trans(k_tile), LOW)
        if DECAY == 1:
            scores *= between(g, row, length, C)
        return tl.where(i[:, None] >= i[None, :], scores, 0.0)


@triton.jit
def pairs_backward(
    d_scores, q_tile, k_tile, g, row, length, KEY: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    DECAY: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """The gradients of q and k through `pairs`."""
    i = tl.arange(0, C)
    d_scores = tl.where(i[:, None] >= i[None, :], d_scores, 0.0)
    if DECAY == 2:
        own = tl.sum(tl.where(i[:, None] == i[None, :], d_scores, 0.0), 1)[:, None]
        dq, dk = own * k_tile, own * q_tile
        for level in tl.static_range(LEVELS):
            late, early = border(g, row, length, KEY, BK, C, 2**level)
            met = tl.where(meets(C, 2**level), d_scores, 0.0)
            dq += late * product(met, k_tile * early, LOW)
            dk += early * product(tl.trans(met), q_tile * late, LOW)
        return dq, dk
    else:
        if DECAY == 1:
            d_scores *= between(g, row, length, C)
        return product(d_scores, k_tile, LOW), product(tl.trans(d_scores), q_tile, LOW)


@triton.jit
def shared(pointer, head, heads, group, size):
    """`pointer` moved to the matrix of `size` numbers that this head reads; heads in one group read one matrix."""
    return pointer + (head // heads * (heads // group) + head % heads // group) * size
