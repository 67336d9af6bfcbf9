"""Caches of experts: hit rates for every capacity at once, and a step-by-step simulator of one cache.

All policies share one engine. Every item has an integer priority that depends on the requests alone, not on the
capacity; the victim is the cached item with the smallest. So the cache of capacity C is a prefix of one stack, and a
pass over the requests gives the hits of all capacities (stack simulation, Mattson et al. 1970).

A token's r requests are first all looked up in the cache as it was before the token, then served one by one in router
order; a miss evicts the smallest priority, where only the item being loaded is exempt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memlens import backend, check
from memlens.routing.trace import check_requests

__all__ = ["POLICIES", "CacheLog", "hit_curve", "simulate"]

POLICIES = ("lru", "lfu", "belady", "segment", "fixed")
SEMANTICS = ("token", "request")


class CacheLog(NamedTuple):
    hits: Tensor  # (batch, T, r) bool
    loads: Tensor  # (batch, T) int64, items brought in while token t was served, prefetches included
    evictions: Tensor  # (batch, T) int64
    bytes: Tensor  # (batch, T) int64, loads times item_bytes


class _Priority:
    """Priorities (batch, item) of one policy as the requests go by; larger stays."""

    def __init__(self, requests: Tensor, num_items: int, policy: str, future: int | None):
        batch, self.length, self.width = requests.shape
        self.requests, self.policy, self.future = requests, policy, future
        self.span = self.length * self.width + 1  # above every time stamp
        self.count = requests.new_zeros(batch, num_items)
        self.last = requests.new_zeros(batch, num_items)
        if policy == "belady":
            self.next = _next_use(requests.flatten(1), num_items)
        if policy == "segment":
            for token in range(future):
                self._count(requests[:, token], +1)

    def _count(self, items: Tensor, step: int) -> None:
        self.count.scatter_add_(1, items, torch.full_like(items, step))

    def values(self) -> Tensor:
        """(batch, item): the policy's count first, then the time of last use."""
        return self.last if self.policy == "lru" else self.count * self.span + self.last

    def serve(self, time: int, items: Tensor) -> None:
        """Note that `items` (batch, 1) are served at position `time` of the flat request order."""
        self.last.scatter_(1, items, time + 1)
        if self.policy == "belady":
            self.count.scatter_(1, items, -self.next[:, time : time + 1])
        elif self.policy == "lfu":
            self._count(items, +1)
        elif self.policy == "segment":
            self._count(items, -1)

    def end_token(self, token: int) -> None:
        """Let the token that now enters the window be counted."""
        if self.policy == "segment" and token + self.future < self.length:
            self._count(self.requests[:, token + self.future], +1)


def _next_use(flat: Tensor, num_items: int) -> Tensor:
    """(batch, time): position of the next request of the same item, or the length where there is none."""
    batch, length = flat.shape
    upcoming = flat.new_full((batch, num_items), length)
    out = torch.empty_like(flat)
    for time in range(length - 1, -1, -1):
        items = flat[:, time : time + 1]
        out[:, time : time + 1] = upcoming.gather(1, items)
        upcoming.scatter_(1, items, time)
    return out


def _check(op: str, requests: Tensor, num_items: int, policy: str, future: int | None) -> dict[str, int]:
    check.one_of(op, POLICIES, policy=policy)
    sizes = check_requests(op, requests, num_items)
    if (future is None) == (policy == "segment"):
        check.fail(op, f"policy={policy!r} with future={future}", "future=m tokens for 'segment', and for no other")
    if future is not None:
        check.within(op, 1, sizes["T"], future=future)
    return sizes


def hit_curve(
    requests: Tensor, num_items: int, policy: str, *, future: int | None = None, free_fill: bool = True, form: str = "auto"
) -> Tensor:
    """Hit rate of caches with 1..num_items slots, (batch, num_items) float64: hits / (T r).

    Policies (what is kept longest): `lru` the last used; `lfu` the most often used so far, then the last used; `belady`
    the one needed soonest (clairvoyant); `segment` the most often needed in the next `future` tokens, this one
    included and what it was already served not, then the last used; `fixed` the items requested most over the whole
    sample, which lie there from the start and never change.

    Args:
        requests: (batch, T, r) integer item ids, the r of a token in the order they are loaded, all different.
        num_items: ids are 0..num_items-1.
        future: the window of `segment`, in tokens.
        free_fill: the cache starts with the first distinct items, so a first touch while it has room is a hit.
        form: "reference" (the simulator, one capacity and sample at a time) or "torch" (all at once).
    Raises:
        ValueError: an unknown policy, a missing or needless `future`, ids out of range or twice in one token.
    Source: arXiv:2505.16056, section 3.3; the stack order of ljcleo/moe-lrc.
    """
    sizes = _check("hit_curve", requests, num_items, policy, future)
    requests = requests.long()
    if backend.choose("hit_curve", form, requests, kernel=False) == "reference":
        logs = [
            simulate(requests, num_items, c, policy, future=future, free_fill=free_fill) for c in range(1, num_items + 1)
        ]
        return torch.stack([log.hits.double().mean((1, 2)) for log in logs], 1)
    if policy == "fixed":
        counts = _counts(requests, num_items).sort(1, descending=True).values
        return counts.cumsum(1).double() / (sizes["T"] * sizes["r"])
    return _stack_curve(requests, _Priority(requests, num_items, policy, future), free_fill)


def _counts(requests: Tensor, num_items: int) -> Tensor:
    flat = requests.flatten(1)
    return flat.new_zeros(len(flat), num_items).scatter_add_(1, flat, torch.ones_like(flat))


def _stack_curve(requests: Tensor, priority: _Priority, free_fill: bool) -> Tensor:
    """Hits of all capacities from one stack a sample: an item at depth d (0 on top) lies in every cache larger than d.

    The stack holds all items from the start; one never requested is below all others and marked unseen.
    """
    batch, length, width = requests.shape
    items = priority.count.shape[1]
    stack = torch.arange(items, device=requests.device).expand(batch, items)
    unseen = torch.ones_like(stack, dtype=torch.bool)
    hits = requests.new_zeros(batch, items + 1)  # by depth; the last column takes the misses of all
    for token in range(length):
        served = requests[:, token]
        first = unseen.gather(1, served)
        depth = stack.argsort(1).gather(1, served)
        filled = (~unseen).sum(1, keepdim=True) + first.cumsum(1) - 1
        depth = torch.where(first, filled if free_fill else items, depth)
        hits.scatter_add_(1, depth, torch.ones_like(depth))
        for choice in range(width):
            item = served[:, choice : choice + 1]
            stack = _push(stack, item, priority.values().masked_fill(unseen, -(2**62)))
            unseen.scatter_(1, item, False)
            priority.serve(token * width + choice, item)
        priority.end_token(token)
    return hits[:, :-1].cumsum(1).double() / (length * width)


def _push(stack: Tensor, item: Tensor, value: Tensor) -> Tensor:
    """The stack (batch, item) after `item` (batch, 1) was loaded on top and each capacity evicted its victim.

    The victim of capacity c is the smallest value among the first c: a running minimum. Down to the item's old place, a
    position keeps what it held unless that is the new victim, in which case the victim so far moves in.
    """
    low = value.gather(1, stack).cummin(1)
    place = torch.arange(stack.shape[1], device=stack.device)
    before = low.indices.roll(1, 1)  # place of the victim among the positions above
    stays = (low.indices != place) & (place > 0)
    depth = (stack == item).int().argmax(1, keepdim=True)
    moved = torch.where(stays & (place < depth), stack, stack.gather(1, before))
    return torch.where(place == 0, item, torch.where(place > depth, stack, moved))


def simulate(
    requests: Tensor, num_items: int, capacity: int, policy: str, *, future: int | None = None, semantics: str = "token",
    free_fill: bool = True, prefetch: Tensor | None = None, pinned: Sequence[int] = (), item_bytes: int = 1,
) -> CacheLog:  # fmt: skip
    """One cache of `capacity` items, step by step: which requests hit, and what was loaded and evicted.

    Args:
        requests, num_items, policy, future, free_fill: as in `hit_curve`. A freely filled item is no load.
        semantics: "token" looks all of a token's requests up before any is served, so that an item that one of
            them evicts still counts as a hit (it is loaded again); "request" looks each up when its turn comes.
        prefetch: (batch, T, p) items loaded before token t is looked up, -1 for none.
        pinned: items that lie there from the start, are never evicted, and take slots.
        item_bytes: size of one item, for `bytes`.
    Raises:
        ValueError: as `hit_curve`; a capacity outside 1..num_items or without room beside the pinned; prefetch or
            pinned items out of range; pinned or prefetched items with `fixed`, which never changes.
    """
    sizes = _check("simulate", requests, num_items, policy, future)
    check.one_of("simulate", SEMANTICS, semantics=semantics)
    check.within("simulate", 1, num_items, capacity=capacity)
    check.shapes("simulate", prefetch=(prefetch, f"{sizes['batch']} {sizes['T']} p"))
    check.within("simulate", -1, num_items - 1, prefetch=prefetch)
    pinned = frozenset(pinned)
    if not pinned <= set(range(num_items)) or (pinned and len(pinned) >= capacity):
        check.fail("simulate", f"pinned {sorted(pinned)} of capacity={capacity}", "known items and a free slot beside them")
    if policy == "fixed" and (pinned or prefetch is not None):
        check.fail("simulate", "policy='fixed' with pinned or prefetched items", "neither", "it never changes")
    samples, ahead = requests.tolist(), prefetch.tolist() if prefetch is not None else [None] * sizes["batch"]
    caches = [_Cache(tokens, capacity, policy, future, free_fill, pinned) for tokens in samples]
    runs = [cache.run(semantics, items) for cache, items in zip(caches, ahead, strict=True)]
    hits, loads, evictions = (torch.tensor(part) for part in zip(*runs, strict=True))
    return CacheLog(hits, loads, evictions, loads * item_bytes)


class _Cache:
    """One sample's cache, kept in plain sets and counters: the definition of what the stack computes for all capacities."""

    def __init__(self, tokens, capacity, policy, future, free_fill, pinned):
        self.tokens, self.capacity, self.policy, self.future = tokens, capacity, policy, future
        self.free_fill, self.pinned = free_fill and policy != "fixed", pinned
        self.flat = [item for token in tokens for item in token]
        self.cached, self.seen = set(pinned), set(pinned)
        self.uses, self.last, self.ahead = Counter(), Counter(), Counter()
        self.time = self.loads = self.evictions = 0
        if policy == "fixed":
            total = Counter(self.flat)
            self.cached = set(sorted(total, key=lambda item: (-total[item], item))[:capacity])

    def run(self, semantics: str, prefetch: list[list[int]] | None) -> tuple[list, list, list]:
        """Hits (T, r), loads (T,) and evictions (T,)."""
        hits, loads, evictions = [], [], []
        for token, items in enumerate(self.tokens):
            self.loads = self.evictions = 0
            if self.policy == "segment":
                self.ahead = Counter(item for later in self.tokens[token : token + self.future] for item in later)
            for item in prefetch[token] if prefetch else ():
                self._prefetch(item)
            before = frozenset(self.cached)
            hits.append([self._serve(item, before if semantics == "token" else self.cached) for item in items])
            loads.append(self.loads)
            evictions.append(self.evictions)
        return hits, loads, evictions

    def _prefetch(self, item: int) -> None:
        if item >= 0 and item not in self.cached:
            self._load(item)
            self.last[item] = self.time

    def _serve(self, item: int, looked_up) -> bool:
        """Serve one request and say whether it was a hit among `looked_up`."""
        free = self.free_fill and item not in self.seen and len(self.cached) < self.capacity
        hit = free or item in looked_up
        if free:
            self.cached.add(item)
        elif item not in self.cached:
            self._load(item)
        self.time += 1
        self.seen.add(item)
        self.last[item] = self.time
        self.uses[item] += 1
        self.ahead[item] -= 1
        return hit

    def _load(self, item: int) -> None:
        self.loads += 1
        if self.policy == "fixed":
            return  # read through, never kept
        if len(self.cached) >= self.capacity:
            self.cached.remove(min(sorted(self.cached - self.pinned), key=self._value))
            self.evictions += 1
        self.cached.add(item)

    def _value(self, item: int) -> tuple[int, int]:
        """What is compared, larger stays: the policy's own number, then the time of last use."""
        if self.policy == "belady":
            later = self.flat[self.time + 1 :]
            return -(later.index(item) if item in later else len(self.flat)), self.last[item]
        return {"lru": 0, "lfu": self.uses[item], "segment": self.ahead[item]}[self.policy], self.last[item]
