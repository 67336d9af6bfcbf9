"""Attention to packed keys and values, block by block or in registers, never on a floating copy of the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from memlens import backend, check
from memlens.attention.exact import attend
from memlens.attention.merge import Attended, merge_many
from memlens.kv.quantize import Packed, dequantize, read_at, span, unit
from memlens.quant.core import container

__all__ = ["packed_attend"]

BLOCK = 512  # tokens that the torch form dequantises at a time


def packed_attend(
    q: Tensor, k: Packed, v: Packed, *, tokens: int | None = None, rank: Tensor | None = None,
    rest: tuple[Tensor, Tensor] | None = None, scale: float | None = None, form: str = "auto",
) -> Attended:  # fmt: skip
    """Attention of every row of q to packed tokens and to the plain ones in `rest`, under one softmax: (out, lse).

    Args:
        q: (B, H, n, D), D > 0; every row sees every token.
        k, v: packed (B, Hkv, slots, D) and (B, Hkv, tokens, Dv), values per token; kv heads divide the heads.
        tokens: only the first so many are attended to (default: all of v).
        rank: (B, Hkv, slots) int32, the row of v that belongs to each slot of k; outside [0, tokens) the slot is empty.
            None where slot i is token i.
        rest: keys (B, Hkv, m, D) and values (B, Hkv, m, Dv) that are not packed.
        form: "reference" dequantises all, "torch" a block at a time, "triton" in registers.
    Raises:
        ValueError: shapes that disagree, values packed along the tokens, or a grouping that the kernel does not take.
    """
    sizes = check.shapes(
        "packed_attend", q=(q, "batch heads rows dim"), k=(k.scale, "batch kv_heads key_groups key_width"),
        v=(v.scale, "batch kv_heads value_groups value_width"), rank=(rank, "batch kv_heads slots"),
    )  # fmt: skip
    check.divides("packed_attend", kv_heads=sizes["kv_heads"], heads=sizes["heads"])
    if v.axis != -1:
        check.fail("packed_attend", "values grouped along the tokens", "values per token", "use kivi's axes=(-2, -1)")
    tokens = v.shape[2] if tokens is None else tokens
    check.within("packed_attend", 0, v.shape[2] if rank is not None else min(v.shape[2], k.shape[2]), tokens=tokens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    why = problem(q, k, v) if form in ("auto", "triton") else ""
    if why and form == "triton":
        check.fail("packed_attend", why, "a grouping that the kernel takes", "use form='torch'")
    form = backend.choose("packed_attend", form, q, kernel=not why)
    run = {"reference": _whole, "torch": _blocks, "triton": _kernel}[form]
    parts = run(q, k, v, tokens, rank, scale)
    if rest is not None:
        parts = [*parts, attend(q, *rest, causal=False, scale=scale, return_lse=True, form=form)]
    return merge_many(parts)


def problem(q: Tensor, k: Packed, v: Packed) -> str:
    """Why the kernel cannot take these; empty where it can, or where there is no Triton to ask."""
    if backend.triton_problem(q):
        return ""
    from memlens_kernels.packed import problem as kernel_problem

    return kernel_problem(_words(k), _words(v), q.shape[-1], v.shape[-1], q.shape[1] // k.shape[1] * q.shape[2])


def _whole(q: Tensor, k: Packed, v: Packed, tokens: int, rank: Tensor | None, scale: float) -> list[Attended]:
    keys, values = dequantize(k, q.dtype), dequantize(v, q.dtype)[:, :, :tokens]
    if rank is not None:
        slot = torch.where((rank >= 0) & (rank < tokens), rank, tokens).argsort(-1, stable=True)[..., :tokens]
        keys = keys.gather(2, slot[..., None].expand(*slot.shape, keys.shape[-1]))
    keys = keys[:, :, :tokens]
    return [attend(q, keys, values, causal=False, scale=scale, return_lse=True, form="reference")]


def _blocks(q: Tensor, k: Packed, v: Packed, tokens: int, rank: Tensor | None, scale: float) -> list[Attended]:
    slots = k.shape[2] if rank is not None else tokens
    step = BLOCK - BLOCK % unit(k) or unit(k)
    parts = []
    for start in range(0, slots, step):
        stop = min(start + step, k.shape[2])
        keys, mask = dequantize(span(k, start, stop), q.dtype), None
        if rank is None:
            stop = min(stop, tokens)
            keys, values = keys[:, :, : stop - start], dequantize(span(v, start, stop), q.dtype)
        else:
            row = rank[..., start:stop].long()
            mask = ((row >= 0) & (row < tokens)).repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, None]
            values = read_at(v, row.clamp(0, max(0, tokens - 1)), q.dtype)
        parts.append(attend(q, keys, values, causal=False, mask=mask, scale=scale, return_lse=True, form="torch"))
    return parts or [attend(q, *_nothing(q, k, v), causal=False, scale=scale, return_lse=True, form="torch")]


def _nothing(q: Tensor, k: Packed, v: Packed) -> tuple[Tensor, Tensor]:
    return tuple(q.new_empty(*k.shape[:2], 0, x.shape[-1]) for x in (k, v))


def _kernel(q: Tensor, k: Packed, v: Packed, tokens: int, rank: Tensor | None, scale: float) -> list[Attended]:
    from memlens_kernels.packed import decode_packed

    rows = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3).contiguous()  # (B, Hkv, group · n, D)
    rank = None if rank is None else rank.contiguous()
    out, lse = decode_packed(rows, _words(k), _words(v), tokens=tokens, scale=scale, rank=rank)
    shape = (*q.shape[:3], v.shape[-1])
    return [Attended(o.view(shape), part.view(shape[:3])) for o, part in zip(out, lse, strict=True)]


def _words(p: Packed):
    from memlens_kernels.packed import Words

    return Words(*p[:3], container(p.bits), p.axis, p.group)
