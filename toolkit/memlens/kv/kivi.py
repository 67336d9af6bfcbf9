"""KIVI: keys quantised per channel, values per token, and the newest tokens kept as they are.

A few channels of the keys are large for every token, so a scale for each channel serves them; values have no such channels,
and a scale for each token keeps one token's error out of the others. Keys wait in the residual until `residual` of them can
be grouped; values leave it one by one.

    state = kivi_prefill(k, v, bits=2, group=32, residual=128)
    state = kivi_append(state, k, v)
    out, lse = kivi_attend(q, state)

Source: arXiv:2402.02750, sections 3 and 4, and the order of operations in its code. Eviction is ours: a token that leaves a
group of keys leaves a hole; when the residual is full, or there are as many holes, what is left of the broken groups is
grouped and rounded once more. Whole groups keep their codes, and values are never rounded twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from memlens import check
from memlens.attention.merge import Attended
from memlens.kv import storage
from memlens.kv.observe import Observed
from memlens.kv.packed import packed_attend
from memlens.kv.quantize import Packed, affine_quantize, dequantize, join, packed_bytes, read_at, take_rows
from memlens.quant.core import container

if TYPE_CHECKING:
    from memlens.kv.policies import Policy

__all__ = ["Kivi", "KiviState", "Side", "kivi", "kivi_append", "kivi_attend", "kivi_prefill", "kivi_read"]

META = torch.float16


class Side(NamedTuple):
    """Keys or values: packed tokens, then a tail of plain ones. Tokens are counted oldest first."""

    packed: Packed | None
    tail: Tensor  # (B, Hkv, T, D)
    slots: Tensor | None  # (B, Hkv, tokens): where token i lies in [packed, tail]; None: at i, and there are no holes


class Rule(NamedTuple):
    bits: int  # 16 packs nothing
    axis: int
    group: int
    residual: int


class KiviState(NamedTuple):
    k: Side
    v: Side
    rules: tuple[Rule, Rule]


class Kivi(NamedTuple):
    """The format that `kivi` makes."""

    keys: Rule
    values: Rule
    name: str = "kivi"
    in_place: bool = True
    balances: bool = False

    def at(self, layer: int) -> Kivi:
        return self

    def problem(self, policy: Policy) -> str:
        return ""

    def commit(self, held: KiviState | None, k: Tensor, v: Tensor, idx: Tensor | None = None, **seen: Any) -> KiviState:
        rules = (self.keys, self.values)
        if held is None:
            k, v = storage.pick(k, v, idx)
            return KiviState(*(_pack(x, rule) for x, rule in zip((k, v), rules, strict=True)), rules)
        sides = (_grow(side, x, idx, rule) for side, x, rule in zip(held[:2], (k, v), rules, strict=True))
        return KiviState(*sides, rules)

    def count(self, held: KiviState) -> int:
        return _tokens(held.k)

    def read(self, held: KiviState, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return _read(held.k, dtype), _read(held.v, dtype)

    def attend(
        self, q: Tensor, held: KiviState, *, scale: float | None = None, form: str = "auto", tally: bool = False
    ) -> Attended | Observed:
        return kivi_attend(q, held, scale=scale, form=form, tally=tally)

    def parts(self, held: KiviState) -> dict[str, list[Tensor]]:
        k, v = held.k, held.v
        return storage.by_part(k.packed, v.packed, indices=(k.slots, v.slots), residual=(k.tail, v.tail))

    def size(self, shape: tuple[int, int, int, int], itemsize: int = 4) -> dict[str, int]:
        batch, heads, length, dim = shape
        payload = scales = residual = 0
        for rule in (self.keys, self.values):
            cut = _packed_tokens(length, rule)
            residual += batch * heads * (length - cut) * dim * itemsize
            if cut:
                codes, metas = packed_bytes((batch, heads, cut, dim), rule.bits, axis=rule.axis, group=rule.group)
                payload, scales = payload + codes, scales + metas
        return storage.part_bytes(payload=payload, scales=scales, residual=residual)


def kivi(
    bits: int | tuple[int, int] = 2, *, group: int = 32, residual: int = 128, axes: tuple[int, int] = (-2, -1)
) -> Kivi:
    """Storage in which keys are quantised per channel, values per token, and `residual` tokens wait unquantised.

    Args:
        bits: 1, 2, 3, 4, 8, or 16 for "as it is"; one number, or one for keys and one for values.
        group: tokens (keys) or channels (values) that share a scale and a zero, float16 each.
        residual: a multiple of `group`. Keys leave it `residual` at a time, values one at a time.
        axes: -2 (per channel) or -1 (per token) for keys and values; anything but (-2, -1) is for comparison.
    Raises:
        ValueError: other bits or axes, a residual that is no multiple of group or does not fill 32-bit words.
    Source: arXiv:2402.02750.
    """
    pair = (bits, bits) if isinstance(bits, int) else tuple(bits)
    check.at_least("kivi", 1, group=group, residual=residual)
    check.divides("kivi", group=group, residual=residual)
    for size, axis in zip(pair, axes, strict=True):
        check.one_of("kivi", ("1", "2", "3", "4", "8", "16"), bits=str(size))
        check.one_of("kivi", ("-2", "-1"), axis=str(axis))
        if axis == -2 and size != 16:
            check.divides("kivi", codes_in_a_word=32 // container(size), residual=residual)
    return Kivi(*(Rule(size, axis, group, residual) for size, axis in zip(pair, axes, strict=True)))


def kivi_prefill(k: Tensor, v: Tensor, bits: int = 2, group: int = 32, residual: int = 128) -> KiviState:
    """The state after a prompt with keys k and values v, (B, Hkv, L, D). The prompt's own attention is in full precision.

    Keys: the last L mod residual stay as they are. Values: the last `residual` do.

    Raises:
        ValueError: as `kivi`, or a head dim that `group` does not divide.
    """
    return kivi(bits, group=group, residual=residual).commit(None, k, v)


def kivi_append(state: KiviState, k: Tensor, v: Tensor) -> KiviState:
    """The state after n more tokens, (B, Hkv, n, D)."""
    return Kivi(*state.rules).commit(state, k, v)


def kivi_read(state: KiviState, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Keys and values of every token, (B, Hkv, tokens, D), oldest first."""
    return Kivi(*state.rules).read(state, dtype)


def kivi_attend(
    q: Tensor, state: KiviState, *, scale: float | None = None, form: str = "auto", tally: bool = False
) -> Attended | Observed:
    """Attention of q (B, H, n, D) to every token of the state: (out, lse), see `memlens.attention.attend`.

    Tokens whose keys and values are both packed are attended to as they are; the newest, whose values are plain, have
    their keys dequantised: at most `residual` tokens.

    Args:
        form: "reference" reads everything and attends once; "torch" dequantises a block of tokens at a time; "triton"
            dequantises in registers.
        tally: for a single row, say too what each token got, as `memlens.kv.packed.packed_attend` does.
    Raises:
        ValueError: head counts or dims that disagree, or a grouping that the kernel does not take with form="triton".
    """
    k, v = state.k, state.v
    if k.packed is None or v.packed is None or state.rules[1].axis != -1 or form == "reference":
        return storage.attend_all(Kivi(*state.rules), q, state, scale=scale, form=form, tally=tally)
    both, rank = v.packed.shape[2], _rank(k)
    if rank is None and both > k.packed.shape[2]:
        both = k.packed.shape[2]
    newest = torch.arange(both, _tokens(k), device=q.device).expand(*k.tail.shape[:2], -1)
    values = v.tail if newest.shape[-1] == v.tail.shape[2] else _read_at(v, newest, q.dtype)
    return packed_attend(
        q, k.packed, v.packed, tokens=both, rank=rank, rest=(_read_at(k, newest, q.dtype), values.to(q.dtype)), scale=scale,
        form=form, tally=tally,
    )  # fmt: skip


# --- one side ------------------------------------------------------------------------------------------------------


def _packed_tokens(length: int, rule: Rule) -> int:
    """How many of `length` tokens are packed when none was evicted."""
    if rule.bits == 16:
        return 0
    return length - length % rule.residual if rule.axis == -2 else max(0, length - rule.residual)


def _quantized(x: Tensor, rule: Rule) -> Packed | None:
    return affine_quantize(x, rule.bits, axis=rule.axis, group=rule.group, meta=META) if x.shape[2] else None


def _pack(x: Tensor, rule: Rule) -> Side:
    cut = _packed_tokens(x.shape[2], rule)
    return Side(_quantized(x[:, :, :cut], rule), storage.own(x[:, :, cut:]), None)


def _tokens(side: Side) -> int:
    return _capacity(side) if side.slots is None else side.slots.shape[-1]


def _capacity(side: Side) -> int:
    return (side.packed.shape[2] if side.packed else 0) + side.tail.shape[2]


def _read(side: Side, dtype: torch.dtype) -> Tensor:
    whole = side.tail.to(dtype)
    if side.packed is not None:
        whole = torch.cat((dequantize(side.packed, dtype), whole), 2)
    return whole if side.slots is None else storage.take(whole, side.slots)


def _read_at(side: Side, idx: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of tokens idx (B, Hkv, n) alone."""
    place = idx if side.slots is None else side.slots.gather(-1, idx).long()
    count = side.packed.shape[2] if side.packed else 0
    out = torch.empty(*idx.shape, side.tail.shape[-1], dtype=dtype, device=idx.device)
    if count:
        out = read_at(side.packed, place.clamp(max=count - 1), dtype)
    if side.tail.shape[2]:
        plain = storage.take(side.tail, (place - count).clamp(min=0)).to(dtype)
        out = torch.where((place < count)[..., None], out, plain)
    return out


def _grow(side: Side, x: Tensor, idx: Tensor | None, rule: Rule) -> Side:
    """New tokens at the end of the tail, the others dropped, and what is due packed."""
    capacity, new = _capacity(side), x.shape[2]
    slots = side.slots
    if slots is not None:
        fresh = torch.arange(capacity, capacity + new, device=x.device).to(slots.dtype)
        slots = torch.cat((slots, fresh.expand(*slots.shape[:2], -1)), -1)
    side = Side(side.packed, torch.cat((side.tail, x), 2), slots)
    if rule.axis == -1:
        return _settle_rows(side, idx, rule)
    return _flush_columns(side if idx is None else _drop_columns(side, idx), rule)


def _settle_rows(side: Side, idx: Tensor | None, rule: Rule) -> Side:
    """Per-token packing: all but the newest `residual` of idx are packed, and what is packed moves as it is.

    A head that lost tokens of the tail gets its newest packed ones back into it.
    """
    count, held = side.packed.shape[2] if side.packed else 0, _capacity(side) if idx is None else idx.shape[-1]
    cut = 0 if rule.bits == 16 else max(0, held - rule.residual)
    if cut == 0 and idx is None:
        return side
    due = (cut if idx is None else int(idx[..., :cut].max()) + 1 if cut else 0) - count
    packed = join(side.packed, _quantized(side.tail[:, :, :due], rule)) if due > 0 else side.packed
    if idx is None:
        return Side(packed, storage.own(side.tail[:, :, max(0, due) :]), None)
    return Side(take_rows(packed, idx[..., :cut]) if cut else None, _read_at(side, idx[..., cut:], side.tail.dtype), None)


def _drop_columns(side: Side, idx: Tensor) -> Side:
    """Per-channel packing: the tokens stay where they are and `slots` says which are left."""
    count = side.packed.shape[2] if side.packed else 0
    slots = idx if side.slots is None else side.slots.long().gather(-1, idx)
    untouched = side.slots is None and idx.shape[-1] >= count
    if untouched and bool((slots[..., :count] == torch.arange(count, device=idx.device)).all()):
        return Side(side.packed, storage.take(side.tail, slots[..., count:] - count), None)
    small = torch.int16 if _capacity(side) < 2**15 else torch.int32
    return side._replace(slots=slots.to(small))


def _flush_columns(side: Side, rule: Rule) -> Side:
    if rule.bits == 16 or (side.slots is None and side.tail.shape[2] < rule.residual):
        return side
    if side.slots is None:
        cut = side.tail.shape[2] - side.tail.shape[2] % rule.residual
        packed = join(side.packed, _quantized(side.tail[:, :, :cut], rule))
        return Side(packed, storage.own(side.tail[:, :, cut:]), None)
    if side.tail.shape[2] < rule.residual and _capacity(side) - _tokens(side) < rule.residual:
        return side
    return _regroup(side, rule)


def _regroup(side: Side, rule: Rule) -> Side:
    """No holes any more: whole groups first, then the rest by age; the newest tokens make the tail."""
    slots, count, held = side.slots.long(), side.packed.shape[2] if side.packed else 0, _tokens(side)
    packable = torch.arange(held, device=slots.device) < _packed_tokens(held, rule)
    stays = packable & (slots < count)
    alive = torch.zeros(*slots.shape[:2], -(-_capacity(side) // rule.group), dtype=torch.int64, device=slots.device)
    alive = alive.scatter_add(-1, slots // rule.group, stays.long())
    whole = stays & (alive.gather(-1, slots // rule.group) == rule.group)
    order = torch.where(whole, 0, torch.where(packable, 1, 2)).sort(dim=-1, stable=True).indices
    packed, tail, _ = _pack(storage.take(_read(side, side.tail.dtype), order), rule)
    if bool((order.diff(dim=-1) > 0).all()):
        return Side(packed, tail, None)
    return Side(packed, tail, order.argsort(-1).to(side.slots.dtype))


def _rank(side: Side) -> Tensor | None:
    """Which token lies in each packed slot, (B, Hkv, slots) int32, -1 for a hole; None: slot i holds token i."""
    if side.slots is None:
        return None
    held = side.slots.long()
    rank = torch.full((*held.shape[:2], _capacity(side)), -1, dtype=torch.int32, device=held.device)
    age = torch.arange(held.shape[-1], dtype=torch.int32, device=held.device).expand_as(held)
    return rank.scatter(-1, held, age)[..., : side.packed.shape[2]]
