"""Attention over keys and values that stay packed: 1, 2, 4 or 8 bits a code, groups with a scale and a zero.

Codes live in 32-bit words, the first in the lowest bits. A word is split in registers and each code becomes a number right
before the product that uses it; no floating copy of the cache is ever in memory. One program takes the query rows of one
kv head over one span of tokens and returns (out, lse); the spans are merged by their lse.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from memlens_kernels.tile import Tile

__all__ = ["Words", "decode_packed", "pack_buffers", "problem", "quantize_pack", "score_buffer", "tiles"]

LOG2E = tl.constexpr(1.4426950408889634)


class Words(NamedTuple):
    codes: Tensor  # int32: (B, Hkv, T·bits/32, D) for axis -2, (B, Hkv, T, D·bits/32) for axis -1
    scale: Tensor  # (B, Hkv, T/group, D) or (B, Hkv, T, D/group), float32, float16 or bfloat16
    zero: Tensor  # likewise: value = code · scale + zero
    bits: int  # 1, 2, 4 or 8
    axis: int  # -2: groups and words run along the tokens; -1: along the channels
    group: int


@triton.jit
def outward(x, pointer, UP: tl.constexpr):
    """x in the pointer's dtype, rounded up or down; a hair (2^-20) beyond a number counts as that number."""
    near = x.to(pointer.dtype.element_ty)
    if pointer.dtype.element_ty == tl.float32:
        return near
    slack = tl.abs(x) * 9.5367431640625e-07
    back = near.to(tl.float32)
    bits = near.to(tl.int16, bitcast=True)
    # neighbours of a 16-bit float are neighbours as integers: away from zero is +1
    if UP:
        moved = tl.where(back == 0, 1, bits + tl.where(back > 0, 1, -1))
        short = back < x - slack
    else:
        moved = tl.where(back == 0, -32767, bits + tl.where(back < 0, 1, -1))
        short = back > x + slack
    return tl.where(short, moved.to(tl.int16), bits).to(pointer.dtype.element_ty, bitcast=True)


@triton.jit(do_not_specialize=["tokens"])
def pack_kernel(
    x, codes, scale, zero, tokens, levels, x_head, x_row, DIM: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    ALONG: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One group of BLOCK_R rows: minimum, step, codes and words. A row is a channel where groups run ALONG the tokens."""
    WORDS: tl.constexpr = GROUP * BITS // 32
    head, group = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    a, w = tl.arange(0, GROUP), tl.arange(0, WORDS)
    if ALONG:
        here = r < DIM
        at = (group * GROUP + a)[None, :] * x_row + r[:, None]
        meta = head * (tokens // GROUP) * DIM + group * DIM + r
        word = head * (tokens // GROUP) * WORDS * DIM + (group * WORDS + w)[None, :] * DIM + r[:, None]
    else:
        here = r < tokens
        at = r[:, None] * x_row + (group * GROUP + a)[None, :]
        meta = (head * tokens + r) * (DIM // GROUP) + group
        word = (head * tokens + r)[:, None] * (DIM // GROUP * WORDS) + (group * WORDS + w)[None, :]
    tile = tl.load(x + head * x_head + at, mask=here[:, None], other=0.0).to(tl.float32)
    low = outward(tl.min(tile, 1), zero, False)
    base = low.to(tl.float32)
    step = outward(tl.div_rn(tl.max(tile, 1) - base, levels.to(tl.float32)), scale, True)
    wide = step.to(tl.float32)
    y = tl.div_rn(tile - base[:, None], tl.where(wide == 0, 1.0, wide)[:, None])
    # adding 1.5 · 2^23 rounds to a whole number, half to even
    y = tl.minimum(tl.maximum((y + 12582912.0) - 12582912.0, 0.0), levels.to(tl.float32))
    bits = tl.reshape(y.to(tl.int32), (BLOCK_R, WORDS, 32 // BITS)) << (tl.arange(0, 32 // BITS) * BITS)[None, None, :]
    tl.store(codes + word, tl.sum(bits, 2), mask=here[:, None])
    tl.store(scale + meta, step, mask=here)
    tl.store(zero + meta, low, mask=here)


@triton.jit
def split_words(words, BITS: tl.constexpr):
    """Words (R, C) as codes (R, C · 32 / BITS) in their order: halved again and again, low half first."""
    codes = tl.interleave(words & 0xFFFF, (words >> 16) & 0xFFFF)
    codes = tl.interleave(codes & 0xFF, codes >> 8)
    if BITS <= 4:
        codes = tl.interleave(codes & 0xF, codes >> 4)
    if BITS <= 2:
        codes = tl.interleave(codes & 0x3, codes >> 2)
    if BITS <= 1:
        codes = tl.interleave(codes & 0x1, codes >> 1)
    return codes


@triton.jit
def load_rows(
    codes, scale, zero, rows, valid, DIM: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Values (N, BLOCK_D), float32, of the tokens `rows` where words and groups run along the channels."""
    WORDS: tl.constexpr = BLOCK_D * BITS // 32
    HELD: tl.constexpr = (DIM * BITS + 31) // 32
    w = tl.arange(0, WORDS)
    at = rows.to(tl.int64)[:, None]
    word = tl.load(codes + at * HELD + w[None, :], mask=valid[:, None] & (w < HELD)[None, :], other=0)
    g = tl.arange(0, BLOCK_D // GROUP)
    meta = at * (DIM // GROUP) + g[None, :]
    seen = valid[:, None] & (g < DIM // GROUP)[None, :]
    s = tl.load(scale + meta, mask=seen, other=0.0).to(tl.float32)
    z = tl.load(zero + meta, mask=seen, other=0.0).to(tl.float32)
    code = tl.reshape(split_words(word, BITS).to(tl.float32), (rows.shape[0], BLOCK_D // GROUP, GROUP))
    return tl.reshape(code * s[:, :, None] + z[:, :, None], (rows.shape[0], BLOCK_D))


@triton.jit
def score_columns(
    q, codes, scale, zero, group, DIM: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """q·k (M, GROUP) of one group of tokens: the scales go into q, so that the codes are multiplied as they are."""
    WORDS: tl.constexpr = GROUP * BITS // 32
    d, w = tl.arange(0, BLOCK_D), tl.arange(0, WORDS)
    s = tl.load(scale + group * DIM + d, mask=d < DIM, other=0.0).to(tl.float32)
    z = tl.load(zero + group * DIM + d, mask=d < DIM, other=0.0).to(tl.float32)
    at = (group * WORDS + w)[None, :] * DIM + d[:, None]
    words = tl.load(codes + at, mask=(d < DIM)[:, None], other=0)
    wide = q.to(tl.float32)
    scores = tl.dot((wide * s[None, :]).to(q.dtype), split_words(words, BITS).to(q.dtype), input_precision=PRECISION)
    return scores + tl.sum(wide * z[None, :], 1)[:, None]


@triton.jit(do_not_specialize=["tokens", "slots", "span", "value_tokens"])
def decode_kernel(
    q, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, rank, scores, out, lse,
    scale, rows, kv_heads, tokens, slots, value_tokens, span, k_words, k_groups,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr,
    K_GROUP: tl.constexpr, V_GROUP: tl.constexpr, K_TOKENS: tl.constexpr, HAS_RANK: tl.constexpr, TALLY: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of one kv head over slots [program · span, + span): out (already divided) and natural-log lse.

    With TALLY the scores are left in `scores` (rows, slots), -inf in an empty slot.

    A slot is a place among the keys; `rank` says which row of the values it goes with, and one outside [0, tokens) is not
    there. Without `rank` the two run side by side.
    """
    head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(0)
    m, d, c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    q_tile = tl.load(
        q + head * rows * DIM + m[:, None] * DIM + d[None, :], mask=(m < rows)[:, None] & (d < DIM)[None, :], other=0.0
    )
    k_words_at, k_meta_at = k_codes + head * k_words, head * k_groups
    v_row = head * value_tokens
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    held = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    first = split * span
    for start in range(first, tl.minimum(first + span, slots), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        row = n
        if HAS_RANK:
            row = tl.load(rank + head * slots + n, mask=n < slots, other=-1)
        seen = (n < slots) & (row >= 0) & (row < tokens)
        if K_TOKENS:
            group = tl.cast(start // K_GROUP, tl.int64)
            s = score_columns(
                q_tile, k_words_at, k_scale + k_meta_at, k_zero + k_meta_at, group, DIM, K_BITS, K_GROUP, BLOCK_D, PRECISION
            )  # fmt: skip
        else:
            key = load_rows(
                k_words_at, k_scale + k_meta_at, k_zero + k_meta_at, n, seen, DIM, K_BITS, K_GROUP, BLOCK_D
            ).to(q_tile.dtype)  # fmt: skip
            s = tl.dot(q_tile, tl.trans(key), input_precision=PRECISION)
        if TALLY:
            at = scores + (head * rows + m)[:, None] * slots + n[None, :]
            tl.store(at, tl.where(seen[None, :], s * scale, float("-inf")), mask=(m < rows)[:, None] & (n < slots)[None, :])
        s = tl.where(seen[None, :], s * (scale * LOG2E), float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - safe[:, None])
        fade = tl.exp2(top - safe)
        v_held: tl.constexpr = (VALUE_DIM * V_BITS + 31) // 32
        v_meta = v_row * (VALUE_DIM // V_GROUP)
        value = load_rows(
            v_codes + v_row * v_held, v_scale + v_meta, v_zero + v_meta, row, seen, VALUE_DIM, V_BITS, V_GROUP, BLOCK_V
        ).to(q_tile.dtype)  # fmt: skip
        held = tl.dot(p.to(q_tile.dtype), value, held * fade[:, None], input_precision=PRECISION)
        total = total * fade + tl.sum(p, 1)
        top = new_top
    filled = total > 0
    safe_total = tl.where(filled, total, 1.0)
    place = (split * tl.num_programs(1) + head) * rows + m
    tl.store(
        out + place[:, None] * VALUE_DIM + c[None, :], held / safe_total[:, None],
        mask=(m < rows)[:, None] & (c < VALUE_DIM)[None, :],
    )  # fmt: skip
    tl.store(lse + place, tl.where(filled, (top + tl.log2(safe_total)) / LOG2E, float("-inf")), mask=m < rows)


def pack_buffers(x: Tensor, bits: int, axis: int, group: int, meta: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised codes, scales and zeros for `quantize_pack`."""
    batch, heads, tokens, dim = x.shape
    short = [(tokens // n, dim) if axis == -2 else (tokens, dim // n) for n in (32 // bits, group)]
    codes = torch.empty(batch, heads, *short[0], dtype=torch.int32, device=x.device)
    return codes, *(torch.empty(batch, heads, *short[1], dtype=meta, device=x.device) for _ in range(2))


def quantize_pack(
    x: Tensor, *, bits: int, levels: int, axis: int, group: int, meta: torch.dtype,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Codes in 32-bit words, scales and zeros of x (B, H, T, D), in one pass; nothing else is written.

    Args:
        bits: of a code in memory, 1, 2, 4 or 8; `levels` is the largest code.
        axis: -2 groups tokens, -1 channels; `group`, a power of two, divides that axis and fills whole words.
        meta: dtype of scale and zero; float16 and bfloat16 are rounded outwards, and infinite where they overflow.
        out: buffers from `pack_buffers`; made here where None.
    """
    batch, heads, tokens, dim = x.shape
    x = x.contiguous()
    out = out or pack_buffers(x, bits, axis, group, meta)
    rows, along = (dim, tokens) if axis == -2 else (tokens, dim)
    block = _pack_rows(group)
    if x.numel():
        pack_kernel[(triton.cdiv(rows, block), along // group, batch * heads)](
            x, *out, tokens, levels, x.stride(1), x.stride(2), dim, bits, group, axis == -2, block, num_warps=4
        )
    return out


def _pack_rows(group: int) -> int:
    return max(16, 4096 // group) if group <= 256 else 8


def _power(n: int, least: int = 16) -> int:
    return max(least, triton.next_power_of_2(n))


def _config(
    k: Words, v: Words, dim: int, value_dim: int, rows: int, dtype: torch.dtype, rank: bool, tally: bool = False
) -> dict:
    along = k.axis == -2
    return {
        "DIM": dim, "VALUE_DIM": value_dim, "K_BITS": k.bits, "V_BITS": v.bits, "K_GROUP": k.group, "V_GROUP": v.group,
        "K_TOKENS": along, "HAS_RANK": rank, "TALLY": tally,
        "BLOCK_D": _power(dim, 16 if along else max(16, 32 // k.bits)), "BLOCK_V": _power(value_dim, max(16, 32 // v.bits)),
        "BLOCK_M": _power(rows), "BLOCK_N": k.group if along else 32,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }  # fmt: skip


def problem(k: Words, v: Words, dim: int, value_dim: int, rows: int) -> str:
    """Why `decode_packed` cannot take this; empty where it can."""
    if v.axis != -1:
        return "values are grouped along the tokens; the kernel takes values grouped along the channels"
    if odd := [w.group for w in (k, v) if w.axis == -1 and (w.group & (w.group - 1) or w.group * w.bits % 32)]:
        return f"groups of {odd[0]} channels; the kernel takes a power of two that fills 32-bit words"
    if k.axis == -2 and (k.group < 16 or k.group > 128 or k.group & (k.group - 1) or k.group * k.bits % 32):
        return f"groups of {k.group} tokens; the kernel takes 16 to 128, a power of two that fills 32-bit words"
    if max(dim, value_dim) > 256 or rows > 64:
        return f"dim {max(dim, value_dim)} and {rows} rows per kv head; the kernel takes at most 256 and 64"
    return ""


def _slots(k: Words) -> int:
    return k.scale.shape[2] * k.group if k.axis == -2 else k.codes.shape[2]


def score_buffer(q: Tensor, k: Words) -> Tensor:
    """Uninitialised scores (B, Hkv, rows, slots), float32, for `decode_packed`."""
    return torch.empty(*q.shape[:3], _slots(k), dtype=torch.float32, device=q.device)


def decode_packed(
    q: Tensor, k: Words, v: Words, *, tokens: int, scale: float, rank: Tensor | None = None, span: int = 512,
    scores: Tensor | None = None, out: Tensor | None = None, lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Partial attention of every query row to the packed tokens, one part per span of the slots.

    Args:
        q: (B, Hkv, rows, D), contiguous: the rows of all query heads that read a kv head. Every row sees every token.
        k, v: of as many tokens, or, with `rank`, of any two numbers of them.
        tokens: the first so many are attended to.
        rank: (B, Hkv, slots) int32: the row of v that belongs to a slot of k; outside [0, tokens) the slot is empty.
        span: slots for one program; a multiple of 128.
        scores: from `score_buffer`; gets scale · q·k of every row and slot, -inf where the slot is empty.
        out, lse: buffers, made here where None.
    Returns:
        out (parts, B, Hkv, rows, Dv) in q's dtype and lse (parts, B, Hkv, rows), float32, -inf where a part saw nothing.
    """
    (batch, kv_heads, rows, dim), value_tokens = q.shape, v.codes.shape[2]
    value_dim = v.scale.shape[-1] * v.group
    slots = _slots(k)
    parts = max(1, triton.cdiv(slots, span))
    out = torch.empty(parts, batch, kv_heads, rows, value_dim, dtype=q.dtype, device=q.device) if out is None else out
    lse = torch.empty(parts, batch, kv_heads, rows, dtype=torch.float32, device=q.device) if lse is None else lse
    decode_kernel[(parts, batch * kv_heads)](
        q, *(x.contiguous() for x in (*k[:3], *v[:3])), lse if rank is None else rank,
        lse if scores is None else scores, out, lse,
        scale, rows, kv_heads, tokens, slots, value_tokens, span, k.codes[0, 0].numel(), k.scale[0, 0].numel(),
        **_config(k, v, dim, value_dim, rows, q.dtype, rank is not None, scores is not None), num_warps=4,
    )  # fmt: skip
    return out, lse


def _pack_tile(dtype: str, dim: int, bits: int, axis: int, group: int) -> Tile:
    block = _pack_rows(group)
    constants = {"DIM": dim, "BITS": bits, "GROUP": group, "ALONG": axis == -2, "BLOCK_R": block}
    kinds = {"x": f"*{dtype}", "codes": "*i32", "scale": "*fp16", "zero": "*fp16"}
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in pack_kernel.arg_names}
    size, way = 4 if dtype == "fp32" else 2, "tokens" if axis == -2 else "channels"
    moved = block * (group * size + group * bits // 8 + 4)
    label = f"{dtype} D{dim} {bits} bit, {group} {way}"
    return Tile(pack_kernel, label, signature, constants, 4, 3, 8 * block * group, moved, "any")


def _decode_tile(dtype: str, dim: int, bits: int, axis: int, rank: bool, tally: bool = False) -> Tile:
    rows, span = 4, 512
    group = 32 if axis == -2 else max(32, dim // 2)
    words = [Words(None, None, None, bits, ax, n) for ax, n in ((axis, group), (-1, 32 if axis == -2 else group))]
    constants = _config(*words, dim, dim, rows, torch.float32 if dtype == "fp32" else torch.float16, rank, tally)
    kinds = {"q": f"*{dtype}", "out": f"*{dtype}", "lse": "*fp32", "scores": "*fp32", "rank": "*i32", "scale": "fp32"}
    kinds |= {
        f"{x}_{part}": kind for x in "kv" for part, kind in (("codes", "*i32"), ("scale", "*fp16"), ("zero", "*fp16"))
    }
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in decode_kernel.arg_names}
    per_token = 2 * (dim * bits // 8 + 4 * dim // group)
    moved = span * (per_token + 4 * rank + 4 * rows * tally) + 2 * rows * dim * (4 if dtype == "fp32" else 2) + 4 * rows
    label = f"{dtype} D{dim} {bits} bit, keys by {'channel' if axis == -2 else 'token'}{', with holes' if rank else ''}"
    label += ", scores out" if tally else ""
    return Tile(
        decode_kernel, label, signature, constants, 4, 3, 4 * rows * span * dim, moved, f"{rows} rows, {span} tokens"
    )


def tiles() -> list[Tile]:
    """KIVI keys and values at 2 and 4 bits, MiKV's two tiers, and the packing of both."""
    packs = [("fp16", 128, 2, -2, 32), ("fp16", 128, 2, -1, 32), ("fp16", 64, 4, -2, 32), ("fp32", 64, 4, -1, 32)]
    decodes = [
        ("fp16", 64, 2, -2, False), ("fp16", 128, 2, -2, False), ("fp16", 128, 2, -2, True), ("fp16", 128, 4, -2, False),
        ("fp16", 64, 2, -1, False), ("fp16", 128, 2, -1, False), ("fp16", 128, 8, -1, False), ("fp32", 64, 4, -2, False),
        ("fp16", 128, 4, -2, True, True), ("fp16", 64, 2, -1, False, True),
    ]  # fmt: skip
    return [_pack_tile(*shape) for shape in packs] + [_decode_tile(*shape) for shape in decodes]
