"""Two policies side by side: the marked kv heads of each layer under one, the others under another.

    by_head(retrieval, full(), streaming(68, sinks=4))                   DuoAttention's split
    by_head(retrieval, mikv(0.2), streaming(68, sinks=4))                its long heads in two precisions
    by_head(retrieval, h2o(51, 51), snapkv(64).stored(kivi(4)))          any two

Each group is a `PolicyCache` that sees its own heads alone: what a policy or a format can do it can do here, and what a head gives
up is freed although its neighbour keeps it. A policy whose heads choose together, such as TOVA, has those of its group choose.
Source: the split of arXiv:2410.10819; that any two policies go is ours.
"""

from __future__ import annotations

from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memlens import check
from memlens.kv.adapter import PolicyCache
from memlens.kv.merge import Merge
from memlens.kv.policies import Policy
from memlens.kv.storage import gathered
from memlens.kv.store import HeldLayer

__all__ = ["HeadSplit", "HeadSplitCache", "by_head", "cache_for"]


class HeadSplit(NamedTuple):
    """What `by_head` makes; it goes where a `Policy` goes."""

    heads: Tensor  # (layers, Hkv) bool
    marked: Policy
    others: Policy
    hears = False  # no group may

    @property
    def name(self) -> str:
        return f"{self.marked.name} | {self.others.name}"

    @property
    def groups(self) -> tuple[tuple[Tensor, Policy], ...]:
        """(heads (layers, Hkv) bool, policy) of each group."""
        return (self.heads, self.marked), (~self.heads, self.others)

    @property
    def rolling(self) -> bool:
        return self.marked.rolling or self.others.rolling

    @property
    def merge(self) -> Merge | None:
        """A merge that turns keys, if either has one."""
        merges = (policy.merge for _, policy in self.groups)
        return next((merge for merge in merges if merge is not None and merge.keys == "pre_rope"), None)

    def suits(self, shape: tuple[int, int, int]) -> None:
        """Refuse a model of another number of layers or kv heads."""
        if tuple(self.heads.shape) != shape[:2]:
            came = f"marks of shape {tuple(self.heads.shape)}"
            check.fail("by_head", came, f"(layers, kv heads) = {shape[:2]}", "one mark for each head of the model")

    def fits(self, state: tuple, new: int, *, padded: bool = False) -> None:
        for _, policy in self.groups:
            policy.fits(state, new, padded=padded)


def by_head(heads: Tensor, marked: Policy, others: Policy) -> HeadSplit:
    """One policy for the marked kv heads, another for the rest; each with its own budget and storage.

    Args:
        heads: (layers, Hkv) bool.
        marked, others: any presets; a budget is tokens for each head of the group.
    Raises:
        ValueError: marks that are not bool or not of two axes; a policy that hears, or scores all heads at once; a split
            in a split.
    """
    check.shapes("by_head", heads=(heads, "layers kv_heads"))
    if heads.dtype != torch.bool:
        check.fail("by_head", f"heads of dtype {heads.dtype}", "bool", "compare scores with a threshold")
    for policy in (marked, others):
        if isinstance(policy, HeadSplit) or policy.hears or policy.joint:
            check.fail("by_head", f"policy {policy.name!r}", "one that asks for no more than its own heads")
    return HeadSplit(heads, marked, others)


def cache_for(config: Any, policy: Policy | HeadSplit, prompt: int = 0, *, undo: bool = True) -> PolicyCache:
    """An empty cache under a policy; one that compresses the prompt once waits for `prompt` tokens."""
    if isinstance(policy, HeadSplit):
        return HeadSplitCache(config, policy, prompt=prompt, undo=undo)
    whole = policy.when == "prompt" or getattr(policy.store, "waits", False)
    return PolicyCache(config, policy, hold_until=prompt if whole else 0, undo=undo)


class SplitLayer(HeldLayer):
    """Hands each group's layer the keys and values of its heads; holds the new ones while the layer runs."""

    def __init__(self, split: list[tuple[HeldLayer, Tensor]]):
        super().__init__()
        self.split = [(part, heads) for part, heads in split if len(heads)]  # heads: indices (n,)
        self.seen = max(part.seen for part, _ in self.split)

    @property
    def held(self) -> int:
        """Tokens of the kv head that holds most."""
        return max(part.held for part, _ in self.split)

    def parts(self) -> dict[str, list[Tensor]]:
        return gathered(part.parts() for part, _ in self.split)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        for part, heads in self.split:
            part.update(key_states[:, heads], value_states[:, heads])
        self.keys, self.values, self.seen = key_states, value_states, self.seen + key_states.shape[-2]
        return key_states, value_states


class HeadSplitCache(PolicyCache):
    """A cache under a `HeadSplit`; `groups` are the caches of the marked heads and of the others.

    Args:
        config, undo: as in `PolicyCache`.
        prompt: its tokens, where a policy compresses it once.
    Raises:
        ValueError: marks for another number of layers or kv heads.
    """

    def __init__(self, config: Any, policy: HeadSplit, *, prompt: int = 0, undo: bool = True):
        super().__init__(config, undo=undo)
        policy.suits(self._shape)
        self._policy = policy
        self._stand_on([cache_for(config, each, prompt, undo=False) for _, each in policy.groups])
        self.hold_until = max(group.hold_until for group in self.groups)

    def _stand_on(self, groups: list[PolicyCache]) -> None:
        self.groups, self.state = groups, ()
        marks = [heads for heads, _ in self._policy.groups]
        self.layers = [
            SplitLayer([(group.layers[i], mark[i].nonzero()[:, 0]) for group, mark in zip(groups, marks, strict=True)])
            for i in range(len(marks[0]))
        ]

    @classmethod
    def split(cls, cache: PolicyCache, policy: HeadSplit, queries: list[Tensor]) -> HeadSplitCache:
        """What `PolicyCache.under` does, group by group: a full cache and its queries shown to both policies."""
        policy.suits(cache._shape)
        twin, groups = object.__new__(cls), []
        for marks, each in policy.groups:
            part = cache.fork()
            for layer, heads in zip(part.layers, marks, strict=True):
                pair = (layer.keys[:, heads], layer.values[:, heads]) if bool(heads.any()) else (None, None)
                layer.keys, layer.values = pair
            groups.append(part.under(each, [q[:, _rows(q, heads)] for q, heads in zip(queries, marks, strict=True)]))
        twin.__dict__.update(vars(copy(cache)) | {"_policy": policy, "_queries": None, "_last": None, "hold_until": 0})
        twin._stand_on(groups)
        return twin

    @property
    def held(self) -> list[list[int]]:
        """Tokens held by each kv head of each layer."""
        found = [[0] * self._shape[1] for _ in self.layers]
        for row, layer in zip(found, self.layers, strict=True):
            for part, heads in layer.split:
                for head in heads.tolist():
                    row[head] = part.held
        return found

    def positions(self, layer: int) -> list[Tensor]:
        """Where the held tokens of a layer stood, (B, held) int32 for each kv head."""
        found: dict[int, Tensor] = {}
        for group, (marks, _) in zip(self.groups, self._policy.groups, strict=True):
            for place, head in enumerate(marks[layer].nonzero()[:, 0].tolist()):
                found[head] = group.positions(layer)[:, place]
        return [found[head] for head in sorted(found)]

    def nbytes(self) -> dict[str, int]:
        """Bytes by part, both groups together."""
        counts = [group.nbytes() for group in self.groups]
        return {part: sum(each.get(part, 0) for each in counts) for part in counts[0] | counts[1]}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """As `PolicyCache.update`; both groups' plans are asked first."""
        for group in self.groups if layer_idx == 0 else ():
            if self.layers[0].seen + key_states.shape[-2] >= group.hold_until:
                group.policy.fits(group.state, key_states.shape[-2])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def attend(self, index: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, pad: Tensor | None) -> Tensor:
        """Each group's attention over what it holds, put together in the order of the heads: (B, H, n, D)."""
        out = q.new_empty(*q.shape[:3], v.shape[-1])
        for group, (marks, _) in zip(self.groups, self._policy.groups, strict=True):
            if bool(marks[index].any()):
                group._inv_freq, part, rows = self._inv_freq, group.layers[index], _rows(q, marks[index])
                out[:, rows] = group.attend(index, q[:, rows], part.keys, part.values, scale, pad)
        layer = self.layers[index]
        layer.keys = layer.values = None
        old = () if self._last is None else self._last.groups
        kept_for_undo = sum(layer.settled for group in old for layer in group.layers[: index + 1])
        self._scale = scale
        self.peak_bytes = max(self.peak_bytes, kept_for_undo + sum(group.peak_bytes for group in self.groups))
        if index == len(self.layers) - 1:
            self._last = None
        return out

    def record(self, on: bool = True) -> list[list[Tensor]]:
        """Queries are for compressing a full cache, which this one is not."""
        if on:
            check.fail("HeadSplitCache", "queries to be kept", "prefill(model, ids, keep_queries=True), then compress(...)")
        return []

    def fork(self, *, hold_until: int | None = None) -> HeadSplitCache:
        """As `PolicyCache.fork`, both groups."""
        twin = super().fork(hold_until=hold_until)
        twin._stand_on([group.fork(hold_until=hold_until) for group in self.groups])
        return twin

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        for group in self.groups:
            group.batch_repeat_interleave(repeats)

    def reset(self) -> None:
        """An empty cache under the same policies."""
        for group in self.groups:
            group.reset()
        self._model = self._last = None
        self._stand_on(self.groups)


def _rows(q: Tensor, heads: Tensor) -> Tensor:
    """Which query heads of q (B, H, n, D) read the marked kv heads (Hkv,): (H,) bool."""
    return heads.repeat_interleave(q.shape[1] // len(heads))
