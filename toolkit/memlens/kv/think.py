"""ThinK as the storage of a cache: once the prompt is over, its older keys lose the channels that its last queries use least.

    policy = snapkv(128).stored(think(0.4, tail=32))
    policy = full().stored(think(0.4, tail=32, inner=kivi(4, group=32, residual=32)))     what is left, in 4 bits

The newest `tail` tokens of the prompt and all later ones keep every channel. Source: arXiv:2407.21018. Eviction while
decoding is ours: heads that lose more full tokens than others get their newest pruned ones in their place, zero in the
dropped channels, which changes no score.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from memlens import check
from memlens.attention.exact import attend
from memlens.attention.merge import Attended, merge_many
from memlens.kv import storage
from memlens.kv.channels import at_channels, channel_energy, keep_channels, kept_channels, query_energy, widen
from memlens.kv.kivi import Kivi
from memlens.kv.storage import Pair, Plain, Storage, plain

if TYPE_CHECKING:
    from memlens.kv.policies import Policy

__all__ = ["Think", "ThinkState", "think"]

SCORES = ("query", "key", "random")


class ThinkState(NamedTuple):
    small: Any  # older tokens with some channels, as the inner format holds them; None where there are none
    keep: tuple[Tensor | None, Tensor | None]  # channels of their keys and values, (B, Hkv, n) int16; None: all
    tail: Pair  # newer tokens, whole


class Think(NamedTuple):
    """The format that `think` makes."""

    lam: float
    tail: int
    values: float
    inner: Storage
    by: str
    generator: torch.Generator | None
    rows: int
    name: str = "think"
    balances: bool = False
    waits: bool = True

    def at(self, layer: int) -> Think:
        return self

    def problem(self, policy: Policy) -> str:
        return ""

    def commit(
        self, held: ThinkState | None, k: Tensor, v: Tensor, idx: Tensor | None = None, *, query_rows: Tensor | None = None,
        pad: Tensor | None = None, **seen: Any,
    ) -> ThinkState:  # fmt: skip
        if held is None:
            return self._prune(k, v, idx, query_rows, pad)
        tail = Pair(*storage.append(held.tail, k, v))
        if idx is None:
            return held._replace(tail=Pair(*(storage.own(x) for x in tail)))
        return self._drop(held._replace(tail=tail), idx)

    def _prune(self, k: Tensor, v: Tensor, idx: Tensor | None, rows: Tensor | None, pad: Tensor | None) -> ThinkState:
        """The prompt: tokens at idx stay, the newest whole; padding has no say in the choice of channels."""
        place = torch.arange(k.shape[2], device=k.device).expand(k.shape[:3]) if idx is None else idx
        k, v = storage.pick(k, v, idx)
        cut = max(0, k.shape[2] - self.tail)
        tail = Pair(*(storage.own(x[:, :, cut:]) for x in (k, v)))
        if cut == 0:
            return ThinkState(None, (None, None), tail)
        alive = None if pad is None else (place >= pad[:, None, None])[..., None]
        keep = tuple(
            None if lam == 0 else keep_channels(score, kept_channels(x.shape[-1], lam)).to(torch.int16)
            for x, lam, score in ((k, self.lam, self._score(k, rows, alive)), (v, self.values, _energy(v, alive)))
        )
        old = (x[:, :, :cut] if which is None else at_channels(x[:, :, :cut], which) for x, which in zip((k, v), keep))
        return ThinkState(self.inner.commit(None, *old), keep, tail)

    def _score(self, k: Tensor, rows: Tensor | None, alive: Tensor | None) -> Tensor:
        if self.by == "random":
            return torch.rand(*k.shape[:2], k.shape[-1], generator=self.generator)
        if self.by == "key":
            return _energy(k, alive)
        if rows is None:
            fix = "hand over query_rows (B, H, n, D), or use by='key'"
            check.fail("think", "a choice of channels without queries", "the newest queries of the prompt", fix)
        return query_energy(rows, k.shape[1]) * _energy(k, alive)

    def _drop(self, held: ThinkState, idx: Tensor) -> ThinkState:
        """Only the tokens at idx stay. The oldest that are pruned in every head stay so, the others are whole."""
        count = self.count(held) - held.tail.k.shape[2]
        stay = int((idx < count).sum(-1).min())
        if stay == count:
            return held._replace(tail=Pair(*(storage.take(x, idx[..., count:] - count) for x in held.tail)))
        whole = (storage.take(x, idx[..., stay:]) for x in self.read(held, held.tail.k.dtype))
        k, v = (x[:, :, :0] for x in self.inner.read(held.small, held.tail.k.dtype))
        small = self.inner.commit(held.small, k, v, idx[..., :stay]) if stay else None
        return ThinkState(small, held.keep if stay else (None, None), Pair(*whole))

    def count(self, held: ThinkState) -> int:
        return held.tail.k.shape[2] + (0 if held.small is None else self.inner.count(held.small))

    def read(self, held: ThinkState, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Every token at full width, zero in the channels that were dropped."""
        tail = tuple(x.to(dtype) for x in held.tail)
        if held.small is None:
            return tail
        old = self.inner.read(held.small, dtype)
        sides = zip(old, held.keep, tail, strict=True)
        return tuple(torch.cat((x if keep is None else widen(x, keep, new.shape[-1]), new), 2) for x, keep, new in sides)

    def attend(self, q: Tensor, held: ThinkState, *, scale: float | None = None, form: str = "auto") -> Attended:
        """Both parts as they are stored, under one softmax; the query is narrowed, no key is widened."""
        if form == "reference":
            return storage.attend_all(self, q, held, scale=scale, form=form)
        scale, (of_keys, of_values) = q.shape[-1] ** -0.5 if scale is None else scale, held.keep
        new = attend(q, *(x.to(q.dtype) for x in held.tail), causal=False, scale=scale, return_lse=True, form=form)
        if held.small is None:
            return new
        narrow = q if of_keys is None else at_channels(q, of_keys)
        out, lse = self.inner.attend(narrow, held.small, scale=scale, form=form)
        out = out if of_values is None else widen(out, of_values, new.out.shape[-1])
        return merge_many([(out, lse), new])

    def parts(self, held: ThinkState) -> dict[str, list[Tensor]]:
        small = {} if held.small is None else self.inner.parts(held.small)
        own = storage.by_part(*held.tail, indices=held.keep)
        return storage.gathered((small, own))

    def size(self, shape: tuple[int, int, int, int], itemsize: int = 4) -> dict[str, int]:
        batch, heads, length, dim = shape
        old = max(0, length - self.tail)
        found = {"payload": 2 * batch * heads * (length - old) * dim * itemsize}
        if not old:
            return storage.part_bytes(**found)
        widths = [kept_channels(dim, lam) for lam in (self.lam, self.values)]
        for inner, width, lam in zip(self._sides(), widths, (self.lam, self.values), strict=True):
            for part, size in inner.size((batch, heads, old, width), itemsize).items():
                found[part] = found.get(part, 0) + size // 2  # of keys and values alike
            found["indices"] = found.get("indices", 0) + (2 * batch * heads * width if lam else 0)
        return storage.part_bytes(**found)

    def _sides(self) -> tuple[Storage, Storage]:
        """Formats that treat both sides as the inner one treats keys, and values."""
        inner = self.inner
        return (
            (inner._replace(values=inner.keys), inner._replace(keys=inner.values))
            if isinstance(inner, Kivi)
            else (inner,) * 2
        )


def think(
    lam: float = 0.4, *, tail: int = 32, values: float = 0.0, inner: Storage | None = None, by: str = "query",
    generator: torch.Generator | None = None, rows: int = 32,
) -> Think:  # fmt: skip
    """Storage in which the prompt's older keys keep (1 - lam) of their channels, chosen once for each kv head.

    A prompt that comes in parts is stored once it is whole; of tokens streamed without a prompt only the first forward
    counts as one.

    Args:
        lam: share of the key channels that are dropped, rounded down; 0 drops none.
        tail: newest tokens of the prompt that stay whole, like all that come later.
        values: share of the value channels that are dropped, by their own energy.
        inner: how the narrow tokens are held: `plain()` (default) or a `kivi` format.
        by: what ranks key channels: "query" (query energy times key energy), or for comparison "key" or "random".
        generator: of the random choice.
        rows: newest queries of the prompt that count.
    Raises:
        ValueError: shares outside [0, 1), a negative tail, an inner format that needs whole heads, "random" without a
            generator.
    Source: arXiv:2407.21018.
    """
    for share in (lam, values):
        kept_channels(64, share)
    check.at_least("think", 0, tail=tail)
    check.at_least("think", 1, rows=rows)
    check.one_of("think", SCORES, by=by)
    if (by == "random") != (generator is not None):
        check.fail("think", f"by={by!r}, generator={generator}", "a generator for by='random', and only for it")
    inner = plain() if inner is None else inner
    if not isinstance(inner, Plain | Kivi):
        why = f"{inner.name} wants whole heads, scores or queries of its own, and a narrow head has other channels"
        check.fail("think", f"inner={inner.name!r}", "plain() or kivi(...)", why)
    return Think(lam, tail, values, inner, by, generator, rows if by == "query" else 0)


def _energy(x: Tensor, alive: Tensor | None) -> Tensor:
    return channel_energy(x if alive is None else x * alive)
