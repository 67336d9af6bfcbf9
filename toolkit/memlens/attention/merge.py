"""Attention over a union of disjoint key sets, from the attention over each.

Every part carries its output and the log of its softmax denominator (`lse`), which is all that is needed to weigh it:

    lse = log Σ_p exp(lse_p)        out = Σ_p exp(lse_p - lse) · out_p

A part that saw no key has lse = -inf and weighs nothing. Source: the rescaling step of arXiv:2205.14135, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memlens import check

__all__ = ["Attended", "merge", "merge_many"]


class Attended(NamedTuple):
    out: Tensor  # (batch, heads, length, value_dim), dtype of q
    lse: Tensor  # (batch, heads, length), float32 (float64 for float64), natural log; -inf where no key was visible


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Attended:
    """Attention over two disjoint sets of keys from the result on each; commutative and associative.

    Args:
        out_a, out_b: (..., length, value_dim), of one shape.
        lse_a, lse_b: (..., length), natural log; -inf marks a row that saw no key.
    Returns:
        `Attended(out, lse)`: out in the dtype of `out_a`. Where both parts are empty out is 0 and lse -inf. The
        gradient flows through both outs and both lses and is 0, never NaN, at an empty row.
    Raises:
        ValueError: shapes that disagree.
    """
    return merge_many([(out_a, lse_a), (out_b, lse_b)])


def merge_many(parts: Sequence[tuple[Tensor, Tensor]]) -> Attended:
    """Attention over any number of disjoint key sets, from the (out, lse) on each; see `merge`.

    Raises:
        ValueError: no parts, or shapes that disagree.
    """
    if not len(parts):
        check.fail("merge_many", "no parts", "at least one (out, lse)")
    for out, lse in parts:
        check.shapes("merge", out=(out, "... length value_dim"), lse=(lse, "... length"))
        if out.shape != parts[0][0].shape or lse.shape != out.shape[:-1]:
            came = ", ".join(f"out {tuple(o.shape)} lse {tuple(m.shape)}" for o, m in parts)
            check.fail("merge", came, "outs of one shape (..., length, value_dim) and lses of that shape (..., length)")
    wide = torch.promote_types(parts[0][1].dtype, torch.float32)
    # the largest lse is subtracted before exp; 0 stands in for it where every part is empty
    top = torch.stack([lse.detach() for _, lse in parts]).amax(0).to(wide)
    shift = top.masked_fill(top == -torch.inf, 0.0)
    weights = [(lse.to(wide) - shift).exp() for _, lse in parts]
    total = sum(weights[1:], start=weights[0])
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    out = sum(out.to(wide) * (weight / total)[..., None] for (out, _), weight in zip(parts, weights, strict=True))
    return Attended(out.to(parts[0][0].dtype), (shift + total.log()).masked_fill(empty, -torch.inf))
