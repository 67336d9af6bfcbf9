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

__all__ = [
    "StreamState", "chunk_landmarks", "complement", "extend", "fixed_point", "gather_kv", "outlier_chunks", "positions",
    "repeat", "stream", "take", "topk_keep",
]  # fmt: skip


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
    fix = f"first={first} and last={last} count inside the budget"
    check.at_least("topk_keep", max(1, first + last), fix, budget=budget)
    length = score.shape[-1]
    if bool(score.isnan().any()):
        check.fail("topk_keep", "NaN among the scores", "numbers", "look at what produced them (a masked row, an overflow)")
    if budget >= length:
        return torch.arange(length, device=score.device).expand(score.shape)
    if alive is None:
        keep = torch.ones_like(score, dtype=torch.bool)
        keep[..., first : length - last] = _highest(score[..., first : length - last], budget - first - last)
        return keep.nonzero()[:, -1].view(*score.shape[:-1], budget)
    rank = alive.cumsum(-1)
    protected = alive & ((rank <= first) | (rank > rank[..., -1:] - last))
    order = score.sort(dim=-1, descending=True, stable=True).indices
    tier = alive.to(torch.uint8) + protected.to(torch.uint8)  # padding 0, ordinary 1, protected 2
    best = tier.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices[..., :budget]
    return order.gather(-1, best).sort(dim=-1).values


def _highest(score: Tensor, count: int) -> Tensor:
    """Where the `count` highest scores are, ties to the lower index: (..., L) bool, without sorting the whole row."""
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    least = score.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, level = score > least, score == least
    return above | (level & (level.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def fixed_point(held: int, p: int, count: int = 1, *, start: int = 0, alive: Tensor | None = None) -> Tensor:
    """What is left of `held` tokens when the one at index p goes, `count` times over: (held - count,) int64, ascending.

    Args:
        p: the same index every time, so that tokens p to p + count - 1 go.
        start: tokens at the beginning that must stay.
        alive: (..., held) bool; False marks padding, which goes first and is not counted in p. The result is then (..., held -
            count).
    Raises:
        ValueError: p outside [start, held - count].
    Source: the deletion of arXiv:2407.18121 (Elastic Cache) while it writes.

    >>> fixed_point(6, 2)
    tensor([0, 1, 3, 4, 5])
    """
    check.at_least("fixed_point", 1, count=count)
    check.within("fixed_point", start, held - count, p=p)
    flat = torch.zeros(held) if alive is None else torch.zeros(alive.shape, device=alive.device)
    return topk_keep(flat, held - count, first=p, last=held - count - p, alive=alive)


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
    cached = "batch kv_heads length"
    check.shapes("gather_kv", k=(k, f"{cached} dim"), v=(v, f"{cached} value_dim"), idx=(idx, "batch kv_heads kept"))
    return tuple(x.gather(2, idx[..., None].expand(*idx.shape, x.shape[-1])) for x in (k, v))


class StreamState(NamedTuple):
    """What a layer knows about each token it holds. All tensors end in the token axis and are gathered together."""

    score: Tensor  # (B, Hkv, L) float32, higher is kept
    pos: Tensor  # (B, Hkv, L) int32: position in the text; negative for left padding
    step: int  # tokens seen so far, kept or not
    aux: Mapping[str, Tensor]  # anything else per token, each (B, Hkv, ..., L)


def stream(batch: int, kv_heads: int, *, device: torch.device | str | None = None) -> StreamState:
    """The state of an empty cache."""
    empty = torch.empty(batch, kv_heads, 0, device=device)
    return StreamState(empty, empty.to(torch.int32), 0, {})


def positions(state: StreamState, count: int, pad: Tensor | None = None) -> Tensor:
    """Positions of the tokens held and of the next `count`, (B, Hkv, L + count) int32.

    `pad` (B,) says how many tokens on the left of each row are padding: their positions are negative.
    """
    batch, kv_heads, _ = state.pos.shape
    fresh = torch.arange(state.step, state.step + count, dtype=torch.int32, device=state.pos.device).expand(batch, -1)
    fresh = fresh if pad is None else fresh - pad.to(fresh)[:, None]
    return torch.cat((state.pos, fresh[:, None].expand(-1, kv_heads, -1)), -1)


def extend(state: StreamState, new_score: Tensor, *, pad: Tensor | None = None) -> StreamState:
    """The state after the tokens of one more block: old scores carried on, `new_score` added, positions counted on.

    Args:
        new_score: (B, Hkv, L + n): what the block adds to the L tokens held and gives the n new ones.
        pad: as in `positions`.
    Raises:
        ValueError: fewer scores than tokens held, or aux that its owner did not extend beforehand.
    """
    check.shapes("extend", score=(state.score, "batch kv_heads held"), new_score=(new_score, "batch kv_heads total"))
    held, total = state.score.shape[-1], new_score.shape[-1]
    check.at_least("extend", held, new_score=total)
    for name, value in state.aux.items():
        if value.shape[-1] != total:
            check.fail("extend", f"aux[{name!r}] covers {value.shape[-1]} tokens", f"{total}, as new_score")
    score = torch.cat((state.score + new_score[..., :held], new_score[..., held:]), -1)
    return StreamState(score, positions(state, total - held, pad), state.step + total - held, state.aux)


def take(state: StreamState, idx: Tensor) -> StreamState:
    """The state of the tokens at idx (B, Hkv, b); what was known about the others is forgotten."""
    kept = {name: value.gather(-1, _spread(idx, value)) for name, value in state.aux.items()}
    return StreamState(state.score.gather(-1, idx), state.pos.gather(-1, idx), state.step, kept)


def _spread(idx: Tensor, value: Tensor) -> Tensor:
    inner = value.shape[2:-1]
    return idx.view(*idx.shape[:2], *(1,) * len(inner), -1).expand(*idx.shape[:2], *inner, -1)


def repeat(state: StreamState, times: int) -> StreamState:
    """The state of a batch whose every row is repeated `times`, as `repeat_interleave` does with keys and values."""
    aux = {name: value.repeat_interleave(times, 0) for name, value in state.aux.items()}
    return StreamState(*(x.repeat_interleave(times, 0) for x in state[:2]), state.step, aux)


def chunk_landmarks(k: Tensor, chunk: int = 8) -> Tensor:
    """The mean key of every `chunk` consecutive tokens of k (B, Hkv, L, D): (B, Hkv, L / chunk, D).

    Raises:
        ValueError: a length that is no multiple of chunk.
    Source: arXiv:2410.21465, section 4.1.
    """
    sizes = check.shapes("chunk_landmarks", k=(k, "batch kv_heads length dim"))
    check.at_least("chunk_landmarks", 1, chunk=chunk)
    check.divides("chunk_landmarks", chunk=chunk, length=sizes["length"])
    return k.unflatten(2, (-1, chunk)).mean(3)


def outlier_chunks(k: Tensor, landmarks: Tensor, n: int) -> Tensor:
    """The n chunks of each head that their landmark describes worst, (B, Hkv, n) int64 ascending.

    A chunk is as bad as its worst key: the least cosine between one of its keys and the landmark.

    Args:
        k: (B, Hkv, L, D); landmarks: (B, Hkv, C, D) from `chunk_landmarks`.
        n: at least 0, and fewer than the chunks.
    Raises:
        ValueError: a length that is no multiple of C, n outside [0, C - 1].
    Source: arXiv:2410.21465, section 4.1.
    """
    sizes = check.shapes(
        "outlier_chunks", k=(k, "batch kv_heads length dim"), landmarks=(landmarks, "batch kv_heads chunks dim")
    )
    check.divides("outlier_chunks", chunks=sizes["chunks"], length=sizes["length"])
    check.within("outlier_chunks", 0, sizes["chunks"] - 1, n=n)
    if n == 0:
        return torch.empty(*k.shape[:2], 0, dtype=torch.int64, device=k.device)
    keys = k.unflatten(2, (sizes["chunks"], -1))
    worst = torch.nn.functional.cosine_similarity(keys.float(), landmarks.float()[:, :, :, None], dim=-1).amin(-1)
    return topk_keep(-worst, n)
