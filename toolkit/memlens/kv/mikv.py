"""MiKV: no token is dropped; the important ones stay precise and the others go down to a few bits.

    important = the newest tokens and, of the others, those with the most attention so far, `r` of all
    b_c = sqrt(max_t |q_tc| / max_t |k_tc|)      K is stored as b·k and meets q / b

The balancer b is computed once, from the prompt, for every kv head and channel: it moves half of an outlier channel's range
into the query, and the product is unchanged. A token that is no longer important is quantised and stays so.

Source: arXiv:2402.18096, sections 3 and 4. No official code is public: the order of demotion and the share of recent tokens
follow the text.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from memlens import check
from memlens.attention.merge import Attended, merge_many
from memlens.kv import storage
from memlens.kv.observe import Observed, attend_alive, merge_observed
from memlens.kv.packed import packed_attend
from memlens.kv.quantize import Packed, affine_quantize, dequantize, join, packed_bytes, take_rows
from memlens.kv.select import complement, topk_keep

if TYPE_CHECKING:
    from memlens.kv.policies import Policy

__all__ = ["Mixed", "MixedState", "channel_balancer", "mikv", "mikv_split", "mixed"]

META = torch.float16
Rows = Tensor | Packed  # tokens as they are, or packed per token


class MixedState(NamedTuple):
    high: tuple[Rows, Rows]  # keys (balanced) and values of the important tokens, oldest first
    low: tuple[Rows, Rows]  # of the others, likewise
    important: Tensor  # (B, Hkv, n) int32: which tokens, counted by age, are in `high`; ascending
    balance: Tensor | None  # (B, Hkv, D) float32; None where nothing is quantised or no balancer is wanted


def mikv_split(score: Tensor, r: float, recent_share: float = 0.5, *, alive: Tensor | None = None) -> Tensor:
    """Which tokens are important, (B, Hkv, n) ascending: n = round(r·L), of them the newest round(n·recent_share).

    Args:
        score: (B, Hkv, L), higher is more important.
        r: share of the tokens, in [0, 1].
        alive: (B, Hkv, L) bool, the tokens that may be chosen; n is no more than every head has of them.
    Raises:
        ValueError: shares outside [0, 1], NaN in the scores.
    """
    check.within("mikv_split", 0.0, 1.0, r=r, recent_share=recent_share)
    count = round(r * score.shape[-1])
    if alive is not None and alive.numel():
        count = min(count, int(alive.sum(-1).min()))
    if count == 0:
        return torch.empty(*score.shape[:-1], 0, dtype=torch.int64, device=score.device)
    return topk_keep(score, count, last=round(count * recent_share), alive=alive)


def channel_balancer(q_peak: Tensor, k: Tensor) -> Tensor:
    """b (B, Hkv, D) = sqrt(max_t |q_tc| / max_t |k_tc|), float32; 1 where a channel of q or k is all zero.

    Args:
        q_peak: (B, Hkv, D), the largest |q| of each channel over the prompt and the query heads of the kv head; or q
            itself, (B, H, L, D).
        k: (B, Hkv, L, D).
    """
    if q_peak.ndim == 4:
        q_peak = storage.query_peak(q_peak, k.shape[1])
    check.shapes("channel_balancer", q_peak=(q_peak, "batch kv_heads dim"), k=(k, "batch kv_heads length dim"))
    most = k.abs().amax(2).float()
    ratio = q_peak.float() / most
    return torch.where((q_peak == 0) | (most == 0), 1.0, ratio).sqrt()


class Mixed(NamedTuple):
    """The format that `mixed` makes."""

    r: float
    hi: int
    lo: int
    group: int | None
    recent_share: float
    balances: bool
    name: str = "mikv"
    in_place: bool = True

    def at(self, layer: int) -> Mixed:
        return self

    def problem(self, policy: Policy) -> str:
        if self.r in (0.0, 1.0) or policy.scores:
            return ""
        return (
            f"mixed precision asks which tokens are important, and {policy.name!r} gives them no score; "
            "use mikv(), or a policy that scores, such as h2o"
        )

    def commit(
        self, held: MixedState | None, k: Tensor, v: Tensor, idx: Tensor | None = None, *, score: Tensor | None = None,
        query_peak: Tensor | None = None,
    ) -> MixedState:  # fmt: skip
        balance = self._balance(k, query_peak) if held is None else held.balance
        if balance is not None:
            k = (k.float() * balance[:, :, None]).to(k.dtype)
        return _settle(self, held, (k, v), idx, score, balance)

    def _balance(self, k: Tensor, peak: Tensor | None) -> Tensor | None:
        if not self.balances:
            return None
        if peak is None:
            check.fail(
                "mikv", "a balancer without queries", "query_peak (B, Hkv, D)", "hand it over, or use balancer=False"
            )
        return channel_balancer(peak, k)

    def count(self, held: MixedState) -> int:
        return sum(_width(side[0]) for side in (held.high, held.low))

    def read(self, held: MixedState, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        k, v = (_merged(*pair, held.important, dtype) for pair in zip(held.high, held.low, strict=True))
        return (k if held.balance is None else (k.float() / held.balance[:, :, None]).to(dtype)), v

    def attend(
        self, q: Tensor, held: MixedState, *, scale: float | None = None, form: str = "auto", tally: bool = False
    ) -> Attended | Observed:
        """Both tiers as they are stored, under one softmax; see `memlens.kv.packed.packed_attend`."""
        if form == "reference":
            return storage.attend_all(self, q, held, scale=scale, form=form, tally=tally)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if held.balance is not None:
            q = (q.float() / held.balance.repeat_interleave(q.shape[1] // held.balance.shape[1], 1)[:, :, None]).to(q.dtype)
        options = {"scale": scale, "form": form, "tally": tally}
        parts = [_attend_tier(q, *side, **options) for side in (held.high, held.low) if _width(side[0])]
        return _by_age(merge_observed(parts), held.important) if tally else merge_many(parts)

    def parts(self, held: MixedState) -> dict[str, list[Tensor]]:
        found = storage.by_part(*held.high, *held.low, indices=(held.important,))
        found.setdefault("scales", []).extend([] if held.balance is None else [held.balance])
        return found

    def size(self, shape: tuple[int, int, int, int], itemsize: int = 4) -> dict[str, int]:
        batch, heads, length, dim = shape
        high = round(self.r * length)
        payload, scales = 0, 4 * batch * heads * dim * self.balances
        for bits, tokens in ((self.hi, high), (self.lo, length - high)):
            shape = (2 * batch, heads, tokens, dim)  # keys and values
            codes, metas = prod(shape) * itemsize, 0
            if bits != 16:
                codes, metas = packed_bytes(shape, bits, axis=-1, group=self.group or dim // 2)
            payload, scales = payload + codes, scales + metas
        return storage.part_bytes(payload=payload, scales=scales, indices=4 * batch * heads * high)


def mixed(
    r: float = 0.2, *, hi: int = 16, lo: int = 2, group: int | None = None, recent_share: float = 0.5, balancer: bool = True
) -> Mixed:
    """Storage in which the `r` most important tokens have `hi` bits and the others `lo`; goes with a policy that scores.

    Args:
        r: share of the tokens held; 0 quantises all to `lo`, 1 keeps all at `hi`.
        hi, lo: 2, 3, 4, 8, or 16 for "as it is".
        group: channels that share a scale and a zero; default half the head dim.
        recent_share: of the important tokens, how many are simply the newest.
        balancer: rescale the channels of keys and queries; computed once, from the prompt.
    Raises:
        ValueError: lo > hi, other bits, shares outside [0, 1].
    """
    for bits in (hi, lo):
        check.one_of("mikv", ("2", "3", "4", "8", "16"), bits=str(bits))
    check.at_least("mikv", lo, f"the others have lo={lo} bits", hi=hi)
    check.within("mikv", 0.0, 1.0, r=r, recent_share=recent_share)
    return Mixed(r, hi, lo, group, recent_share, balancer and lo < 16)


def mikv(
    r: float = 0.2, hi: int = 16, lo: int = 2, *, balancer: bool = True, recent_share: float = 0.5,
    group: int | None = None, prompt: int | None = None,
) -> Policy:  # fmt: skip
    """MiKV: H2O's score says which tokens are important; none is dropped, the others are kept at `lo` bits.

    Args:
        lo: 0 drops them, which is H2O with round(r·prompt) tokens; `prompt` is then needed.
        balancer, recent_share, group: as in `mixed`.
    Raises:
        ValueError: as `mixed`, or lo=0 without `prompt`.
    Source: arXiv:2402.18096.
    """
    from memlens.kv.policies import h2o

    if lo == 0:
        if prompt is None:
            check.fail(
                "mikv", "lo=0 without prompt", "the prompt's tokens, of which r stay", "h2o(heavy, recent) says it too"
            )
        kept = round(r * prompt)
        recent = round(kept * recent_share)
        return h2o(kept - recent, recent)._replace(name="mikv")
    every = h2o(1, 0)._replace(name="mikv", budget=None)
    return every.stored(mixed(r, hi=hi, lo=lo, group=group, recent_share=recent_share, balancer=balancer))


# --- the two tiers -------------------------------------------------------------------------------------------------


def _settle(
    store: Mixed, held: MixedState | None, new: tuple[Tensor, Tensor], idx: Tensor | None, score: Tensor | None, balance
) -> MixedState:
    """New tokens come in as important, the tokens at idx stay, and who is no longer important goes down."""
    (batch, heads, fresh, _), group = new[0].shape, store.group or new[0].shape[-1] // 2
    total = fresh + (0 if held is None else store.count(held))
    is_high = torch.ones(batch, heads, total, dtype=torch.bool, device=new[0].device)
    if held is not None:
        is_high[..., : total - fresh] = False
        is_high.scatter_(-1, held.important.long(), True)
    idx = torch.arange(total, device=is_high.device).expand(batch, heads, -1) if idx is None else idx
    could = is_high.gather(-1, idx)
    chosen = mikv_split(_score(store, score, could), store.r, store.recent_share, alive=could)
    rest = complement(chosen, idx.shape[-1]) if idx.shape[-1] else chosen
    place = torch.where(is_high, is_high.cumsum(-1), (~is_high).cumsum(-1)) - 1  # within the tier that a token is in now
    high, low = [], []
    for side, x in enumerate(new):
        upper = x if held is None else _join(held.high[side], _tier(x, store.hi, group))
        lower = None if held is None else held.low[side]
        high.append(_tier(_rows(upper, place.gather(-1, idx.gather(-1, chosen))), store.hi, group))
        low.append(_lower(upper, lower, place, is_high, idx.gather(-1, rest), store.lo, group))
    return MixedState(tuple(high), tuple(low), chosen.to(torch.int32), balance)


def _score(store: Mixed, score: Tensor | None, could: Tensor) -> Tensor:
    if score is None:
        if store.r not in (0.0, 1.0):
            check.fail("mikv", "no score", "score (B, Hkv, tokens) for the tokens that stay")
        score = torch.zeros(could.shape, device=could.device)
    return score


def _lower(upper: Rows, lower: Rows | None, place: Tensor, is_high: Tensor, at: Tensor, bits: int, group: int) -> Rows:
    """The low tier of the tokens `at`: rows that were low move as they are, the others are quantised now."""
    falls = is_high.gather(-1, at)
    most = int(falls.sum(-1).max()) if falls.numel() else 0
    rank = (
        falls.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :most]
    )  # heads with fewer repeat others
    from_upper = torch.where(falls.gather(-1, rank), place.gather(-1, at.gather(-1, rank)), 0)
    down = _tier(_plain(_rows(upper, from_upper), None), bits, group)
    whole = down if lower is None else _join(lower, down)
    low_count = 0 if lower is None else _width(lower)
    source = torch.where(falls, low_count + falls.cumsum(-1) - 1, place.gather(-1, at))
    return _rows(whole, source)


def _attend_tier(q: Tensor, k: Rows, v: Rows, **options) -> Attended | Observed:
    return (packed_attend if isinstance(k, Packed) else attend_alive)(q, k, v, **options)


def _by_age(found: Observed, important: Tensor) -> Observed:
    """Scores (B, H, tokens) of the important tokens and then the others, put in the order of age."""
    others = complement(important.long(), found.score.shape[-1])
    place = torch.cat((important.long(), others), -1).repeat_interleave(found.score.shape[1] // important.shape[1], 1)
    return found._replace(score=torch.empty_like(found.score).scatter_(-1, place, found.score))


def _tier(x: Rows, bits: int, group: int) -> Rows:
    if bits == 16 or isinstance(x, Packed):
        return x
    return affine_quantize(x, bits, axis=-1, group=group, meta=META)


def _width(x: Rows) -> int:
    return x.shape[-2]


def _rows(x: Rows, at: Tensor) -> Rows:
    return take_rows(x, at) if isinstance(x, Packed) else storage.take(x, at)


def _join(x: Rows, y: Rows) -> Rows:
    return join(x, y) if isinstance(x, Packed) else torch.cat((x, y), -2)


def _plain(x: Rows, dtype: torch.dtype | None) -> Tensor:
    return dequantize(x, dtype or torch.float32) if isinstance(x, Packed) else x if dtype is None else x.to(dtype)


def _merged(high: Rows, low: Rows, important: Tensor, dtype: torch.dtype) -> Tensor:
    """Both tiers by age."""
    both = torch.cat((_plain(high, dtype), _plain(low, dtype)), -2)
    order = torch.cat((important.long(), complement(important.long(), both.shape[-2])), -1)
    return storage.take(both, order.argsort(-1))
