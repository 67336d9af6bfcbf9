"""For each evicted key the kept key with the largest cosine, without the matrix of cosines.

One program takes a block of evicted keys and walks over the kept ones; of each product it keeps the largest cosine so far and
where it was. Both norms are made from the tiles that are loaded anyway. Ties go to the lower index, and nothing is added with
atomics, so a run repeats to the last bit. Adding the merged keys and values to their targets is a second, linear pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memlens_kernels.tile import Tile

__all__ = ["nearest_by_cosine", "tiles"]


@triton.jit
def nearest_kernel(
    evict, keep, assign, sim, evicted, kept, heads, e_b, e_h, e_m, k_b, k_h, k_n,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of evicted keys of one head: sim_i = max_c cos(e_i, k_c), and the first c that reaches it."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    rows = tl.load(
        evict + batch * e_b + head * e_h + m.to(tl.int64)[:, None] * e_m + d[None, :],
        mask=(m < evicted)[:, None] & (d < DIM)[None, :], other=0.0,
    )  # fmt: skip
    wide = rows.to(tl.float32)
    row_norm = tl.sqrt(tl.sum(wide * wide, 1))
    keys = keep + batch * k_b + head * k_h
    best = tl.full((BLOCK_M,), -2.0, tl.float32)
    where = tl.zeros((BLOCK_M,), tl.int32)
    for start in range(0, kept, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        tile = tl.load(
            keys + n.to(tl.int64)[None, :] * k_n + d[:, None], mask=(n < kept)[None, :] & (d < DIM)[:, None], other=0.0
        )
        broad = tile.to(tl.float32)
        norm = row_norm[:, None] * tl.sqrt(tl.sum(broad * broad, 0))[None, :]
        s = tl.dot(rows, tile, input_precision="ieee") / tl.where(norm > 0, norm, 1.0)
        s = tl.where(norm > 0, s, -1.0)  # a key of length zero has no direction
        s = tl.where((n < kept)[None, :], s, -3.0)
        top = tl.max(s, 1)
        first = tl.min(tl.where(s == top[:, None], n[None, :], 2147483647), 1)
        where = tl.where(top > best, first, where)
        best = tl.maximum(best, top)
    out = (batch * heads + head) * evicted + m
    tl.store(assign + out, where, mask=m < evicted)
    tl.store(sim + out, best, mask=m < evicted)


def _blocks(dim: int, dtype: torch.dtype) -> dict:
    # float32 products run on the ordinary units, from registers: a larger tile spills
    rows, keys = (16, 32 if dim <= 64 else 16) if dtype == torch.float32 else (64, 64)
    return {"BLOCK_D": max(16, triton.next_power_of_2(dim)), "BLOCK_M": rows, "BLOCK_N": keys}


def nearest_by_cosine(k_evict: Tensor, k_keep: Tensor) -> tuple[Tensor, Tensor]:
    """(assign (B, Hkv, e) int64, sim (B, Hkv, e) float32).

    Args:
        k_evict: (B, Hkv, e, D) and k_keep: (B, Hkv, b, D), of one dtype, D at most 256; b at least 1.
    """
    (batch, heads, evicted, dim), kept = k_evict.shape, k_keep.shape[2]
    k_evict, k_keep = (x if x.stride(-1) == 1 else x.contiguous() for x in (k_evict, k_keep))
    assign = torch.empty(batch, heads, evicted, device=k_evict.device, dtype=torch.int32)
    sim = torch.empty(batch, heads, evicted, device=k_evict.device, dtype=torch.float32)
    blocks = _blocks(dim, k_evict.dtype)
    if evicted:
        grid = (triton.cdiv(evicted, blocks["BLOCK_M"]), batch * heads)
        strides = (*k_evict.stride()[:3], *k_keep.stride()[:3])
        nearest_kernel[grid](k_evict, k_keep, assign, sim, evicted, kept, heads, *strides, dim, **blocks, num_warps=4)
    return assign.long(), sim


ALIGNED = ("evict", "keep", "assign", "sim", "e_b", "e_h", "e_m", "k_b", "k_h", "k_n")  # for rows of 8 numbers or more


def _tile(dtype: str, dim: int, kept: int) -> Tile:
    blocks = _blocks(dim, torch.float32 if dtype == "fp32" else torch.float16)
    m, n, size = blocks["BLOCK_M"], blocks["BLOCK_N"], 4 if dtype == "fp32" else 2
    constants = {"DIM": dim, **blocks}
    pointers = {"evict": f"*{dtype}", "keep": f"*{dtype}", "assign": "*i32", "sim": "*fp32"}
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in nearest_kernel.arg_names}
    label, moved = f"nearest {dtype} D{dim} {m}x{n}", (m + kept) * dim * size + 8 * m
    return Tile(
        nearest_kernel, label, signature, constants, 4, 3, 2 * m * kept * dim, moved, f"{kept} keys kept", aligned=ALIGNED
    )


def tiles() -> list[Tile]:
    """The shipped tiles: a fifth of 4,096 tokens kept."""
    return [_tile(dtype, dim, 819) for dtype in ("fp16", "bf16", "fp32") for dim in (64, 128)]
