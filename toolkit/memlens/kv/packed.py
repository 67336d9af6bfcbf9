"""Attention to packed keys and values, block by block or in registers, never on a floating copy of the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from memlens import backend, check
from memlens.attention.merge import Attended, merge_many
from memlens.kv.observe import Observed, attend_alive, merge_observed
from memlens.kv.quantize import Packed, dequantize, read_at, span, unit
from memlens.quant.core import container

__all__ = ["packed_attend"]

BLOCK = 512  # tokens that the torch form dequantises at a time


def packed_attend(
    q: Tensor, k: Packed, v: Packed, *, tokens: int | None = None, rank: Tensor | None = None,
    rest: tuple[Tensor, Tensor] | None = None, scale: float | None = None, form: str = "auto", tally: bool = False,
) -> Attended | Observed:  # fmt: skip
    """Attention of every row of q to packed tokens and to the plain ones in `rest`, under one softmax: (out, lse).

    Args:
        q: (B, H, n, D), D > 0; every row sees every token.
        k, v: packed (B, Hkv, slots, D) and (B, Hkv, tokens, Dv), values per token; kv heads divide the heads.
        tokens: only the first so many are attended to (default: all of v).
        rank: (B, Hkv, slots) int32, the row of v that belongs to each slot of k; outside [0, tokens) the slot is empty.
            None where slot i is token i.
        rest: keys (B, Hkv, m, D) and values (B, Hkv, m, Dv) that are not packed.
        form: "reference" dequantises all, "torch" a block at a time, "triton" in registers.
        tally: say too what each token got, `Observed(out, lse, score)` with score (B, H, tokens + m), from the same pass
            over the keys; for a single row.
    Raises:
        ValueError: shapes that disagree, more rows than one to tally, values packed along the tokens, or a grouping that the
            kernel does not take.
    """
    sizes = check.shapes(
        "packed_attend", q=(q, "batch heads rows dim"), k=(k.scale, "batch kv_heads key_groups key_width"),
        v=(v.scale, "batch kv_heads value_groups value_width"), rank=(rank, "batch kv_heads slots"),
    )  # fmt: skip
    check.divides("packed_attend", kv_heads=sizes["kv_heads"], heads=sizes["heads"])
    if tally and sizes["rows"] != 1:
        check.fail("packed_attend", f"{sizes['rows']} rows to tally", "a single row", "one by one, or tally=False")
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
    parts = run(q, k, v, tokens, rank, scale, tally)
    if rest is not None:
        parts = [*parts, attend_alive(q, *rest, scale=scale, form=form, tally=tally)]
    return merge_observed(parts) if tally else merge_many(parts)


def problem(q: Tensor, k: Packed, v: Packed) -> str:
    """Why the kernel cannot take these; empty where it can, or where there is no Triton to ask."""
    if backend.triton_problem(q):
        return ""
    from memlens_kernels.packed import problem as kernel_problem

    return kernel_problem(_words(k), _words(v), q.shape[-1], v.shape[-1], q.shape[1] // k.shape[1] * q.shape[2])


def _whole(q: Tensor, k: Packed, v: Packed, tokens: int, rank: Tensor | None, scale: float, tally: bool) -> list:
    keys, values, alive = dequantize(k, q.dtype), dequantize(v, q.dtype), None
    if rank is None:
        keys, values = keys[:, :, :tokens], values[:, :, :tokens]
    else:
        alive = (rank >= 0) & (rank < tokens)
        row = rank.clamp(0, max(0, tokens - 1)).long()
        values = values.gather(2, row[..., None].expand(*row.shape, values.shape[-1]))
    found = attend_alive(q, keys, values, alive=alive, scale=scale, form="reference", tally=tally)
    return [_by_token(found, rank, tokens)] if tally else [found]


def _blocks(q: Tensor, k: Packed, v: Packed, tokens: int, rank: Tensor | None, scale: float, tally: bool) -> list:
    slots = k.shape[2] if rank is not None else tokens
    step = BLOCK - BLOCK % unit(k) or unit(k)
    parts = []
    for start in range(0, slots, step):
        stop = min(start + step, k.shape[2])
        keys, alive = dequantize(span(k, start, stop), q.dtype), None
        if rank is None:
            stop = min(stop, tokens)
            keys, values = keys[:, :, : stop - start], dequantize(span(v, start, stop), q.dtype)
        else:
            row = rank[..., start:stop].long()
            alive = (row >= 0) & (row < tokens)
            values = read_at(v, row.clamp(0, max(0, tokens - 1)), q.dtype)
        parts.append(attend_alive(q, keys, values, alive=alive, scale=scale, form="torch", tally=tally))
    parts = parts or [attend_alive(q, *_nothing(q, k, v), scale=scale, form="torch", tally=tally)]
    return [_by_token(merge_observed(parts), rank, tokens)] if tally else parts


def _by_token(found: Observed, rank: Tensor | None, tokens: int) -> Observed:
    """Scores (B, H, slots) as (B, H, tokens): a slot's goes to the token that lies in it."""
    if rank is None:
        return found._replace(score=found.score[..., :tokens])
    place = torch.where((rank >= 0) & (rank < tokens), rank, tokens).long()  # an empty slot's 0 goes beyond the end
    score = found.score.new_zeros(*found.score.shape[:2], tokens + 1)
    place = place.repeat_interleave(score.shape[1] // place.shape[1], 1)
    return found._replace(score=score.scatter_(-1, place, found.score)[..., :tokens])


def _nothing(q: Tensor, k: Packed, v: Packed) -> tuple[Tensor, Tensor]:
    return tuple(q.new_empty(*k.shape[:2], 0, x.shape[-1]) for x in (k, v))


def _kernel(q: Tensor, k: Packed, v: Packed, tokens: int, rank: Tensor | None, scale: float, tally: bool) -> list:
    from memlens_kernels.decode_observe import add_observed
    from memlens_kernels.packed import decode_packed, score_buffer

    rows = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3).contiguous()  # (B, Hkv, group · n, D)
    rank = None if rank is None else rank.contiguous()
    scores = score_buffer(rows, _words(k)) if tally else None
    out, lse = decode_packed(rows, _words(k), _words(v), tokens=tokens, scale=scale, rank=rank, scores=scores)
    shape = (*q.shape[:3], v.shape[-1])
    parts = [Attended(o.view(shape), part.view(shape[:3])) for o, part in zip(out, lse, strict=True)]
    if not tally:
        return parts
    whole = merge_many(parts)
    mass = add_observed(scores, whole.lse.reshape(scores.shape[:3]).contiguous(), None, "none")
    return [_by_token(Observed(*whole, mass.flatten(1, 2)), rank, tokens)]


def _words(p: Packed):
    from memlens_kernels.packed import Words

    return Words(*p[:3], container(p.bits), p.axis, p.group)
