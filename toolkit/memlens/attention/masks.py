"""Boolean attention masks: True = may attend. Queries run down, keys across."""

from __future__ import annotations

import torch
from torch import Tensor

from memlens import check

__all__ = ["mix_heads", "stream_mask"]


def stream_mask(tq: int, tk: int, *, sink: int, recent: int, q_offset: int | None = None, device=None) -> Tensor:
    """Which keys a streaming head sees, (tq, tk) bool: the first `sink` keys and the `recent` newest, itself included.

    visible(i, j) = j <= p and (j < sink or p - j < recent),  p = q_offset + i

    Args:
        tq, tk: queries and keys.
        q_offset: position of the first query; default tk - tq.
    Raises:
        ValueError: negative sizes, or sink + recent = 0, which would hide everything.
    Source: arXiv:2309.17453.
    """
    check.at_least("stream_mask", 0, tq=tq, tk=tk, sink=sink, recent=recent)
    if sink + recent == 0:
        check.fail("stream_mask", "sink=0 and recent=0", "sink + recent >= 1", "recent=1 lets a token see itself")
    offset = tk - tq if q_offset is None else int(q_offset)
    position = offset + torch.arange(tq, device=device)[:, None]
    key = torch.arange(tk, device=device)
    return (key <= position) & ((key < sink) | (position - key < recent))


def mix_heads(full: Tensor, other: Tensor, is_full: Tensor, *, heads: int | None = None) -> Tensor:
    """One mask for heads of two kinds, (H, tq, tk): `full` where `is_full`, else `other`.

    Args:
        full, other: bool, (tq, tk) or (H, tq, tk).
        is_full: bool, (H,) or (Hkv,); one entry for a kv head holds for its whole group of query heads.
        heads: H, where neither mask has a head axis and is_full is (Hkv,).
    Raises:
        TypeError: a tensor that is not bool.
        ValueError: shapes that disagree, or an is_full whose length divides no H.
    """
    for name, x in (("full", full), ("other", other), ("is_full", is_full)):
        if x.dtype != torch.bool:
            check.fail("mix_heads", f"{name} is {x.dtype}", "bool", error=TypeError)
    check.shapes("mix_heads", full=(full, "... tq tk"), other=(other, "... tq tk"), is_full=(is_full, "entries"))
    known = {x.shape[0] for x in (full, other) if x.ndim == 3} | ({heads} if heads else set())
    if len(known) > 1 or max(full.ndim, other.ndim) > 3:
        came = f"full {tuple(full.shape)}, other {tuple(other.shape)}, heads={heads}"
        check.fail("mix_heads", came, "masks (tq, tk) or (H, tq, tk) with one H")
    count = known.pop() if known else is_full.numel()
    check.divides("mix_heads", entries=is_full.numel(), heads=count)
    chosen = is_full.repeat_interleave(count // is_full.numel())
    return torch.where(chosen[:, None, None], full, other)
