"""One prompt, many continuations: every branch reads the same keys and values of the prompt and writes only its own.

    cache = prefill(model, prompt).cache
    branches = share_prefix(cache, 8)                   # eight rows; the prompt's keys and values lie in memory once
    logits = continue_with(model, branches, tokens)     # (8, n)

Attention over the prompt and over a branch's own tokens are computed apart and merged by their log-denominators, so the prompt
is neither copied nor expanded. Sources: several answers to one prompt, arXiv:2603.16867; a batch of prompts that begin alike,
arXiv:2412.03594.
"""

from __future__ import annotations

from copy import copy
from typing import Any

from torch import Tensor

from memlens import check
from memlens.attention.prefix import prefix_attend
from memlens.kv.adapter import PolicyCache
from memlens.kv.select import positions
from memlens.kv.store import HeldLayer, refuse

__all__ = ["SharedCache", "SharedLayer", "share_prefix"]


class SharedLayer(HeldLayer):
    """A prefix (1, Hkv, P, D) that all rows share, and each row's own tokens, (B, Hkv, t, D), in `keys` and `values`."""

    def __init__(self, prefix: tuple[Tensor, Tensor], seen: int, rows: int):
        super().__init__()
        self.prefix, self.seen, self.rows, self.most = prefix, seen, rows, prefix[0].shape[2]

    @property
    def held(self) -> int:
        return self.prefix[0].shape[2] + super().held

    def parts(self) -> dict[str, list[Tensor]]:
        own = super().parts()
        return own | {"payload": [*self.prefix, *own["payload"]]}

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if len(key_states) != self.rows:
            refuse(f"{len(key_states)} rows for {self.rows} branches", "pass one row of tokens for each branch")
        return super().update(key_states, value_states, *args, **kwargs)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, bias: Tensor | None, scale: float | None,
        tally: bool = False,
    ):  # fmt: skip
        """(out, lse, None) of q (B, H, n, D) over the prefix and over the row's own tokens, `prefix_attend`."""
        if mask is not None or bias is not None:
            refuse("padding, or a bias on the scores, behind a shared prefix", "give every branch as many tokens")
        k_pre, v_pre = (x[0] for x in self.prefix)
        return *prefix_attend(q, k_pre, v_pre, k, v, scale=scale, return_lse=True), None

    def repeat(self, times: int) -> None:
        super().repeat(times)
        self.rows *= times

    def reset(self) -> None:
        refuse("reset() of a shared prefix", "call share_prefix again")


class SharedCache(PolicyCache):
    """What `share_prefix` returns. Its rows are the branches; nothing is evicted any more."""

    def positions(self, layer: int) -> Tensor:
        own = positions(self._before[layer].stream, self.layers[layer].seen - self._prompt)
        return own.expand(self.layers[layer].rows, -1, -1)

    def observe(self, index: int, q: Tensor, k: Tensor, **seen: Any) -> None:
        """Nothing to note: no token of a branch is dropped."""

    def evict(self, index: int) -> None:
        """Nothing is dropped."""
        self.peak_bytes = max(self.peak_bytes, sum(layer.nbytes for layer in self.layers))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """More branches: each becomes `repeats` that go on from where it is."""
        for layer in self.layers:
            layer.repeat(repeats)


def share_prefix(cache: PolicyCache, n: int) -> SharedCache:
    """A cache of n branches that go on from one prompt; the prompt's keys and values are those of `cache`, not copied.

    `cache` stays as it was. The branches keep every token that they write.

    Args:
        cache: of one prompt, whole or compressed once; plain storage.
        n: branches, rows of the batch from now on, at least 1.
    Raises:
        ValueError: no prompt yet, more than one row, padding, a storage format, or a policy that would go on evicting,
            turning or weighing the prompt's tokens.
    """
    check.at_least("share_prefix", 1, n=n)
    if len({layer.seen for layer in cache.layers}) != 1 or any(layer.keys is None for layer in cache.layers):
        check.fail(
            "share_prefix", "a cache without plain keys in every layer", "a prompt that was prefilled, no storage format"
        )
    if len(cache.layers[0].keys) != 1 or bool((cache.positions(0) < 0).any()):
        check.fail("share_prefix", f"{len(cache.layers[0].keys)} rows, or padding", "one prompt")
    policy = cache.policy
    goes_on = policy.budget is not None and policy.when != "prompt"
    if goes_on or policy.rolling or any(entry.stream.aux for entry in cache.state):
        check.fail(
            "share_prefix",
            f"policy {policy.name!r}",
            "one that leaves the prompt alone once it is read",
            "full(), snapkv(...)",
        )
    twin = object.__new__(SharedCache)
    twin.__dict__.update(copy(cache).__dict__)
    twin.layers = [SharedLayer((layer.keys, layer.values), layer.seen, n) for layer in cache.layers]
    twin._before, twin._prompt = cache.state, cache.layers[0].seen
    twin.state, twin._queries, twin.last_logits = (None,) * len(cache.layers), None, None
    return twin
