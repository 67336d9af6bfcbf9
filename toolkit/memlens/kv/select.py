"""Which tokens stay, and the running state that must be gathered together with them.

An index here is a place in the cache, not a position in the text; positions are data (`StreamState.pos`) that travel with
the keys. Protection of the first and last tokens is membership in a set, never a large score, so that ties cannot undo it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from memlens import check

__all__ = ["StreamState", "complement", "extend", "gather_kv", "stream", "take", "topk_keep"]


def topk_keep(score: Tensor, budget: int, *, first: int = 0, last: int = 0, alive: Tensor | None = None) -> Tensor:
    """Indices of the `budget` tokens to keep: (..., min(budget, L)) int64, ascending.

    The first `first` and last `last` tokens are always among them and count inside the budget; the rest are those with
    the highest scores, ties to the lower index.

    Args:
        score: (..., L); +inf is a score like any other, NaN is refused.
        budget: how many stay; at or above L, all do.
        alive: (..., L) bool; False marks padding, which is neither first nor last and goes before any real token.
    Raises:
        ValueError: budget < 1, budget < first + last, a negative count, NaN in the scores.

    >>> topk_keep(torch.tensor([0.1, 0.9, 0.9, 0.5, 0.0]), 3, last=1)
    tensor([1, 2, 4])
    """
    check.at_least("topk_keep", 0, first=first, last=last)
    check.at_least("topk_keep", max(1, first + last), f"first={first} and last={last} count inside the budget", budget=budget)
    length = score.shape[-1]
    if bool(score.isnan().any()):
        check.fail("topk_keep", "NaN among the scores", "numbers", "look at what produced them (a masked row, an overflow)")
    if budget >= length:
        return torch.arange(length, device=score.device).expand(score.shape)
    if alive is None:
        alive = torch.ones((), dtype=torch.bool, device=score.device).expand(score.shape)
    rank = alive.cumsum(-1)
    protected = alive & ((rank <= first) | (rank > rank[..., -1:] - last))
    order = score.sort(-1, descending=True, stable=True).indices
    tier = alive.to(torch.uint8) + protected.to(torch.uint8)  # padding 0, ordinary 1, protected 2
    best = tier.gather(-1, order).sort(-1, descending=True, stable=True).indices[..., :budget]
    return order.gather(-1, best).sort(-1).values


def complement(idx: Tensor, length: int) -> Tensor:
    """The indices below `length` that `idx` (..., b) lacks: (..., length - b) int64, ascending.

    Raises:
        ValueError: an index outside [0, length), or a repeated one.
    """
    check.within("complement", 0, length - 1, idx=idx)
    absent = torch.ones(*idx.shape[:-1], length, dtype=torch.bool, device=idx.device).scatter_(-1, idx, False)
    if int(absent.sum()) != absent.numel() - idx.numel():
        check.fail("complement", "a repeated index", "each index once")
    return absent.nonzero()[:, -1].view(*idx.shape[:-1], length - idx.shape[-1])


def gather_kv(k: Tensor, v: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
    """k (B, Hkv, L, D) and v (B, Hkv, L, Dv) at idx (B, Hkv, b): new tensors, so the old ones can be freed."""
    check.shapes(
        "gather_kv", k=(k, "batch kv_heads length dim"), v=(v, "batch kv_heads length value_dim"), idx=(idx, "batch kv_heads kept")
    )
    return tuple(x.gather(2, idx[..., None].expand(*idx.shape, x.shape[-1])) for x in (k, v))


class StreamState(NamedTuple):
    """What a layer knows about each token it holds. All tensors end in the token axis and are gathered together."""

    score: Tensor  # (B, Hkv, L) float32, higher is kept
    pos: Tensor  # (B, Hkv, L) int32: position in the text; negative for left padding
    step: int  # tokens seen so far, kept or not
    aux: Mapping[str, Tensor]  # anything else per token, each (..., L)


def stream(batch: int, kv_heads: int, *, device: torch.device | str | None = None) -> StreamState:
    """The state of an empty cache."""
    empty = torch.empty(batch, kv_heads, 0, device=device)
    return StreamState(empty, empty.to(torch.int32), 0, {})


def extend(state: StreamState, new_score: Tensor, *, pad: Tensor | None = None) -> StreamState:
    """The state after the tokens of one more block: old scores carried on, `new_score` added, positions counted on.

    Args:
        new_score: (B, Hkv, L + n): what the block adds to the L tokens held and gives the n new ones.
        pad: (B,) how many tokens on the left of each row are padding; their positions are negative.
    Raises:
        ValueError: fewer scores than tokens held, or aux that was not extended by its owner beforehand.
    """
    check.shapes("extend", score=(state.score, "batch kv_heads held"), new_score=(new_score, "batch kv_heads total"))
    held, total = state.score.shape[-1], new_score.shape[-1]
    check.at_least("extend", held, new_score=total)
    for name, value in state.aux.items():
        if value.shape[-1] != total:
            check.fail("extend", f"aux[{name!r}] covers {value.shape[-1]} tokens", f"{total}, as new_score")
    score = new_score.clone() if total else new_score
    score[..., :held] += state.score
    fresh = torch.arange(state.step, state.step + total - held, dtype=torch.int32, device=score.device).expand(len(score), -1)
    fresh = fresh if pad is None else fresh - pad.to(fresh)[:, None]
    pos = torch.cat((state.pos, fresh[:, None].expand(-1, score.shape[1], -1)), -1)
    return StreamState(score, pos, state.step + total - held, state.aux)


def take(state: StreamState, idx: Tensor) -> StreamState:
    """The state of the tokens at idx (B, Hkv, b); what was known about the others is forgotten."""
    kept = {name: value.gather(-1, idx.expand(*value.shape[:-1], -1)) for name, value in state.aux.items()}
    return StreamState(state.score.gather(-1, idx), state.pos.gather(-1, idx), state.step, kept)
