"""The store step: how the tokens that a policy keeps are held between forwards.

    policy = h2o(51, 51).stored(kivi(bits=4))           any selection with any storage

A format is a few parameters; what it holds for one layer is a value, replaced at every step:

    held = store.commit(None, k, v)                     the first tokens
    held = store.commit(held, k, v, idx)                new tokens; of all, those at idx stay
    k, v = store.read(held, dtype)                      (B, Hkv, tokens, D), oldest first
    store.parts(held)                                   every tensor by part: payload, scales, indices, residual

`kivi` and `mixed` (MiKV) are in `memlens.kv.kivi` and `memlens.kv.mikv`, `block_floats` (K-sort) in `memlens.kv.ksort`,
`think` in `memlens.kv.think`, `low_rank` in `memlens.kv.lowrank`; `memlens.kv.retrieval` has formats whose attention fetches a
part of what they hold.

A format may also have `rows` (how many of the prompt's newest queries its first `commit` wants, as `query_rows` beside
`pad`), `waits` (it takes a prompt that comes in parts as a whole) and `retrieve` (its own attention, from the second forward on).
It may be `in_place`: its `attend` copies little of what it holds, and a model decodes through it under every policy whose score
reads no keys, or is made of a row's probabilities, which `attend` then gives too (`tally`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from memlens import check
from memlens.attention.merge import Attended
from memlens.kv.observe import Observed, attend_alive
from memlens.kv.quantize import Packed

if TYPE_CHECKING:
    from memlens.kv.policies import Policy

__all__ = ["Storage", "attend_all", "changed", "gathered", "held_bytes", "part_bytes", "plain", "query_peak", "tensors"]

PARTS = ("payload", "scales", "indices", "residual", "slow")  # slow: what may lie in slow memory


class Storage(Protocol):
    """What a format can do. States are immutable; `held` is None before the first tokens."""

    name: str
    balances: bool  # whether `commit` wants the largest |query| of the prompt, (B, Hkv, D)

    def at(self, layer: int) -> Storage:
        """The format for one layer; most are the same for all."""
        ...

    def problem(self, policy: Policy) -> str:
        """Why it cannot hold what this policy keeps; empty where it can."""
        ...

    def commit(
        self, held: Any, k: Tensor, v: Tensor, idx: Tensor | None = None, *, score: Tensor | None = None,
        query_peak: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """The state once k, v (B, Hkv, n, D) came and only idx (B, Hkv, b), ascending among all tokens, stayed.

        `score` (B, Hkv, b) is the policy's, for the tokens that stay.
        """
        ...

    def count(self, held: Any) -> int:
        """Tokens held by every kv head."""
        ...

    def read(self, held: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of every token, oldest first."""
        ...

    def attend(self, q: Tensor, held: Any, *, scale: float | None = None, form: str = "auto") -> Attended:
        """Attention of q (B, H, n, D) to every token held, all of them in the past."""
        ...

    def parts(self, held: Any) -> dict[str, list[Tensor]]:
        """The tensors that are held, by part."""
        ...

    def size(self, shape: tuple[int, int, int, int], itemsize: int = 4) -> dict[str, int]:
        """Bytes by part once L tokens (B, Hkv, L, D) were committed and none was evicted."""
        ...


class Pair(NamedTuple):
    k: Tensor  # (B, Hkv, tokens, D)
    v: Tensor  # (B, Hkv, tokens, Dv)


class Plain(NamedTuple):
    """The format that `plain` makes."""

    name: str = "plain"
    balances: bool = False

    def at(self, layer: int) -> Plain:
        return self

    def problem(self, policy: Policy) -> str:
        return ""

    def commit(self, held: Pair | None, k: Tensor, v: Tensor, idx: Tensor | None = None, **seen: Any) -> Pair:
        return Pair(*pick(*(append(held, k, v)), idx))

    def count(self, held: Pair) -> int:
        return held.k.shape[2]

    def read(self, held: Pair, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return held.k.to(dtype), held.v.to(dtype)

    def attend(self, q: Tensor, held: Pair, *, scale: float | None = None, form: str = "auto") -> Attended:
        return attend_all(self, q, held, scale=scale, form=form)

    def parts(self, held: Pair) -> dict[str, list[Tensor]]:
        return {"payload": [held.k, held.v]}

    def size(self, shape: tuple[int, int, int, int], itemsize: int = 4) -> dict[str, int]:
        batch, heads, length, dim = shape
        return {"payload": 2 * batch * heads * length * dim * itemsize}


def plain() -> Plain:
    """Keys and values as they are, in the model's dtype."""
    return Plain()


# --- steps that the formats share ----------------------------------------------------------------------------------


def append(held: Pair | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values of a pair with new ones behind them."""
    return (k, v) if held is None else (torch.cat((held.k, k), 2), torch.cat((held.v, v), 2))


def pick(k: Tensor, v: Tensor, idx: Tensor | None) -> tuple[Tensor, Tensor]:
    """k and v at idx as memory of their own; all of them where idx is None."""
    return tuple(own(x) if idx is None else take(x, idx) for x in (k, v))


def take(x: Tensor, idx: Tensor) -> Tensor:
    """Rows idx (B, Hkv, n) of x (B, Hkv, L, D)."""
    return x.gather(2, idx.long()[..., None].expand(*idx.shape, x.shape[-1]))


def own(x: Tensor) -> Tensor:
    """x, copied where it is a slice that would keep a larger tensor alive."""
    return x if x.untyped_storage().nbytes() == x.numel() * x.element_size() else x.clone()


def query_peak(q: Tensor, kv_heads: int) -> Tensor:
    """The largest |q| (B, H, L, D) of each channel over the rows and the query heads of each kv head, (B, Hkv, D)."""
    check.divides("query_peak", kv_heads=kv_heads, heads=q.shape[1])
    return q.abs().amax(2).unflatten(1, (kv_heads, -1)).amax(2)


def attend_all(
    store: Storage, q: Tensor, held: Any, *, scale: float | None, form: str = "auto", tally: bool = False
) -> Attended | Observed:
    """`Storage.attend` by way of `read`: one layer's keys and values are dequantised for as long as the call lasts."""
    return attend_alive(q, *store.read(held, q.dtype), scale=scale, form=form, tally=tally)


def by_part(*values: Tensor | Packed | None, **others: Iterable[Tensor | None]) -> dict[str, list[Tensor]]:
    """Packed values give payload and scales, tensors payload; `others` are parts by name."""
    found: dict[str, list[Tensor]] = {"payload": [], "scales": []}
    for value in values:
        if isinstance(value, Packed):
            found["payload"].append(value.codes)
            found["scales"] += [value.scale, value.zero]
        elif value is not None:
            found["payload"].append(value)
    for part, tensors_of in others.items():
        found.setdefault(part, []).extend(x for x in tensors_of if x is not None)
    return {part: found[part] for part in PARTS if found.get(part)}


def gathered(layers: Iterable[dict[str, list[Tensor]]]) -> dict[str, list[Tensor]]:
    """The tensors of all layers, by part."""
    found: dict[str, list[Tensor]] = {"payload": []}
    for parts in layers:
        for part, held in parts.items():
            found.setdefault(part, []).extend(held)
    return found


def held_bytes(parts: dict[str, list[Tensor]]) -> dict[str, int]:
    """Bytes of the storages behind the tensors, by part."""
    return {part: sum(x.untyped_storage().nbytes() for x in held) for part, held in parts.items()}


def part_bytes(**sizes: int) -> dict[str, int]:
    """Bytes by part, in the usual order, parts of nothing left out."""
    return {part: int(sizes[part]) for part in PARTS if sizes.get(part)}


def tensors(state: Any) -> Iterator[Tensor]:
    """Every tensor in a state."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, tuple):
        for entry in state:
            yield from tensors(entry)


def changed(state: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """The state with `fn` applied to every tensor, e.g. to repeat the rows of its batch."""
    if isinstance(state, Tensor):
        return fn(state)
    if isinstance(state, Packed):
        parts = [fn(x) for x in state[:3]]
        lead = parts[0].shape[:-2]
        return Packed(*parts, *state[3:6], (*lead, *state.shape[-2:]))
    if isinstance(state, tuple):
        made = [changed(entry, fn) for entry in state]
        return type(state)(*made) if hasattr(state, "_fields") else tuple(made)
    return state
