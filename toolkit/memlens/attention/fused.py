"""Attention on the CPU through torch's fused operator, which also returns the log-denominator.

The operator knows one causal rule (row i sees keys up to i) and additive masks, gives lse = 0 for a row that saw nothing,
and takes no gradient for lse. Three steps make it serve a whole call:

- without mask or bias, keys before `offset` are seen by every row and the rest by the operator's own rule: at most two
  pieces, joined by `merge`; with a mask or bias, blocks of rows, each with one additive tile: memory stays linear;
- the backward of every piece gets the joined out and lse, so that its probabilities are those of the whole call;
- `dlse` rides in one more value column: with v' = [v, 0], dO' = [dO, dlse], O' = [O, -1] the operator's own
  rowsum(dO' ∘ O') is Δ - dlse, which is what the score gradient needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memlens.attention.call import Call, additive
from memlens.attention.merge import merge

__all__ = ["backward", "forward", "serves"]

ROWS = 256  # of a block with a mask or bias
_FORWARD, _BACKWARD = "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"


class Piece(NamedTuple):
    rows: slice
    keys: slice
    causal: bool  # the operator's own rule: row i of the piece sees keys up to i of the piece
    masked: bool  # add mask, bias and diagonal as a tile


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the operator exists here and takes these tensors."""
    on_cpu = q.device.type == "cpu" and k.device.type == "cpu" and v.device.type == "cpu"
    return on_cpu and min(q.numel(), k.numel(), v.numel()) > 0 and hasattr(torch.ops.aten, _FORWARD)


def pieces(call: Call, q_len: int, k_len: int, masked: bool) -> Iterator[Piece]:
    """Rectangles (or lower triangles) that cover what the rows may see, none twice; rows that see nothing are left out."""
    first = max(0, -call.offset) if call.causal else 0
    if masked:
        for start in range(first, q_len, ROWS):
            rows = slice(start, min(start + ROWS, q_len))
            yield Piece(rows, slice(0, min(k_len, call.offset + rows.stop) if call.causal else k_len), False, True)
        return
    rows, shared = slice(first, q_len), min(k_len, call.offset + first)
    if first >= q_len:
        return
    if not call.causal or shared == k_len:
        yield Piece(rows, slice(0, k_len), False, False)
    elif q_len - first == 1:
        yield Piece(rows, slice(0, shared + 1), False, False)
    else:
        if shared:
            yield Piece(rows, slice(0, shared), False, False)
        yield Piece(rows, slice(shared, k_len), True, False)


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse) of one call; q (B,H,Tq,D), k (B,Hkv,Tk,D), v (B,Hkv,Tk,Dv)."""
    value_dim = v.shape[-1]
    q, k, v = _widen(max(q.shape[-1], value_dim), q, k, v)
    parts = list(pieces(call, q.shape[2], k.shape[2], call.mask is not None or bias is not None))
    if len(parts) == 1 and parts[0].rows == slice(0, q.shape[2]):
        out, lse = _run(q, k, v, bias, call, parts[0])
        return out[..., :value_dim], lse
    out, lse = q.new_zeros(q.shape), q.new_full(q.shape[:3], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    for piece in parts:
        got = _run(q, k, v, bias, call, piece)
        seen = out[:, :, piece.rows], lse[:, :, piece.rows]
        got = merge(*seen, *got) if piece.causal and piece.keys.start else got
        out[:, :, piece.rows], lse[:, :, piece.rows] = got
    return out[..., :value_dim], lse


def _run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, call: Call, piece: Piece) -> tuple[Tensor, Tensor]:
    tile = additive(call, bias, piece.rows, piece.keys, q) if piece.masked else None
    operator = getattr(torch.ops.aten, _FORWARD)
    inputs = q[:, :, piece.rows], k[:, :, piece.keys], v[:, :, piece.keys]
    out, lse = operator(*inputs, 0.0, piece.causal, attn_mask=tile, scale=call.scale)
    if tile is not None and (empty := (tile == -torch.inf).all(-1)).any():
        lse = lse.masked_fill(empty, -torch.inf)
    return _unmask_nan(out, lse, inputs[0], inputs[1], tile)


def _unmask_nan(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, tile: Tensor | None) -> tuple[Tensor, Tensor]:
    """NaN where the operator hides it: a row whose scores are all NaN comes back as out = 0, lse = 0."""
    silent = lse == 0
    # the inputs are read only where a row may be one, so that the usual call pays for one comparison of lse
    if silent.any() and not (q.isfinite().all() and k.isfinite().all() and (tile is None or not tile.isnan().any())):
        silent &= (out == 0).all(-1)
        out, lse = out.masked_fill(silent[..., None], torch.nan), lse.masked_fill(silent, torch.nan)
    return out, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, call: Call, out: Tensor, lse: Tensor, dout: Tensor,
    dlse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, None]:  # fmt: skip
    """Gradients of q, k and v; a bias that needs its own goes through `memlens.attention.tiled`."""
    dim, value_dim = q.shape[-1], v.shape[-1]
    if dlse is not None:
        out = torch.cat((out, torch.full_like(out[..., :1], -1.0)), -1)
        dout = torch.cat((dout, dlse.to(dout.dtype)[..., None]), -1)
    q, k, v, out, dout = _widen(max(dim, value_dim + (dlse is not None)), q, k, v, out, dout)
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    parts = list(pieces(call, q.shape[2], k.shape[2], call.mask is not None or bias is not None))
    if len(parts) == 1 and parts[0] == Piece(slice(0, q.shape[2]), slice(0, k.shape[2]), parts[0].causal, False):
        dq, dk, dv = _run_back(q, k, v, bias, call, out, lse, dout, parts[0])
    else:
        wide = torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
        for piece in parts:
            part = _run_back(q, k, v, bias, call, out, lse, dout, piece)
            dq[:, :, piece.rows] += part[0]
            dk[:, :, piece.keys] += part[1]
            dv[:, :, piece.keys] += part[2]
    return dq[..., :dim].to(q.dtype), dk[..., :dim].to(k.dtype), dv[..., :value_dim].to(v.dtype), None


def _run_back(q, k, v, bias, call: Call, out, lse, dout, piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
    tile = additive(call, bias, piece.rows, piece.keys, q) if piece.masked else None
    operator, rows = getattr(torch.ops.aten, _BACKWARD), piece.rows
    inputs = q[:, :, rows], k[:, :, piece.keys], v[:, :, piece.keys], out[:, :, rows], lse[:, :, rows]
    return operator(dout[:, :, rows], *inputs, 0.0, piece.causal, attn_mask=tile, scale=call.scale)


def _widen(width: int, *tensors: Tensor) -> list[Tensor]:
    """The tensors with dims of one width (zeros add nothing to a product) and neighbours in memory along the last axis."""
    padded = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in tensors)
    return [x if x.stride(-1) == 1 else x.contiguous() for x in padded]
