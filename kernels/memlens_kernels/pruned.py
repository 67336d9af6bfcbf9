"""Attention to keys that lost channels, beside newer ones that kept all: one pass, two layouts of K, one softmax.

The older keys are stored narrow, (Hkv, old, n), with the list of their channels for each kv head. The query is gathered to
those channels once, in registers, and no key is widened. One program takes the query rows of one kv head over one span of
tokens and returns (out, lse); the spans are merged by their lse.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memlens_kernels.tile import Tile

__all__ = ["decode_pruned", "problem", "tiles"]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def absorb(
    q, keys, values, first, stop, top, total, held, scale, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The running softmax (top, total, held) with the tokens [first, stop) of one layout taken in."""
    w, c = tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_V)
    for start in range(first, stop, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        seen = n < stop
        key = tl.load(keys + n[None, :] * WIDTH + w[:, None], mask=seen[None, :] & (w < WIDTH)[:, None], other=0.0)
        s = tl.dot(q, key, input_precision=PRECISION)
        s = tl.where(seen[None, :], s * (scale * LOG2E), float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p, fade = tl.exp2(s - new_top[:, None]), tl.exp2(top - new_top)
        value = tl.load(
            values + n[:, None] * VALUE_DIM + c[None, :], mask=seen[:, None] & (c < VALUE_DIM)[None, :], other=0.0
        )
        held = tl.dot(p.to(value.dtype), value, held * fade[:, None], input_precision=PRECISION)
        total = total * fade + tl.sum(p, 1)
        top = new_top
    return top, total, held


@triton.jit(do_not_specialize=["rows", "old", "tokens", "span"])
def pruned_kernel(
    q, small, keep, tail, v, out, lse, scale, rows, old, tokens, span, WIDTH: tl.constexpr, DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of one kv head over tokens [program · span, + span): out (already divided) and natural-log lse."""
    head, split = tl.program_id(1).to(tl.int64), tl.program_id(0)
    m, d, w, c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_V)
    line, here = q + head * rows * DIM + m[:, None] * DIM, (m < rows)[:, None]
    channel = tl.load(keep + head * WIDTH + w, mask=w < WIDTH, other=0).to(tl.int64)
    narrow = tl.load(line + channel[None, :], mask=here & (w < WIDTH)[None, :], other=0.0)
    whole = tl.load(line + d[None, :], mask=here & (d < DIM)[None, :], other=0.0)
    values = v + head * tokens * VALUE_DIM
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    held = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    first = split * span
    last = tl.minimum(first + span, tokens)
    top, total, held = absorb(
        narrow, small + head * old * WIDTH, values, first, tl.minimum(last, old), top, total, held, scale, WIDTH, VALUE_DIM,
        BLOCK_W, BLOCK_V, BLOCK_N, PRECISION,
    )  # fmt: skip
    begin = tl.maximum(first, old) - old
    top, total, held = absorb(
        whole, tail + head * (tokens - old) * DIM, values + old.to(tl.int64) * VALUE_DIM, begin, last - old, top, total, held,
        scale, DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, PRECISION,
    )  # fmt: skip
    filled = total > 0
    safe = tl.where(filled, total, 1.0)
    place = (split * tl.num_programs(1) + head) * rows + m
    tl.store(out + place[:, None] * VALUE_DIM + c[None, :], held / safe[:, None], mask=here & (c < VALUE_DIM)[None, :])
    tl.store(lse + place, tl.where(filled, (top + tl.log2(safe)) / LOG2E, float("-inf")), mask=m < rows)


def _power(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


def _config(width: int, dim: int, value_dim: int, rows: int, dtype: torch.dtype) -> dict:
    return {
        "WIDTH": width, "DIM": dim, "VALUE_DIM": value_dim, "BLOCK_W": _power(width), "BLOCK_D": _power(dim),
        "BLOCK_V": _power(value_dim), "BLOCK_M": _power(rows), "BLOCK_N": 16 if dtype == torch.float32 else 32,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }  # fmt: skip


def problem(dim: int, value_dim: int, rows: int) -> str:
    """Why `decode_pruned` cannot take this; empty where it can."""
    if max(dim, value_dim) > 256 or rows > 64:
        return f"dim {max(dim, value_dim)} and {rows} rows per kv head; the kernel takes at most 256 and 64"
    return ""


def decode_pruned(
    q: Tensor, small: Tensor, keep: Tensor, tail: Tensor, v: Tensor, *, scale: float, span: int = 512,
    out: Tensor | None = None, lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Partial attention of every query row to narrow and whole keys, one part per span of the tokens.

    Args:
        q: (B, Hkv, rows, D): the rows of all query heads that read a kv head. Every row sees every token.
        small: (B, Hkv, old, n), the older keys; keep: (B, Hkv, n) integers, which channels they are.
        tail: (B, Hkv, new, D), the newer keys.
        v: (B, Hkv, old + new, Dv), values of both.
        span: tokens for one program.
        out, lse: buffers, made here where None.
    Returns:
        out (parts, B, Hkv, rows, Dv) in q's dtype and lse (parts, B, Hkv, rows), float32.
    """
    (batch, kv_heads, rows, dim), tokens, value_dim = q.shape, v.shape[2], v.shape[3]
    parts = max(1, triton.cdiv(tokens, span))
    out = torch.empty(parts, batch, kv_heads, rows, value_dim, dtype=q.dtype, device=q.device) if out is None else out
    lse = torch.empty(parts, batch, kv_heads, rows, dtype=torch.float32, device=q.device) if lse is None else lse
    inputs = (x.contiguous() for x in (q, small, keep.to(torch.int32), tail, v))
    pruned_kernel[(parts, batch * kv_heads)](
        *inputs, out, lse, scale, rows, small.shape[2], tokens, span,
        **_config(small.shape[-1], dim, value_dim, rows, q.dtype), num_warps=4,
    )  # fmt: skip
    return out, lse


def _tile(dtype: str, dim: int, width: int) -> Tile:
    rows, span = 4, 512
    constants = _config(width, dim, dim, rows, torch.float32 if dtype == "fp32" else torch.float16)
    kinds = dict.fromkeys(("q", "small", "tail", "v", "out"), f"*{dtype}")
    kinds |= {"lse": "*fp32", "keep": "*i32", "scale": "fp32"}
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in pruned_kernel.arg_names}
    size = 4 if dtype == "fp32" else 2
    moved = span * (width + dim) * size + 2 * rows * dim * size + 4 * (rows + width)
    label = f"{dtype} D{dim}, {width} channels kept"
    return Tile(
        pruned_kernel, label, signature, constants, 4, 3, 2 * rows * span * (width + dim), moved, f"{span} old tokens"
    )


def tiles() -> list[Tile]:
    """ThinK at 40 % for heads of 64 and 128, and at half."""
    return [_tile(*shape) for shape in (("fp16", 64, 39), ("fp16", 128, 77), ("fp16", 128, 64), ("fp32", 64, 39))]
