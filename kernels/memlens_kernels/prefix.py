"""Decoding of requests that share a prefix, in one launch: programs for the prefix and for each request's own keys side by side.

The first programs take blocks of the stacked queries of all requests and a span of the prefix, which is read once for the
group, in the shape that matrix units like; the others take one request's rows and a span of its own keys. Every program
leaves a part (out, lse), and a row's parts are joined by their lse.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memlens_kernels.attention_steps import LOG2E, load_tile
from memlens_kernels.decode_steps import fold, write_part
from memlens_kernels.tile import Tile

__all__ = ["prefix_parts", "tiles"]


@triton.jit
def span_part(
    q, k, v, alive, out, lse, k_n, v_n, first_row, rows, first, last, length, fresh, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, OWN: tl.constexpr, HAS_ALIVE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of rows over keys [first, last): out and lse. OWN keys are causal: row m is token length - fresh + m % fresh."""
    m = first_row + tl.arange(0, BLOCK_M)
    q_tile = load_tile(q, first_row, DIM, rows, BLOCK_M, DIM, BLOCK_D, True)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    held = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k_tile = load_tile(k, start, k_n, last, BLOCK_N, DIM, BLOCK_D, True)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
        seen = (n < last)[None, :] & (m < rows)[:, None]
        if OWN:
            seen &= n[None, :] <= (length - fresh + m % fresh)[:, None]
            if HAS_ALIVE:
                seen &= (tl.load(alive + n, mask=n < last, other=0) != 0)[None, :]
        v_tile = load_tile(v, start, v_n, last, BLOCK_N, VALUE_DIM, BLOCK_V, True)
        top, total, held = fold(top, total, held, tl.where(seen, s, float("-inf")), v_tile, PRECISION)
    write_part(out, lse, top, total, held, first_row, rows, VALUE_DIM, BLOCK_V, BLOCK_M)


@triton.jit(do_not_specialize=["requests", "prefix", "own", "fresh", "span", "row_blocks", "shared", "own_parts"])
def prefix_kernel(
    q, k_pre, v_pre, k_own, v_own, alive, out, lse, scale, requests, rows, prefix, own, fresh, span, row_blocks, shared,
    own_parts, kp_h, kp_n, vp_h, vp_n, ko_r, ko_h, ko_n, vo_r, vo_h, vo_n,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HAS_ALIVE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    STACKED: tl.constexpr, ALONE: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs below `shared` are (span, block of stacked rows) of the prefix, the others (request, span) of the own keys.

    Parts lie (part, kv head, request, row): first those of the prefix, then those of the own keys.
    """
    job, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    stacked = requests * rows
    out_head, lse_head = out + head * stacked * VALUE_DIM, lse + head * stacked
    size = tl.num_programs(1).to(tl.int64) * stacked  # rows of one part
    q += head * stacked * DIM
    if job < shared:
        part, block = job // row_blocks, job % row_blocks
        first = part * span
        span_part(
            q, k_pre + head * kp_h, v_pre + head * vp_h, alive, out_head + part * size * VALUE_DIM, lse_head + part * size,
            kp_n, vp_n, block * STACKED, stacked, first, tl.minimum(first + span, prefix), prefix, fresh, scale,
            DIM, VALUE_DIM, False, False, BLOCK_D, BLOCK_V, STACKED, BLOCK_N, PRECISION,
        )  # fmt: skip
    else:
        request, part = ((job - shared) // own_parts).to(tl.int64), (job - shared) % own_parts
        first, row = part * span, request * rows
        at = (shared // row_blocks + part) * size + row
        span_part(
            q + row * DIM, k_own + request * ko_r + head * ko_h, v_own + request * vo_r + head * vo_h, alive + request * own,
            out_head + at * VALUE_DIM, lse_head + at, ko_n, vo_n, 0, rows, first, tl.minimum(first + span, own), own, fresh,
            scale, DIM, VALUE_DIM, True, HAS_ALIVE, BLOCK_D, BLOCK_V, ALONE, BLOCK_N, PRECISION,
        )  # fmt: skip


def _config(dim: int, value_dim: int, rows: int, dtype: torch.dtype) -> dict:
    wide, most = dtype == torch.float32, max(dim, value_dim)
    return {
        "BLOCK_D": max(16, triton.next_power_of_2(dim)), "BLOCK_V": max(16, triton.next_power_of_2(value_dim)),
        "STACKED": 16 if wide else 64, "ALONE": max(16, triton.next_power_of_2(rows)),
        "BLOCK_N": 16 if wide and most > 64 else 32, "PRECISION": "ieee" if wide else "tf32",
    }  # fmt: skip


def prefix_parts(
    q: Tensor, k_pre: Tensor, v_pre: Tensor, k_own: Tensor, v_own: Tensor, *, fresh: int, alive: Tensor | None,
    scale: float, span: int = 512,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Out (parts, Hkv, R, rows, Dv) in q's dtype and lse (parts, Hkv, R, rows), float32, -inf where a part saw nothing.

    Args:
        q: (Hkv, R, rows, D), contiguous: the rows of a request's query heads that read a kv head, head by head, `fresh`
            tokens of each; at most 64 rows, dims at most 256.
        k_pre, v_pre: (Hkv, P, D) and (Hkv, P, Dv), seen by all.
        k_own, v_own: (R, Hkv, T, D) and (R, Hkv, T, Dv), of which the last `fresh` tokens are the queries' own.
        alive: (R, T) bool, contiguous, or None.
        span: keys of one program; a multiple of 64.
    """
    (kv_heads, requests, rows, dim), value_dim = q.shape, v_pre.shape[-1]
    pre, own = k_pre.shape[1], k_own.shape[2]
    k_pre, v_pre, k_own, v_own = (x if x.stride(-1) == 1 else x.contiguous() for x in (k_pre, v_pre, k_own, v_own))
    config = _config(dim, value_dim, rows, q.dtype)
    pre_parts, own_parts = triton.cdiv(pre, span), triton.cdiv(own, span)
    row_blocks = triton.cdiv(requests * rows, config["STACKED"])
    shape = (pre_parts + own_parts, kv_heads, requests, rows)
    out = torch.empty(*shape, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    strides = (*k_pre.stride()[:2], *v_pre.stride()[:2], *k_own.stride()[:3], *v_own.stride()[:3])
    grid = (pre_parts * row_blocks + requests * own_parts, kv_heads)
    prefix_kernel[grid](
        q, k_pre, v_pre, k_own, v_own, q if alive is None else alive.view(torch.uint8), out, lse, scale, requests, rows, pre,
        own, fresh, span, row_blocks, pre_parts * row_blocks, own_parts, *strides, dim, value_dim, alive is not None,
        **config, num_warps=4,
    )  # fmt: skip
    return out, lse


STRIDES = ("kp_h", "kp_n", "vp_h", "vp_n", "ko_r", "ko_h", "ko_n", "vo_r", "vo_h", "vo_n")
ALIGNED = ("q", "k_pre", "v_pre", "k_own", "v_own", "out", *STRIDES)  # for rows of 8 numbers or more


def _tile(dtype: str, dim: int, alive: bool) -> Tile:
    rows, span, size = 4, 512, 4 if dtype == "fp32" else 2
    config = _config(dim, dim, rows, torch.float32 if dtype == "fp32" else torch.float16)
    constants = {"DIM": dim, "VALUE_DIM": dim, "HAS_ALIVE": alive, **config}
    kinds = dict.fromkeys(("q", "k_pre", "v_pre", "k_own", "v_own", "out"), f"*{dtype}")
    kinds |= {"alive": "*u8", "lse": "*fp32", "scale": "fp32"}
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in prefix_kernel.arg_names}
    m = config["STACKED"]
    label = f"{dtype} D{dim} {m} and {config['ALONE']} x{config['BLOCK_N']}{', padded' if alive else ''}"
    moved = 2 * (span + m) * dim * size + 4 * m
    return Tile(
        prefix_kernel, label, signature, constants, 4, 3, 4 * m * span * dim, moved, f"a prefix program, {span} keys",
        aligned=ALIGNED,
    )  # fmt: skip


def tiles() -> list[Tile]:
    """The shipped tiles: one new token of each request, groups of up to 16 query heads."""
    shapes = [(dtype, dim, False) for dtype in ("fp16", "bf16", "fp32") for dim in (64, 128)] + [("fp16", 64, True)]
    return [_tile(*shape) for shape in shapes]
