"""Feeding a model through a compressed cache: a prompt, what follows it, a long stream.

    logits, cache, _ = prefill(model, ids, snapkv(128))
    logits = continue_with(model, cache, more_ids)

`compress` applies a policy to a prompt that was prefilled once in full, so that many policies share one prefill.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memlens import check
from memlens.kv.adapter import PolicyCache
from memlens.kv.head_split import HeadSplit, HeadSplitCache, cache_for
from memlens.kv.policies import Policy, full
from memlens.kv.shared import share_prefix
from memlens.kv.store import HeldLayer

__all__ = [
    "HeadSplitCache", "HeldLayer", "PolicyCache", "Prefilled", "compress", "continue_with", "prefill", "share_prefix",
    "stream_eval",
]  # fmt: skip


class Prefilled(NamedTuple):
    logits: Tensor  # (B, V) after the last token
    cache: PolicyCache
    queries: list[Tensor] | None  # per layer (B, H, L, D) as attended, where they were asked for


@torch.no_grad()
def prefill(
    model: Any, ids: Tensor, policy: Policy | HeadSplit | None = None, chunk: int | None = None, *, mask: Tensor | None = None,
    keep_queries: bool = False,
) -> Prefilled:  # fmt: skip
    """Run a prompt through the model into a cache under `policy` (default: keep everything).

    Args:
        ids: (B, L).
        chunk: tokens per forward; None is one forward. A policy that evicts always does so after each; one that
            compresses the prompt waits for its end.
        mask: (B, L), 0 for padding on the left.
        keep_queries: also return every layer's queries, which `compress` needs.
    Raises:
        ValueError: no tokens, a chunk below 1, or a policy whose budget cannot hold its protected tokens.
    """
    _check_ids("prefill", ids, chunk)
    policy = policy or full()
    cache = cache_for(model.config, policy, ids.shape[1])
    recorded = cache.record() if keep_queries else None
    with cache.on(model):
        for part in ids.split(chunk or ids.shape[1], 1):
            logits = _forward(model, cache, part, mask, keep=1)
    queries = None if recorded is None else [torch.cat(layer, 2) for layer in recorded]
    cache.record(False)
    return Prefilled(logits[:, -1], cache, queries)


@torch.no_grad()
def continue_with(
    model: Any, cache: PolicyCache, ids: Tensor, pos0: int | None = None, *, mask: Tensor | None = None, keep: int = 0
) -> Tensor:  # fmt: skip
    """Logits (B, n, V) of n more tokens in one forward; the cache grows by them and its policy goes on.

    `pos0` is where ids[:, 0] stands, by default right after what was seen; `mask` (B, seen + n) as in `prefill`; `keep`
    returns the logits of the last `keep` tokens only, and spares the memory of the others (0 is all).
    """
    _check_ids("continue_with", ids)
    with cache.on(model):
        return _forward(model, cache, ids, mask, keep=keep, pos0=pos0)


@torch.no_grad()
def stream_eval(model: Any, ids: Tensor, policy: Policy | None = None, chunk: int = 1, start: int = 0) -> Tensor:
    """Logits (B, L - start, V) of positions start to L - 1 of a text fed `chunk` tokens at a time, evicting as it goes.

    Raises:
        ValueError: a chunk below 1, or a start outside [0, L - 1].
    """
    _check_ids("stream_eval", ids, chunk)
    check.within("stream_eval", 0, ids.shape[1] - 1, start=start)
    cache = cache_for(model.config, policy or full())
    with cache.on(model):
        return torch.cat(list(_stream(model, cache, ids, chunk, start)), 1)


def _stream(model: Any, cache: PolicyCache, ids: Tensor, chunk: int, start: int) -> Iterator[Tensor]:
    for first in range(0, ids.shape[1], chunk):
        part = ids[:, first : first + chunk]
        wanted = min(part.shape[1], first + part.shape[1] - start)
        logits = _forward(model, cache, part, None, keep=max(1, wanted))
        if wanted > 0:
            yield logits


@torch.no_grad()
def compress(filled: Prefilled, policy: Policy | HeadSplit) -> PolicyCache:
    """A cache under `policy` from a prompt that was prefilled in full with keep_queries=True.

    It holds what `prefill(model, ids, policy)` holds: there too a layer evicts only after it has seen the prompt.

    Raises:
        ValueError: queries that were not kept, or a cache that has lost tokens already.
    """
    old = filled.cache
    if filled.queries is None or any(layer.keys is None or layer.held != layer.seen for layer in old.layers):
        check.fail("compress", "a prefill without queries or with tokens missing", "prefill(model, ids, keep_queries=True)")
    if isinstance(policy, HeadSplit):
        return HeadSplitCache.split(old, policy, filled.queries)
    return old.under(policy, filled.queries)


def _forward(
    model: Any, cache: PolicyCache, ids: Tensor, mask: Tensor | None, *, keep: int, pos0: int | None = None
) -> Tensor:
    start, seen = (cache.get_seq_length() if pos0 is None else pos0), cache.get_seq_length() + ids.shape[1]
    place = torch.arange(start, start + ids.shape[1], device=ids.device).expand(ids.shape)
    if mask is not None:
        mask = mask[:, :seen]
        place = (place - (mask == 0).sum(-1, keepdim=True)).clamp(min=0)
    out = model(ids, past_key_values=cache, attention_mask=mask, position_ids=place, use_cache=True, logits_to_keep=keep)
    return out.logits


def _check_ids(op: str, ids: Tensor, chunk: int | None = None) -> None:
    check.shapes(op, ids=(ids, "batch length"))
    check.at_least(op, 1, length=ids.shape[1], chunk=1 if chunk is None else chunk)
