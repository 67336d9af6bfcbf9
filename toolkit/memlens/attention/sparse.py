"""Attention that visits only some blocks of the score matrix; what is not visited costs nothing.

Each block of queries gathers its visible key blocks and runs exact attention over them, so the result and its gradient
are those of `attend` with the block mask spread out. Source: arXiv:2205.14135, section 3.3. For a single decoding step
see also `sparf` and `shadow_decode`, from `memlens.attention.retrieval`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from memlens import backend, check
from memlens.attention import fused, tiled
from memlens.attention.call import Call, differentiable
from memlens.attention.exact import KERNEL_DIM, attend
from memlens.attention.merge import Attended
from memlens.attention.retrieval import ShadowState, shadow_decode, sparf

__all__ = ["ShadowState", "block_attend", "shadow_decode", "sparf", "spread"]


class Blocks(NamedTuple):
    visible: Tensor  # (1|B, 1|H, query blocks, key blocks) bool
    block_q: int
    block_k: int


def block_attend(
    q: Tensor, k: Tensor, v: Tensor, block_mask: Tensor, *, block_q: int, block_k: int, causal: bool = True,
    form: str = "auto",
) -> Attended:  # fmt: skip
    """`Attended(out, lse)` over the key blocks that `block_mask` lets each block of queries see.

    Args:
        q, k, v: (B, H, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, Dv), as in `attend`.
        block_mask: bool, (1|B, 1|H, ceil(Tq / block_q), ceil(Tk / block_k)); True = visited.
        block_q, block_k: queries and keys of one block.
        causal: besides, key j only for queries at positions >= j, the last query at the last key.
        form: "reference" (the mask spread out over pairs), "torch" (visited blocks only), "triton" (a kernel that
            walks the list of visited blocks; block sizes that 16 divides, no dim over 256), "auto".
    Raises:
        ValueError: sizes that disagree, or, with form="triton", what the kernel does not take.
        TypeError: a block_mask that is not bool.
    """
    sizes = check.shapes(
        "block_attend", q=(q, "batch heads q_len dim"), k=(k, "batch kv_heads k_len dim"),
        v=(v, "batch kv_heads k_len value_dim"),
    )  # fmt: skip
    check.divides("block_attend", kv_heads=sizes["kv_heads"], heads=sizes["heads"])
    check.same_dtype("block_attend", q=q, k=k, v=v)
    check.at_least("block_attend", 1, block_q=block_q, block_k=block_k)
    blocks = Blocks(_check_blocks(block_mask, sizes, block_q, block_k), block_q, block_k)
    fits = max(q.shape[-1], v.shape[-1]) <= KERNEL_DIM and block_q % 16 == block_k % 16 == 0
    form = backend.choose("block_attend", form, q, k, v, kernel=fits or form == "triton")
    if form == "reference":
        mask = spread(blocks.visible, block_q, block_k, sizes["q_len"], sizes["k_len"])
        return attend(q, k, v, causal=causal, mask=mask, return_lse=True, form="reference")
    call = Call(q.shape[-1] ** -0.5, bool(causal), sizes["k_len"] - sizes["q_len"], blocks=blocks)
    if form == "triton":
        from memlens.attention import kernel

        return kernel.run_blocks(q, k, v, call)
    return differentiable(_forward, _backward, q, k, v, None, call)


def spread(block_mask: Tensor, block_q: int, block_k: int, q_len: int, k_len: int) -> Tensor:
    """A block mask (..., query blocks, key blocks) as a mask over pairs (..., q_len, k_len)."""
    return block_mask.repeat_interleave(block_q, -2).repeat_interleave(block_k, -1)[..., :q_len, :k_len]


def _check_blocks(block_mask: Tensor, sizes: dict[str, int], block_q: int, block_k: int) -> Tensor:
    if block_mask.dtype != torch.bool:
        check.fail("block_attend", f"block_mask is {block_mask.dtype}", "bool, True = visited", error=TypeError)
    check.shapes("block_attend", block_mask=(block_mask, "batch heads query_blocks key_blocks"))
    need = (-(-sizes["q_len"] // block_q), -(-sizes["k_len"] // block_k))
    batch, heads, *blocks = block_mask.shape
    if tuple(blocks) != need or batch not in (1, sizes["batch"]) or heads not in (1, sizes["heads"]):
        expected = f"(1 or {sizes['batch']}, 1 or {sizes['heads']}, {need[0]}, {need[1]})"
        check.fail("block_attend", f"block_mask has shape {tuple(block_mask.shape)}", expected)
    return block_mask


class Visit(NamedTuple):
    """One exact attention call over what a block of queries sees."""

    batch: slice
    heads: slice
    kv_heads: slice
    rows: slice
    keys: slice | Tensor  # neighbours as a slice, which copies nothing
    call: Call


def visits(call: Call, q: Tensor, k: Tensor) -> Iterator[Visit]:
    """The calls that cover every visited block; heads and batches that share a mask go together."""
    (visible, block_q, block_k), (q_len, k_len) = call.blocks, (q.shape[2], k.shape[2])
    group = q.shape[1] // k.shape[1]
    within = torch.arange(block_k, device=q.device)
    for b, h in ((b, h) for b in range(visible.shape[0]) for h in range(visible.shape[1])):
        batch = slice(None) if visible.shape[0] == 1 else slice(b, b + 1)
        heads, kv_heads = (
            (slice(None),) * 2 if visible.shape[1] == 1 else (slice(h, h + 1), slice(h // group, h // group + 1))
        )
        for i, row in enumerate(visible[b, h]):
            rows = slice(i * block_q, min((i + 1) * block_q, q_len))
            last = min(k_len, call.offset + rows.stop) if call.causal else k_len
            seen = row[: -(-max(last, 0) // block_k)].nonzero()
            keys = (seen * block_k + within).flatten()
            if (keys := keys[keys < last]).numel():
                mask = _diagonal(call, rows, keys) if call.causal else None
                yield Visit(batch, heads, kv_heads, rows, _as_slice(keys), Call(call.scale, False, 0, mask))


def _diagonal(call: Call, rows: slice, keys: Tensor) -> Tensor | None:
    """(1, 1, rows, keys) bool under the causal rule; None where every row sees every key."""
    if int(keys[-1]) <= call.offset + rows.start:
        return None
    position = call.offset + torch.arange(rows.start, rows.stop, device=keys.device)
    return (keys <= position[:, None])[None, None]


def _as_slice(keys: Tensor) -> slice | Tensor:
    first, last = int(keys[0]), int(keys[-1])
    return slice(first, last + 1) if last - first + 1 == keys.numel() else keys


def _part(visit: Visit, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    take = [x[visit.batch, visit.kv_heads] for x in (k, v)]
    take = [x[:, :, visit.keys] if isinstance(visit.keys, slice) else x.index_select(2, visit.keys) for x in take]
    return q[visit.batch, visit.heads, visit.rows], *take


def _forward(q: Tensor, k: Tensor, v: Tensor, bias: None, call: Call) -> tuple[Tensor, Tensor]:
    form = fused if fused.serves(q, k, v) else tiled
    out = q.new_zeros((*q.shape[:3], v.shape[-1]))
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    for visit in visits(call, q, k):
        got = form.forward(*_part(visit, q, k, v), None, visit.call)
        for whole, part in zip((out, lse), got, strict=True):
            whole[visit.batch, visit.heads, visit.rows] = part
    return out, lse


def _backward(q, k, v, bias: None, call: Call, out, lse, dout, dlse) -> tuple[Tensor, Tensor, Tensor, None]:
    form = fused if fused.serves(q, k, v) else tiled
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
    for visit in visits(call, q, k):
        at = visit.batch, visit.heads, visit.rows
        rest = out[at], lse[at], dout[at], None if dlse is None else dlse[at]
        part = form.backward(*_part(visit, q, k, v), None, visit.call, *rest)
        dq[at] += part[0]
        for whole, grad in ((dk, part[1]), (dv, part[2])):
            target = whole[visit.batch, visit.kv_heads]
            if isinstance(visit.keys, slice):
                target[:, :, visit.keys] += grad
            else:
                target.index_add_(2, visit.keys, grad.to(wide))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None
