"""Attention in plain torch operations, one tile of queries and keys at a time: memory linear in the length.

The forward keeps a running maximum, denominator and unnormalised output for a block of queries while key blocks pass by
(the online softmax) and divides once at the end. The backward recomputes each tile's probabilities P = exp(S - lse):

    Δ = rowsum(dO ∘ O)    dV += Pᵀ dO    dS = P ∘ (dO Vᵀ - Δ + dlse)    dQ += scale · dS K    dK += scale · dSᵀ Q

`dlse` is the gradient of the log-denominator, needed because merging partial results differentiates through it.
Source: arXiv:2205.14135, algorithms 1 and 4, in the loop order of arXiv:2307.08691.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from memlens.attention.call import Call, additive

__all__ = ["backward", "forward"]

ROWS, KEYS = 256, 512  # of a tile


def _spans(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _key_spans(call: Call, rows: slice, length: int) -> Iterator[slice]:
    """Key blocks that some row of the block can see: those past the diagonal are not visited."""
    return _spans(min(length, call.offset + rows.stop) if call.causal else length, KEYS)


def _stack(x: Tensor, kv_heads: int) -> Tensor:
    """(batch, heads, rows, dim) as (batch, kv_heads, group * rows, dim): the query heads of a group share their keys."""
    return x.reshape(x.shape[0], kv_heads, -1, x.shape[-1])


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, call: Call, rows: slice, keys: slice) -> Tensor:
    """Scaled scores of a tile, (batch, heads, rows, keys); hidden pairs are -inf."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = _stack(q[:, :, rows].to(wide), k.shape[1]) @ k[:, :, keys].to(wide).mT
    scores = scores.view(q.shape[0], q.shape[1], rows.stop - rows.start, -1).mul_(call.scale)
    added = additive(call, bias, rows, keys, q)
    return scores if added is None else scores.add_(added)


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse) of one call; q (B,H,Tq,D), k (B,Hkv,Tk,D), v (B,Hkv,Tk,Dv)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros((*q.shape[:3], v.shape[-1]))
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide)
    for rows in _spans(q.shape[2], ROWS):
        top, total, held = lse[:, :, rows].clone(), torch.zeros_like(lse[:, :, rows]), out[:, :, rows].to(wide)
        for keys in _key_spans(call, rows, k.shape[2]):
            scores = _scores(q, k, bias, call, rows, keys)
            new_top = torch.maximum(top, scores.amax(-1))
            shift = new_top.masked_fill(new_top == -torch.inf, 0.0)
            weights, fade = scores.sub_(shift[..., None]).exp_(), (top - shift).exp()
            part = (_stack(weights, k.shape[1]) @ v[:, :, keys].to(wide)).view_as(held)
            top, total, held = new_top, total * fade + weights.sum(-1), held * fade[..., None] + part
        empty = total == 0
        total = total.masked_fill(empty, 1.0)
        out[:, :, rows] = held / total[..., None]
        lse[:, :, rows] = (top + total.log()).masked_fill(empty, -torch.inf)
    return out, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, call: Call, out: Tensor, lse: Tensor, dout: Tensor,
    dlse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and, where it asks for one, bias."""
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
    dbias = torch.zeros_like(bias, dtype=wide) if bias is not None and bias.requires_grad else None
    # where a row saw nothing every score is -inf and P is 0, whatever is subtracted
    shift = lse.masked_fill(lse == -torch.inf, 0.0)[..., None]
    delta = (dout.to(wide) * out.to(wide)).sum(-1, keepdim=True)
    delta = delta if dlse is None else delta - dlse[..., None]
    for rows in _spans(q.shape[2], ROWS):
        q_tile, do_tile = (_stack(x[:, :, rows].to(wide), k.shape[1]) for x in (q, dout))
        for keys in _key_spans(call, rows, k.shape[2]):
            p = _scores(q, k, bias, call, rows, keys).sub_(shift[:, :, rows]).exp_()
            dv[:, :, keys] += _stack(p, k.shape[1]).mT @ do_tile
            dp = (do_tile @ v[:, :, keys].to(wide).mT).view_as(p)
            ds = dp.sub_(delta[:, :, rows]).mul_(p)
            if dbias is not None:
                _add_reduced(dbias, ds, rows, keys)
            ds = _stack(ds, k.shape[1]).mul_(call.scale)
            dq[:, :, rows] += (ds @ k[:, :, keys].to(wide)).view_as(dq[:, :, rows])
            dk[:, :, keys] += ds.mT @ q_tile
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None if dbias is None else dbias.to(bias.dtype)


def _add_reduced(dbias: Tensor, ds: Tensor, rows: slice, keys: slice) -> None:
    """Add a tile's score gradient to the bias gradient, summed over the axes along which the bias is broadcast."""
    target = dbias[..., rows, :] if dbias.shape[-2] > 1 else dbias
    target = target[..., keys] if target.shape[-1] > 1 else target
    target += ds.sum_to_size(target.shape)
