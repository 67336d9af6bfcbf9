"""Several requests behind one prefix that is held once: a Hugging Face cache for what is theirs alone.

    with SharedPrefix(model, prefix_ids).open() as group:
        cache = group.requests()
        model(own_ids, past_key_values=cache)              # (8, n): what follows the prefix in each

The prefix is computed once, with batch 1; no request copies it. Source: arXiv:2412.03594.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from memlens import check
from memlens.attention.prefix import prefix_attend
from memlens.models.hooks import use_attention

__all__ = ["SharedPrefix"]


class OwnLayer(DynamicLayer):
    """A layer's own keys and values, which begin after `prefix` tokens."""

    def __init__(self, prefix: int):
        super().__init__()
        self.prefix = prefix

    def get_seq_length(self) -> int:
        return self.prefix + super().get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return super().get_seq_length() + query_length, self.prefix


class SharedPrefix:
    """The keys and values of a prefix, of which `requests` share one copy.

    Args:
        model: a Llama-like transformers model.
        ids: (1, P).
    """

    @torch.no_grad()
    def __init__(self, model: Any, ids: Tensor):
        check.shapes("SharedPrefix", ids=(ids, "1 prefix"))
        check.at_least("SharedPrefix", 1, prefix=ids.shape[1])
        self.model, self.length = model, ids.shape[1]
        layers = model(ids, use_cache=True, logits_to_keep=1).past_key_values.layers
        self.keys, self.values = ([getattr(layer, name)[0] for layer in layers] for name in ("keys", "values"))

    @property
    def nbytes(self) -> int:
        """Bytes of the one copy."""
        return sum(x.untyped_storage().nbytes() for x in (*self.keys, *self.values))

    def requests(self) -> Cache:
        """An empty cache for a batch of requests that go on after the prefix."""
        return Cache(layers=[OwnLayer(self.length) for _ in self.keys])

    @contextmanager
    def open(self) -> Iterator[SharedPrefix]:
        """Inside, the model's attention sees the prefix before what the cache holds."""

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor, offset: int) -> Tensor:
            return prefix_attend(q, self.keys[layer], self.values[layer], k, v)

        with use_attention(self.model, attention):
            yield self
