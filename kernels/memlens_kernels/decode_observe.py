"""One decoding step that also says how much each key was attended to: split-KV attention, and the scores in a second pass.

The first pass gives one program the query rows of a kv head and one span of the keys; it returns a part (out, lse) and leaves
its scores behind, one number for each row and key. Once the parts are merged, the second pass reads those numbers and the
whole softmax's lse and adds exp(s - lse) to the score of each key: keys are read once, and nothing is added with atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memlens_kernels.attention_steps import LOG2E, load_tile
from memlens_kernels.decode_steps import fold, write_part
from memlens_kernels.tile import Tile

__all__ = ["add_observed", "decode_parts", "tiles"]

GROUPS = {"mean": 0, "sum": 0, "max": 1, "none": 2}
COLUMNS = 256  # keys that one program of the second pass takes


@triton.jit(do_not_specialize=["k_len", "span"])
def parts_kernel(
    q, k, v, alive, scores, out, lse, scale, rows, kv_heads, k_len, span, k_b, k_h, k_n, v_b, v_h, v_n,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HAS_ALIVE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of one kv head over keys [program · span, + span): out, lse, and the scores s, -inf where a key is not alive."""
    head, split = tl.program_id(1).to(tl.int64), tl.program_id(0)
    keys, values = k + head // kv_heads * k_b + head % kv_heads * k_h, v + head // kv_heads * v_b + head % kv_heads * v_h
    m = tl.arange(0, BLOCK_M)
    q_tile = load_tile(q + head * rows * DIM, 0, DIM, rows, BLOCK_M, DIM, BLOCK_D, True)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    held = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    first = split * span
    last = tl.minimum(first + span, k_len)
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k_tile = load_tile(keys, start, k_n, last, BLOCK_N, DIM, BLOCK_D, True)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        seen = n < last
        if HAS_ALIVE:
            seen &= tl.load(alive + head * k_len + n, mask=n < last, other=0) != 0
        s = tl.where(seen[None, :], s, float("-inf"))
        at = scores + (head * rows + m)[:, None] * k_len + n[None, :]
        tl.store(at, s, mask=(m < rows)[:, None] & (n < last)[None, :])
        v_tile = load_tile(values, start, v_n, last, BLOCK_N, VALUE_DIM, BLOCK_V, True)
        top, total, held = fold(top, total, held, s * LOG2E, v_tile, PRECISION)
    place = (split * tl.num_programs(1) + head) * rows
    write_part(out + place * VALUE_DIM, lse + place, top, total, held, 0, rows, VALUE_DIM, BLOCK_V, BLOCK_M)


@triton.jit(do_not_specialize=["k_len"])
def observe_kernel(
    scores, lse, before, after, share, rows, k_len, GROUP: tl.constexpr, HAS_SCORE: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """after = before + exp(s - lse), over the rows of a kv head: share · Σ (GROUP 0), the largest (1), or each alone (2)."""
    head = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    here = n < k_len
    mass = tl.zeros((BLOCK_N,), tl.float32)
    for m in range(0, rows):
        row = head * rows + m
        norm = tl.load(lse + row)
        norm = tl.where(norm == float("-inf"), 0.0, norm)  # a row that saw nothing: all its scores are -inf
        s = tl.load(scores + row * k_len + n, mask=here, other=float("-inf"))
        p = tl.exp2((s - norm) * LOG2E)
        if GROUP == 2:
            if HAS_SCORE:
                p += tl.load(before + row * k_len + n, mask=here, other=0.0)
            tl.store(after + row * k_len + n, p, mask=here)
        elif GROUP == 1:
            mass = tl.maximum(mass, p)
        else:
            mass += p * share
    if GROUP != 2:
        if HAS_SCORE:
            mass += tl.load(before + head * k_len + n, mask=here, other=0.0)
        tl.store(after + head * k_len + n, mass, mask=here)


def _config(dim: int, value_dim: int, rows: int, dtype: torch.dtype) -> dict:
    wide, most = dtype == torch.float32, max(dim, value_dim)
    return {
        "BLOCK_D": max(16, triton.next_power_of_2(dim)), "BLOCK_V": max(16, triton.next_power_of_2(value_dim)),
        "BLOCK_M": max(16, triton.next_power_of_2(rows)), "BLOCK_N": (32 if wide else 64) // (1 if most <= 64 else 2),
        "PRECISION": "ieee" if wide else "tf32",
    }  # fmt: skip


def decode_parts(
    q: Tensor, k: Tensor, v: Tensor, *, alive: Tensor | None, scale: float, span: int = 512
) -> tuple[Tensor, Tensor, Tensor]:
    """The first pass: (out (parts, B, Hkv, g, Dv) in q's dtype, lse (parts, B, Hkv, g), scores (B, Hkv, g, L)), float32.

    Args:
        q: (B, Hkv, g, D), contiguous, the newest row of the g query heads of each kv head; g at most 64.
        k, v: (B, Hkv, L, D) and (B, Hkv, L, Dv), dims at most 256; every row sees every key that is alive.
        alive: (B, Hkv, L) bool, contiguous, or None.
        span: keys of one program; a multiple of 64.
    """
    (batch, kv_heads, rows, dim), length, value_dim = q.shape, k.shape[2], v.shape[-1]
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    parts = max(1, triton.cdiv(length, span))
    out = torch.empty(parts, batch, kv_heads, rows, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(parts, batch, kv_heads, rows, dtype=torch.float32, device=q.device)
    scores = torch.empty(batch, kv_heads, rows, length, dtype=torch.float32, device=q.device)
    live = q if alive is None else alive.view(torch.uint8)
    parts_kernel[(parts, batch * kv_heads)](
        q, k, v, live, scores, out, lse, scale, rows, kv_heads, length, span, *k.stride()[:3], *v.stride()[:3],
        dim, value_dim, alive is not None, **_config(dim, value_dim, rows, q.dtype), num_warps=4,
    )  # fmt: skip
    return out, lse, scores


def add_observed(scores: Tensor, lse: Tensor, before: Tensor | None, group: str) -> Tensor:
    """The second pass: `before` plus what each key got, (B, Hkv, L) float32, or (B, Hkv, g, L) with group "none".

    Args:
        scores: (B, Hkv, g, L) and lse: (B, Hkv, g), float32, contiguous; lse of the whole softmax.
        before: of the result's shape, float32, contiguous; None is zero.
        group: mean | sum | max | none.
    """
    batch, kv_heads, rows, length = scores.shape
    shape = scores.shape if group == "none" else (batch, kv_heads, length)
    after = torch.empty(shape, dtype=torch.float32, device=scores.device)
    if length:
        observe_kernel[(triton.cdiv(length, COLUMNS), batch * kv_heads)](
            scores, lse, after if before is None else before, after, 1.0 / rows if group == "mean" else 1.0, rows, length,
            GROUPS[group], before is not None, COLUMNS, num_warps=4,
        )  # fmt: skip
    return after


POINTERS = {"alive": "*u8", "scores": "*fp32", "lse": "*fp32", "before": "*fp32", "after": "*fp32"}
ALIGNED = ("q", "k", "v", "scores", "out", "lse", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n")  # rows of 8 numbers or more


def _signature(kernel, dtype: str, constants: dict) -> dict[str, str]:
    kinds = POINTERS | dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}") | dict.fromkeys(("scale", "share"), "fp32")
    return {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}


def _parts_tile(dtype: str, dim: int, rows: int, alive: bool) -> Tile:
    span, size = 512, 4 if dtype == "fp32" else 2
    config = _config(dim, dim, rows, torch.float32 if dtype == "fp32" else torch.float16)
    constants = {"DIM": dim, "VALUE_DIM": dim, "HAS_ALIVE": alive, **config}
    moved = 2 * (span + rows) * dim * size + 4 * rows * (span + 1) + alive * span
    label = f"parts {dtype} D{dim} {config['BLOCK_M']}x{config['BLOCK_N']}{', some not alive' if alive else ''}"
    return Tile(
        parts_kernel, label, _signature(parts_kernel, dtype, constants), constants, 4, 3, 4 * rows * span * dim, moved,
        f"{rows} rows, {span} keys", aligned=ALIGNED,
    )  # fmt: skip


def _observe_tile(group: str) -> Tile:
    rows, constants = 4, {"GROUP": GROUPS[group], "HAS_SCORE": True, "BLOCK_N": COLUMNS}
    signature = _signature(observe_kernel, "fp32", constants)
    moved = 4 * COLUMNS * (rows + 2) + 4 * rows
    return Tile(observe_kernel, f"observe {group}", signature, constants, 4, 3, 4 * rows * COLUMNS, moved, f"{rows} rows")


def tiles() -> list[Tile]:
    """The shipped tiles: groups of 3 and 4 query heads."""
    shapes = [(dtype, dim, 4, False) for dtype in ("fp16", "bf16", "fp32") for dim in (64, 128)] + [("fp16", 64, 4, True)]
    return [_parts_tile(*shape) for shape in shapes] + [_observe_tile(group) for group in ("mean", "max")]
