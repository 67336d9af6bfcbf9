"""Block-sparse attention: each program walks the list of blocks that it may visit, never over the others.

`Lists` holds, for every row of a block mask, the indices of its visible blocks (compressed rows). The forward and dQ walk
the lists of query blocks, dK/dV those of the transposed mask. The steps and argument names are the dense kernels'.
"""

from __future__ import annotations

from itertools import product
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from memlens_kernels.attention import LENGTHS, delta_of, rows_apart, shared_arguments, strides, tile_of
from memlens_kernels.attention_config import LENGTH, SHAPES, Config, make_tile, picked, work
from memlens_kernels.attention_steps import (
    fold_gradient,
    fold_keys,
    fold_queries,
    load_lse,
    load_tile,
    store_tile,
    write_rows,
)
from memlens_kernels.tile import Tile

__all__ = ["Lists", "block_backward", "block_forward", "lists_of", "tiles"]

VISITED = LENGTH // 4  # keys (or queries) that a program visits where flops and bytes are counted


class Lists(NamedTuple):
    starts: Tensor  # (rows + 1,) int32: where each row's list begins
    blocks: Tensor  # int32, ascending within a row
    list_batch: int  # rows from one batch to the next; 0 where all share
    list_head: int


def lists_of(visible: Tensor) -> Lists:
    """The lists of a mask over tiles, (1|B, 1|H, rows, columns) bool."""
    counts = visible.sum(-1).flatten()
    starts = torch.cat((counts.new_zeros(1), counts.cumsum(0))).to(torch.int32)
    blocks = visible.nonzero()[:, -1].to(torch.int32)
    blocks = blocks if blocks.numel() else blocks.new_zeros(1)  # an empty tensor has no address to pass
    (batch, heads), rows = visible.shape[:2], visible.shape[2]
    return Lists(starts, blocks, rows * heads if batch > 1 else 0, rows if heads > 1 else 0)


@triton.jit(do_not_specialize=LENGTHS)
def block_forward_kernel(
    q, k, v, out, lse, starts, blocks, list_batch, list_head,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, heads, group, q_len, k_len, offset, scale_log2,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0) * BLOCK_Q
    head_id = tl.program_id(1).to(tl.int64)
    batch, head = head_id // heads, head_id % heads
    rows = first_row + tl.arange(0, BLOCK_Q)
    k += batch * k_batch + head // group * k_head
    v += batch * v_batch + head // group * v_head
    q_tile = load_tile(q + batch * q_batch + head * q_head, first_row, q_row, q_len, BLOCK_Q, DIM, BLOCK_D, True)
    top = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    held = tl.zeros([BLOCK_Q, BLOCK_V], tl.float32)
    listed = starts + batch * list_batch + head * list_head + tl.program_id(0)
    for n in tl.range(tl.load(listed), tl.load(listed + 1)):
        top, total, held = fold_keys(
            top, total, held, q_tile, k, v, k_row, v_row, q, 0, 0, rows, tl.load(blocks + n) * BLOCK_K, q_len, k_len,
            offset, scale_log2, DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_K, CAUSAL, False, True, PRECISION,
        )  # fmt: skip
    write_rows(out, lse, top, total, held, head_id, first_row, q_len, VALUE_DIM, BLOCK_V, BLOCK_Q)


@triton.jit(do_not_specialize=LENGTHS)
def block_dkdv_kernel(
    q, k, v, lse, delta, dout, dk, dv, starts, blocks, list_batch, list_head,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, do_batch, do_head, do_row,
    heads, group, q_len, k_len, offset, scale, scale_log2,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first_key = tl.program_id(0) * BLOCK_K
    kv_id = tl.program_id(1).to(tl.int64)
    kv_heads = heads // group
    batch, kv_head = kv_id // kv_heads, kv_id % kv_heads
    keys = first_key + tl.arange(0, BLOCK_K)
    k_tile = load_tile(k + batch * k_batch + kv_head * k_head, first_key, k_row, k_len, BLOCK_K, DIM, BLOCK_D, True)
    v_tile = load_tile(v + batch * v_batch + kv_head * v_head, first_key, v_row, k_len, BLOCK_K, VALUE_DIM, BLOCK_V, True)
    dk_tile = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    for member in range(group):
        head = kv_head * group + member
        at = (batch * heads + head) * q_len
        q_at, do_at = q + batch * q_batch + head * q_head, dout + batch * do_batch + head * do_head
        listed = starts + batch * list_batch + head * list_head + tl.program_id(0)
        for n in tl.range(tl.load(listed), tl.load(listed + 1)):
            dk_tile, dv_tile = fold_queries(
                dk_tile, dv_tile, k_tile, v_tile, q_at, do_at, lse + at, delta + at, q_row, do_row, q, 0, 0, keys,
                tl.load(blocks + n) * BLOCK_Q, q_len, k_len, offset, scale_log2,
                DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_Q, CAUSAL, False, True, PRECISION,
            )  # fmt: skip
    store_tile(dk + kv_id * k_len * DIM, dk_tile * scale, first_key, k_len, BLOCK_K, DIM, BLOCK_D)
    store_tile(dv + kv_id * k_len * VALUE_DIM, dv_tile, first_key, k_len, BLOCK_K, VALUE_DIM, BLOCK_V)


@triton.jit(do_not_specialize=LENGTHS)
def block_dq_kernel(
    q, k, v, lse, delta, dout, dq, starts, blocks, list_batch, list_head,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, do_batch, do_head, do_row,
    heads, group, q_len, k_len, offset, scale, scale_log2,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0) * BLOCK_Q
    head_id = tl.program_id(1).to(tl.int64)
    batch, head = head_id // heads, head_id % heads
    rows = first_row + tl.arange(0, BLOCK_Q)
    k += batch * k_batch + head // group * k_head
    v += batch * v_batch + head // group * v_head
    dout += batch * do_batch + head * do_head
    q_tile = load_tile(q + batch * q_batch + head * q_head, first_row, q_row, q_len, BLOCK_Q, DIM, BLOCK_D, True)
    do_tile = load_tile(dout, first_row, do_row, q_len, BLOCK_Q, VALUE_DIM, BLOCK_V, True)
    lse_row = load_lse(lse + head_id * q_len, rows, q_len)
    delta_row = tl.load(delta + head_id * q_len + rows, mask=rows < q_len, other=0.0)
    dq_tile = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    listed = starts + batch * list_batch + head * list_head + tl.program_id(0)
    for n in tl.range(tl.load(listed), tl.load(listed + 1)):
        dq_tile = fold_gradient(
            dq_tile, q_tile, do_tile, lse_row, delta_row, k, v, k_row, v_row, q, 0, 0, rows, tl.load(blocks + n) * BLOCK_K,
            q_len, k_len, offset, scale_log2, DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_K, CAUSAL, False, True, PRECISION,
        )  # fmt: skip
    store_tile(dq + head_id * q_len * DIM, dq_tile * scale, first_row, q_len, BLOCK_Q, DIM, BLOCK_D)


def _plan(kernel: str, shared: dict[str, Any], visible: Tensor, blocks: tuple[int, int]) -> tuple[Config, Tensor]:
    """The dense kernel's tile, shrunk until it divides the blocks, and the mask over such tiles."""
    q_len, k_len = shared["q_len"], shared["k_len"]
    tile = _shrunk(tile_of(kernel, shared), *blocks)
    fine = visible.repeat_interleave(blocks[0] // tile.block_q, 2).repeat_interleave(blocks[1] // tile.block_k, 3)
    fine = fine[:, :, : triton.cdiv(q_len, tile.block_q), : triton.cdiv(k_len, tile.block_k)]
    if shared["CAUSAL"]:  # what lies past the diagonal is not listed
        last = shared["offset"] - 1 + tile.block_q * torch.arange(1, fine.shape[2] + 1, device=fine.device)
        fine = fine & (tile.block_k * torch.arange(fine.shape[3], device=fine.device) <= last[:, None])
    return tile, fine


def _shrunk(tile: Config, block_q: int, block_k: int) -> Config:
    return tile._replace(block_q=gcd(tile.block_q, block_q), block_k=gcd(tile.block_k, block_k))


def block_forward(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, block_q: int, block_k: int, *, scale: float, causal: bool, offset: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) over the blocks of `visible` (1|B, 1|H, query blocks, key blocks); see `attention_forward`.

    Both block sizes are multiples of 16.
    """
    q, k, v = rows_apart(q, k, v)
    shared = shared_arguments(q, k, v, scale=scale, causal=causal, offset=offset)
    tile, fine = _plan("forward", shared, visible, (block_q, block_k))
    out = q.new_empty((*q.shape[:3], v.shape[-1]))
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    block_forward_kernel[(fine.shape[2], q.shape[0] * q.shape[1])](
        out=out, lse=lse, **lists_of(fine)._asdict(), **shared, **tile.options()
    )
    return out, lse


def block_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
    visible: Tensor, block_q: int, block_k: int, *, scale: float, causal: bool, offset: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) of `block_forward`."""
    q, k, v, dout = rows_apart(q, k, v, dout)
    shared = shared_arguments(q, k, v, scale=scale, causal=causal, offset=offset)
    shared |= strides(do=dout) | {"lse": lse.contiguous(), "dout": dout, "scale": scale}
    shared["delta"] = delta_of(out.contiguous(), dout, dlse)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    tile, fine = _plan("dkdv", shared, visible, (block_q, block_k))
    block_dkdv_kernel[(fine.shape[3], k.shape[0] * k.shape[1])](
        dk=dk, dv=dv, **lists_of(fine.transpose(2, 3))._asdict(), **shared, **tile.options()
    )
    tile, fine = _plan("dq", shared, visible, (block_q, block_k))
    block_dq_kernel[(fine.shape[2], q.shape[0] * q.shape[1])](dq=dq, **lists_of(fine)._asdict(), **shared, **tile.options())
    return dq, dk, dv


def tiles() -> list[Tile]:
    """The shipped tiles: blocks of 64, causal, a quarter of the keys visited, the dtypes and dims of dense attention."""
    kernels = {"forward": block_forward_kernel, "dkdv": block_dkdv_kernel, "dq": block_dq_kernel}
    at = f"{VISITED} of length {LENGTH} visited"
    made = []
    for shape, name in product([shape for shape in SHAPES if shape.causal], kernels):
        for tile, on in picked(name, shape).items():
            tile = _shrunk(tile, 64, 64)
            made.append(make_tile(kernels[name], f"{name} blocks", shape, tile, work(name, shape, tile, VISITED), at, on))
    return made
