"""Attention kernels: forward, Δ, dK/dV and dQ, one program for a block of queries (or keys) of one head; no atomics.

The forward folds key blocks into a running maximum, denominator and unnormalised output (online softmax) in powers of
two: scores are multiplied by scale · log2(e) so that `exp2` gives the exponential. The backward recomputes a tile's
probabilities from lse. Under `CAUSAL` key blocks past the diagonal are not visited, and only those on it (and a ragged
last one) are masked. No (q_len, k_len) matrix is stored. Source: arXiv:2205.14135; the loop order is arXiv:2307.08691's.

Shapes: q (B,H,Tq,D), k (B,Hkv,Tk,D), v (B,Hkv,Tk,Dv); query head h reads kv head h // (H / Hkv). Any strides over batch,
head and row; the last axis is contiguous. Row i has position offset + i. lse is float32, natural log, -inf for a row that
sees no key.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memlens_kernels.attention_config import (
    DELTA_ROWS,
    LENGTH,
    SHAPES,
    Config,
    Shape,
    config,
    make_tile,
    picked,
    precision,
    target,
    work,
)
from memlens_kernels.attention_steps import (
    LOG2E,
    fold_gradient,
    fold_keys,
    fold_queries,
    load_lse,
    load_tile,
    store_tile,
    write_rows,
)
from memlens_kernels.tile import TARGETS, Tile

__all__ = ["MAX_DIM", "attention_backward", "attention_forward", "tiles"]

MAX_DIM = 256
LENGTHS = ["q_len", "k_len", "offset"]  # not specialised: one binary serves every length


@triton.jit
def key_range(first_row, k_len, offset, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr):
    """(plain, last): key blocks below `plain` are seen whole by every row of the block, those from `last` on by none."""
    plain, last = k_len, k_len
    if CAUSAL:
        plain = tl.minimum(k_len, tl.maximum(offset + first_row + 1, 0))
        last = tl.minimum(k_len, tl.maximum(offset + first_row + BLOCK_Q, 0))
    return plain // BLOCK_K * BLOCK_K, last


@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    q, k, v, mask, out, lse, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_row, mask_key, heads, group, q_len, k_len, offset, scale_log2,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # the last query blocks of a causal call are the longest: they start first
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
    head_id = tl.program_id(1).to(tl.int64)
    batch, head = head_id // heads, head_id % heads
    rows = first_row + tl.arange(0, BLOCK_Q)
    k += batch * k_batch + head // group * k_head
    v += batch * v_batch + head // group * v_head
    mask += batch * mask_batch + head * mask_head
    q_tile = load_tile(q + batch * q_batch + head * q_head, first_row, q_row, q_len, BLOCK_Q, DIM, BLOCK_D, True)
    top = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    held = tl.zeros([BLOCK_Q, BLOCK_V], tl.float32)
    plain, last = key_range(first_row, k_len, offset, BLOCK_Q, BLOCK_K, CAUSAL)
    for start in tl.range(0, plain, BLOCK_K):
        top, total, held = fold_keys(
            top, total, held, q_tile, k, v, k_row, v_row, mask, mask_row, mask_key, rows, start, q_len, k_len, offset,
            scale_log2, DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_K, CAUSAL, MASK, False, PRECISION,
        )  # fmt: skip
    for start in tl.range(plain, last, BLOCK_K):
        top, total, held = fold_keys(
            top, total, held, q_tile, k, v, k_row, v_row, mask, mask_row, mask_key, rows, start, q_len, k_len, offset,
            scale_log2, DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_K, CAUSAL, MASK, True, PRECISION,
        )  # fmt: skip
    write_rows(out, lse, top, total, held, head_id, first_row, q_len, VALUE_DIM, BLOCK_V, BLOCK_Q)


@triton.jit(do_not_specialize=["q_len"])
def delta_kernel(
    out, dout, dlse, delta, do_batch, do_head, do_row, heads, q_len,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr, DLSE: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO ∘ O) - dlse."""
    first_row = tl.program_id(0) * BLOCK_Q
    rows = first_row + tl.arange(0, BLOCK_Q)
    head_id = tl.program_id(1).to(tl.int64)
    dout += head_id // heads * do_batch + head_id % heads * do_head
    o_tile = load_tile(
        out + head_id * q_len * VALUE_DIM, first_row, VALUE_DIM, q_len, BLOCK_Q, VALUE_DIM, BLOCK_V, True
    ).to(tl.float32)
    do_tile = load_tile(dout, first_row, do_row, q_len, BLOCK_Q, VALUE_DIM, BLOCK_V, True).to(tl.float32)
    value = tl.sum(o_tile * do_tile, 1)
    at = head_id * q_len + rows
    if DLSE:
        value -= tl.load(dlse + at, mask=rows < q_len, other=0.0)
    tl.store(delta + at, value, mask=rows < q_len)


@triton.jit(do_not_specialize=LENGTHS)
def dkdv_kernel(
    q, k, v, mask, lse, delta, dout, dk, dv, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    do_batch, do_head, do_row, mask_batch, mask_head, mask_row, mask_key, heads, group, q_len, k_len, offset, scale,
    scale_log2, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One key block of one kv head: sums over the queries of its whole group."""
    first_key = tl.program_id(0) * BLOCK_K
    kv_id = tl.program_id(1).to(tl.int64)
    kv_heads = heads // group
    batch, kv_head = kv_id // kv_heads, kv_id % kv_heads
    keys = first_key + tl.arange(0, BLOCK_K)
    k_tile = load_tile(k + batch * k_batch + kv_head * k_head, first_key, k_row, k_len, BLOCK_K, DIM, BLOCK_D, True)
    v_tile = load_tile(v + batch * v_batch + kv_head * v_head, first_key, v_row, k_len, BLOCK_K, VALUE_DIM, BLOCK_V, True)
    dk_tile = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    first, plain = tl.zeros_like(q_len), tl.zeros_like(q_len)
    if CAUSAL:  # rows before `first` see none of these keys, rows from `plain` on see all
        first = tl.maximum(first_key - offset, 0) // BLOCK_Q * BLOCK_Q
        plain = tl.cdiv(tl.maximum(first_key + BLOCK_K - 1 - offset, 0), BLOCK_Q) * BLOCK_Q
    if first_key + BLOCK_K > k_len:
        plain = tl.maximum(plain, q_len)
    for member in range(group):
        head = kv_head * group + member
        at = (batch * heads + head) * q_len
        q_at, do_at = q + batch * q_batch + head * q_head, dout + batch * do_batch + head * do_head
        mask_at = mask + batch * mask_batch + head * mask_head
        for start in tl.range(first, tl.minimum(plain, q_len), BLOCK_Q):
            dk_tile, dv_tile = fold_queries(
                dk_tile, dv_tile, k_tile, v_tile, q_at, do_at, lse + at, delta + at, q_row, do_row, mask_at, mask_row,
                mask_key, keys, start, q_len, k_len, offset, scale_log2,
                DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_Q, CAUSAL, MASK, True, PRECISION,
            )  # fmt: skip
        for start in tl.range(plain, q_len, BLOCK_Q):
            dk_tile, dv_tile = fold_queries(
                dk_tile, dv_tile, k_tile, v_tile, q_at, do_at, lse + at, delta + at, q_row, do_row, mask_at, mask_row,
                mask_key, keys, start, q_len, k_len, offset, scale_log2,
                DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_Q, CAUSAL, MASK, False, PRECISION,
            )  # fmt: skip
    store_tile(dk + kv_id * k_len * DIM, dk_tile * scale, first_key, k_len, BLOCK_K, DIM, BLOCK_D)
    store_tile(dv + kv_id * k_len * VALUE_DIM, dv_tile, first_key, k_len, BLOCK_K, VALUE_DIM, BLOCK_V)


@triton.jit(do_not_specialize=LENGTHS)
def dq_kernel(
    q, k, v, mask, lse, delta, dout, dq, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    do_batch, do_head, do_row, mask_batch, mask_head, mask_row, mask_key, heads, group, q_len, k_len, offset, scale,
    scale_log2, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
    head_id = tl.program_id(1).to(tl.int64)
    batch, head = head_id // heads, head_id % heads
    rows = first_row + tl.arange(0, BLOCK_Q)
    k += batch * k_batch + head // group * k_head
    v += batch * v_batch + head // group * v_head
    mask += batch * mask_batch + head * mask_head
    q_tile = load_tile(q + batch * q_batch + head * q_head, first_row, q_row, q_len, BLOCK_Q, DIM, BLOCK_D, True)
    do_tile = load_tile(
        dout + batch * do_batch + head * do_head, first_row, do_row, q_len, BLOCK_Q, VALUE_DIM, BLOCK_V, True
    )
    lse_row = load_lse(lse + head_id * q_len, rows, q_len)
    delta_row = tl.load(delta + head_id * q_len + rows, mask=rows < q_len, other=0.0)
    plain, last = key_range(first_row, k_len, offset, BLOCK_Q, BLOCK_K, CAUSAL)
    dq_tile = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in tl.range(0, plain, BLOCK_K):
        dq_tile = fold_gradient(
            dq_tile, q_tile, do_tile, lse_row, delta_row, k, v, k_row, v_row, mask, mask_row, mask_key, rows, start,
            q_len, k_len, offset, scale_log2, DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_K, CAUSAL, MASK, False, PRECISION,
        )  # fmt: skip
    for start in tl.range(plain, last, BLOCK_K):
        dq_tile = fold_gradient(
            dq_tile, q_tile, do_tile, lse_row, delta_row, k, v, k_row, v_row, mask, mask_row, mask_key, rows, start,
            q_len, k_len, offset, scale_log2, DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_K, CAUSAL, MASK, True, PRECISION,
        )  # fmt: skip
    store_tile(dq + head_id * q_len * DIM, dq_tile * scale, first_row, q_len, BLOCK_Q, DIM, BLOCK_D)


def block_dim(dim: int) -> int:
    """A head dim padded to a power of two of at least 16, as a tile needs it."""
    return max(16, triton.next_power_of_2(dim))


def rows_apart(*tensors: Tensor) -> list[Tensor]:
    """The tensors with neighbours in memory along the last axis; others are copied."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def strides(**tensors: Tensor) -> dict[str, int]:
    """`q_batch`, `q_head`, `q_row`, ... for tensors (batch, heads, rows, dim)."""
    return {f"{name}_{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate(("batch", "head", "row"))}


def shared_arguments(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, offset: int) -> dict[str, Any]:
    """The arguments that every attention kernel but delta takes."""
    return strides(q=q, k=k, v=v) | {
        "q": q, "k": k, "v": v, "heads": q.shape[1], "group": q.shape[1] // k.shape[1],
        "q_len": q.shape[2], "k_len": k.shape[2], "offset": offset, "scale_log2": scale * LOG2E.value,
        "DIM": q.shape[-1], "VALUE_DIM": v.shape[-1], "BLOCK_D": block_dim(q.shape[-1]), "BLOCK_V": block_dim(v.shape[-1]),
        "CAUSAL": causal, "PRECISION": precision(q.element_size()),
    }  # fmt: skip


def tile_of(kernel: str, shared: dict[str, Any]) -> Config:
    """The tile that a kernel runs with on its arguments."""
    q, width = shared["q"], max(shared["BLOCK_D"], shared["BLOCK_V"])
    return config(kernel, width, q.element_size(), target(q), masked=shared.get("MASK", False))


def _mask_arguments(q: Tensor, k: Tensor, mask: Tensor | None) -> dict[str, Any]:
    axes = ("mask_batch", "mask_head", "mask_row", "mask_key")
    if mask is None:
        return dict.fromkeys(axes, 0) | {"mask": q, "MASK": False}
    full = mask.expand(*q.shape[:3], k.shape[2])  # a broadcast axis has stride 0
    return dict(zip(axes, full.stride(), strict=True)) | {"mask": full.view(torch.uint8), "MASK": True}


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, offset: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out (B,H,Tq,Dv) in q's dtype, lse (B,H,Tq) float32).

    `mask` is bool and broadcasts to (B,H,Tq,Tk); dims are at most MAX_DIM.
    """
    q, k, v = rows_apart(q, k, v)
    out = q.new_empty((*q.shape[:3], v.shape[-1]))
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    shared = shared_arguments(q, k, v, scale=scale, causal=causal, offset=offset) | _mask_arguments(q, k, mask)
    tile = tile_of("forward", shared)
    forward_kernel[(triton.cdiv(q.shape[2], tile.block_q), q.shape[0] * q.shape[1])](
        out=out, lse=lse, **shared, **tile.options()
    )
    return out, lse


def delta_of(out: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    """rowsum(dout ∘ out) - dlse, (B,H,Tq) float32, from a contiguous out."""
    delta = out.new_empty(out.shape[:3], dtype=torch.float32)
    delta_kernel[(triton.cdiv(out.shape[2], DELTA_ROWS), out.shape[0] * out.shape[1])](
        out=out, dout=dout, dlse=delta if dlse is None else dlse.contiguous(), delta=delta, **strides(do=dout),
        heads=out.shape[1], q_len=out.shape[2], VALUE_DIM=out.shape[-1], BLOCK_V=block_dim(out.shape[-1]),
        BLOCK_Q=DELTA_ROWS, DLSE=dlse is not None, num_warps=4,
    )  # fmt: skip
    return delta


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, *,
    scale: float, causal: bool, offset: int, mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) from the results of `attention_forward` and the gradients of out and (or None) lse."""
    q, k, v, dout = rows_apart(q, k, v, dout)
    shared = shared_arguments(q, k, v, scale=scale, causal=causal, offset=offset) | _mask_arguments(q, k, mask)
    shared |= strides(do=dout) | {"lse": lse.contiguous(), "dout": dout, "scale": scale}
    shared["delta"] = delta_of(out.contiguous(), dout, dlse)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    tile = tile_of("dkdv", shared)
    dkdv_kernel[(triton.cdiv(k.shape[2], tile.block_k), k.shape[0] * k.shape[1])](dk=dk, dv=dv, **shared, **tile.options())
    tile = tile_of("dq", shared)
    dq_kernel[(triton.cdiv(q.shape[2], tile.block_q), q.shape[0] * q.shape[1])](dq=dq, **shared, **tile.options())
    return dq, dk, dv


def tiles() -> list[Tile]:
    """Every shipped tile: each kernel for float16 and float32, dims 64, 128 and 256, causal, full, and full with a mask.

    bfloat16 runs with float16's tiles and is listed for causal calls at dims 64 and 128 only.
    """
    once = [shape for shape in SHAPES if shape.causal]
    made = [_tile("delta", shape, Config(DELTA_ROWS, DELTA_ROWS, 4, 1), TARGETS) for shape in once]
    for shape, name in product(SHAPES, ("forward", "dkdv", "dq")):
        made += [_tile(name, shape, tile, targets) for tile, targets in picked(name, shape).items()]
    return made


def _tile(name: str, shape: Shape, tile: Config, targets: tuple[str, ...]) -> Tile:
    kernel = {"forward": forward_kernel, "delta": delta_kernel, "dkdv": dkdv_kernel, "dq": dq_kernel}[name]
    at = f"length {LENGTH}, the block that sees all"
    return make_tile(kernel, name, shape, tile, work(name, shape, tile, LENGTH), at, targets)
