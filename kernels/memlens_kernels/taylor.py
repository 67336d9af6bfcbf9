"""Attention with weights 1 + s + s²/2 by chunks: one program walks the chunks of one head and one block of value columns.

Inside a chunk the weight is computed from s = q·k, on tiles of 16 features. The past is three running states in registers: the
sum of v (1, V), of k vᵀ (16, V) and of (k ⊗ k) vᵀ (16 · 16, V). Features of the tokens are never written out, nor (T, T) weights.

q and k come scaled by feature_dim ** -1/4 and are at most 16 wide; v holds a column of ones where the weights are to be
normalised. States are one matrix (1 + 16 + 256, V) a head: rows 0, 1 + a and 17 + 16 a + b. Source: arXiv:2402.18668, section 4.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memlens_kernels.chunk_parts import load, product, shared, store
from memlens_kernels.linear import AT, DTYPES, LENGTH, LOW, kind
from memlens_kernels.tile import Tile

__all__ = ["FEATURES", "ROWS", "taylor_forward", "tiles"]

FEATURES = 16
ROWS = 1 + FEATURES + FEATURES**2


@triton.jit(do_not_specialize=["heads", "k_group", "v_group", "length"])
def taylor_kernel(
    q, k, v, first, last, out, heads, q_group, k_group, v_group, length,
    KEY: tl.constexpr, VALUE: tl.constexpr, F: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    head, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BV
    size = tl.cast(length, tl.int64)
    q, k = shared(q, head, heads, q_group, size * KEY), shared(k, head, heads, k_group, size * KEY)
    v = shared(v, head, heads, v_group, size * VALUE)
    at = head * (1 + F + F * F) * VALUE
    columns = column + tl.arange(0, BV)
    zeroth = tl.load(first + at + columns, mask=columns < VALUE, other=0.0)
    linear = load(first + at + VALUE, 0, column, F, VALUE, F, BV)
    square = load(first + at + (1 + F) * VALUE, 0, column, F * F, VALUE, F * F, BV)
    i = tl.arange(0, C)
    for row in range(0, length, C):
        q_tile = load(q, row, 0, length, KEY, C, F)
        k_tile = load(k, row, 0, length, KEY, C, F)
        v_tile = load(v, row, column, length, VALUE, C, BV)
        s = product(q_tile, tl.trans(k_tile), LOW)
        weight = tl.where(i[:, None] >= i[None, :], 1.0 + s + 0.5 * s * s, 0.0)
        read = product(weight, v_tile, LOW) + zeroth[None, :] + product(q_tile, linear, LOW)
        q_pairs = tl.reshape(q_tile[:, :, None] * q_tile[:, None, :], (C, F * F))
        read += 0.5 * product(q_pairs, square, LOW)
        store(out + head * size * VALUE, read, row, column, length, VALUE, C, BV)
        k_pairs = tl.reshape(k_tile[:, :, None] * k_tile[:, None, :], (C, F * F))
        zeroth += tl.sum(v_tile.to(tl.float32), 0)
        linear += product(tl.trans(k_tile), v_tile, LOW)
        square += product(tl.trans(k_pairs), v_tile, LOW)
    tl.store(last + at + columns, zeroth, mask=columns < VALUE)
    store(last + at + VALUE, linear, 0, column, F, VALUE, F, BV)
    store(last + at + (1 + F) * VALUE, square, 0, column, F * F, VALUE, F * F, BV)


def _block(dtype: torch.dtype) -> dict:
    return {"BV": 16 if dtype == torch.float32 else 32, "C": 16, "num_warps": 4, "num_stages": 2}


def taylor_forward(q: Tensor, k: Tensor, v: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """out = sum_{j <= i} (1 + s + s²/2) v_j (B, H, T, V) float32, and the last state, like `first`.

    Args:
        q, k: (B, H|Hq|Hk, T, at most 16), scaled, contiguous. v: (B, H|Hv, T, V). first: (B, H, 273, V) float32.
    """
    batch, heads, _, value = first.shape
    length, key = q.shape[2:]
    block = _block(q.dtype)
    out = first.new_empty(batch, heads, length, value)
    last = first.new_empty(first.shape)
    taylor_kernel[(batch * heads, triton.cdiv(value, block["BV"]))](
        q, k, v, first, last, out, heads=heads, q_group=heads // q.shape[1], k_group=heads // k.shape[1],
        v_group=heads // v.shape[1], length=length, KEY=key, VALUE=value, F=FEATURES, LOW=LOW[q.dtype], **block,
    )  # fmt: skip
    return out, last


def tiles() -> list[Tile]:
    """Half precision, value dim 64 with the column of ones."""
    block, value = _block(torch.bfloat16), 65
    chunk, columns = block["C"], block["BV"]
    constants = {"KEY": FEATURES, "VALUE": value, "F": FEATURES, "BV": columns, "C": chunk}
    chunks = -(-LENGTH // chunk)
    flops = chunks * (2 * chunk * chunk * (FEATURES + columns) + 4 * chunk * (FEATURES + FEATURES**2) * columns)
    moved = chunks * chunk * (2 * (2 * FEATURES + columns) + 4 * columns) + 8 * ROWS * columns
    made = []
    for dtype in ("fp16", "bf16"):
        given = {**constants, "LOW": LOW[DTYPES[dtype]]}
        signature = {name: "constexpr" if name in given else kind(name, dtype) for name in taylor_kernel.arg_names}
        label = f"{dtype} F{FEATURES} V{value} chunk {chunk} block {columns}"
        made.append(Tile(taylor_kernel, label, signature, given, block["num_warps"], block["num_stages"], flops, moved, AT))
    return made
