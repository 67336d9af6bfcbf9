"""Column statistics of causal attention, tile by tile, without the attention matrix.

Two passes over the scores. The first gives each row its log-denominator (left out where the caller has it from the forward
pass); the second gives each block of keys one program, which walks down the rows that see the block and keeps one number
per key in registers. Nothing is added with atomics, so a run repeats to the last bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memlens_kernels.tile import Tile

__all__ = ["column_mass", "tiles"]

REDUCES = {"sum": 0, "max": 1, "count_above": 2, "count_below": 3}


@triton.jit
def lse_kernel(
    q, k, alive, lse, scale, q_start, heads, kv_heads, q_len, k_len,
    q_b, q_h, q_m, k_b, k_h, k_n, DIM: tl.constexpr, HAS_ALIVE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of rows: lse_i = log Σ_j exp(scale q_i·k_j) over visible keys; -inf where there is none."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    kv_head = head // (heads // kv_heads)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    rows = tl.load(
        q + batch * q_b + head * q_h + m.to(tl.int64)[:, None] * q_m + d[None, :],
        mask=(m < q_len)[:, None] & (d < DIM)[None, :], other=0.0,
    )  # fmt: skip
    keys = k + batch * k_b + kv_head * k_h
    live = alive + (batch * kv_heads + kv_head) * k_len
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    last = tl.minimum(k_len, q_start + (tl.program_id(0) + 1) * BLOCK_M)
    for start in range(0, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        tile = tl.load(
            keys + n.to(tl.int64)[None, :] * k_n + d[:, None], mask=(n < k_len)[None, :] & (d < DIM)[:, None], other=0.0
        )
        s = tl.dot(rows, tile, input_precision="ieee") * (scale * 1.4426950408889634)
        seen = (n[None, :] <= q_start + m[:, None]) & (n < k_len)[None, :]
        if HAS_ALIVE:
            seen &= (tl.load(live + n, mask=n < k_len, other=0) != 0)[None, :]
        s = tl.where(seen, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(s - safe[:, None]), 1)
        top = new_top
    norm = (top + tl.log2(tl.where(total > 0, total, 1.0))) / 1.4426950408889634
    out = tl.where(total > 0, norm, float("-inf"))
    tl.store(lse + (batch * heads + head) * q_len + m, out, mask=m < q_len)


@triton.jit
def column_kernel(
    q, k, lse, alive, limit, out, scale, q_start, heads, kv_heads, q_len, k_len,
    q_b, q_h, q_m, k_b, k_h, k_n, DIM: tl.constexpr, REDUCE: tl.constexpr, HAS_ALIVE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of keys of one query head: the reduction of exp(s - lse) down the rows that see them."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    kv_head = head // (heads // kv_heads)
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    tile = tl.load(
        k + batch * k_b + kv_head * k_h + n.to(tl.int64)[None, :] * k_n + d[:, None],
        mask=(n < k_len)[None, :] & (d < DIM)[:, None], other=0.0,
    )  # fmt: skip
    here = n < k_len
    if HAS_ALIVE:
        here &= tl.load(alive + (batch * kv_heads + kv_head) * k_len + n, mask=n < k_len, other=0) != 0
    row_base = (batch * heads + head) * q_len
    queries = q + batch * q_b + head * q_h
    acc = tl.zeros((BLOCK_N,), tl.float32)
    begin = (tl.maximum(first - q_start, 0) // BLOCK_M) * BLOCK_M
    for start in range(begin, q_len, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        rows = tl.load(
            queries + m.to(tl.int64)[:, None] * q_m + d[None, :], mask=(m < q_len)[:, None] & (d < DIM)[None, :], other=0.0
        )
        norm = tl.load(lse + row_base + m, mask=m < q_len, other=0.0)
        s = tl.dot(rows, tile, input_precision="ieee") * scale - norm[:, None]
        seen = (n[None, :] <= q_start + m[:, None]) & here[None, :] & (m < q_len)[:, None]
        p = tl.where(seen, tl.exp2(s * 1.4426950408889634), 0.0)
        if REDUCE == 0:
            acc += tl.sum(p, 0)
        elif REDUCE == 1:
            acc = tl.maximum(acc, tl.max(p, 0))
        else:
            bound = tl.load(limit + (batch * kv_heads + kv_head) * q_len + m, mask=m < q_len, other=0.0)[:, None]
            hit = (p > bound) if REDUCE == 2 else (p < bound)
            acc += tl.sum((hit & seen).to(tl.float32), 0)
    tl.store(out + (batch * heads + head) * k_len + n, acc, mask=n < k_len)


def _blocks(q_len: int, dim: int, dtype: torch.dtype) -> dict:
    # float32 products run on the ordinary units, from registers: a larger tile spills
    if dtype == torch.float32:
        rows, keys = 16, 32 if dim <= 64 else 16
    else:
        rows, keys = 16 if q_len <= 16 else 32 if q_len <= 32 else 64, 64
    return {"BLOCK_D": max(16, triton.next_power_of_2(dim)), "BLOCK_M": rows, "BLOCK_N": keys}


def column_mass(
    q: Tensor, k: Tensor, *, lse: Tensor | None, alive: Tensor | None, limit: Tensor | None, q_start: int, scale: float,
    reduce: str,
) -> Tensor:  # fmt: skip
    """Column statistic of P per query head, (B, H, L) float32.

    Args:
        q: (B, H, Lq, D) and k: (B, Hkv, L, D), last axis contiguous, D at most 256; row i sees keys up to q_start + i.
        lse: (B, H, Lq) float32, or None to compute it here.
        alive: (B, Hkv, L) bool, contiguous, or None.
        limit: (B, Hkv, Lq) float32 for the counts, else None.
        reduce: sum | max | count_above | count_below.
    """
    (batch, heads, q_len, dim), (kv_heads, k_len) = q.shape, k.shape[1:3]
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    shared = (scale, q_start, heads, kv_heads, q_len, k_len, *q.stride()[:3], *k.stride()[:3], dim)
    blocks = _blocks(q_len, dim, q.dtype)
    live = q if alive is None else alive.view(torch.uint8)
    if lse is None:
        lse = torch.empty(batch, heads, q_len, device=q.device, dtype=torch.float32)
        grid = (triton.cdiv(q_len, blocks["BLOCK_M"]), batch * heads)
        lse_kernel[grid](q, k, live, lse, *shared, alive is not None, **blocks, num_warps=4)
    # a row that saw nothing has lse = -inf; it has no visible key, so any finite number serves
    lse = lse.float().masked_fill(lse == -torch.inf, 0.0).contiguous()
    out = torch.empty(batch, heads, k_len, device=q.device, dtype=torch.float32)
    bound = lse if limit is None else limit.contiguous()
    grid = (triton.cdiv(k_len, blocks["BLOCK_N"]), batch * heads)
    column_kernel[grid](q, k, lse, live, bound, out, *shared, REDUCES[reduce], alive is not None, **blocks, num_warps=4)
    return out


ALIGNED = ("q", "k", "lse", "limit", "out", "q_b", "q_h", "q_m", "k_b", "k_h", "k_n")  # for rows of 8 numbers or more


def _signature(kernel, dtype: str, constants: dict) -> dict[str, str]:
    pointers = {"q": dtype, "k": dtype, "lse": "*fp32", "alive": "*u8", "limit": "*fp32", "out": "*fp32", "scale": "fp32"}
    return {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}


def _tile(kernel, dtype: str, dim: int, rows: int, length: int) -> Tile:
    blocks = _blocks(rows, dim, torch.float32 if dtype == "fp32" else torch.float16)
    m, n, size = blocks["BLOCK_M"], blocks["BLOCK_N"], 4 if dtype == "fp32" else 2
    column = kernel is column_kernel
    own, other = (n, rows) if column else (m, length)
    constants = {"DIM": dim, "HAS_ALIVE": False, **blocks, **({"REDUCE": REDUCES["sum"]} if column else {})}
    moved = (own + other) * dim * size + own * 4 + (other * 4 if column else 0)
    label = f"{'column' if column else 'lse'} {dtype} D{dim} {m}x{n}"
    return Tile(
        kernel, label, _signature(kernel, f"*{dtype}", constants), constants, 4, 3,
        2 * own * other * dim, moved, f"{rows} rows, {length} keys", aligned=ALIGNED,
    )  # fmt: skip


def tiles() -> list[Tile]:
    """The shipped tiles: all rows of a prompt, and an observation window of 32 rows."""
    shapes = [("fp16", 64, 4096), ("fp16", 128, 4096), ("fp32", 64, 4096), ("fp32", 128, 4096), ("bf16", 64, 32)]
    return [_tile(kernel, dtype, dim, rows, 4096) for dtype, dim, rows in shapes for kernel in (lse_kernel, column_kernel)]
