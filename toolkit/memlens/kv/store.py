"""How kept tokens are stored: one layer of a Hugging Face cache, here as plain tensors."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor
from transformers import CacheLayerMixin

from memlens import check

__all__ = ["HeldLayer", "refuse"]


def refuse(came: str, fix: str) -> NoReturn:
    """Refuse a use that would spoil the cache, before anything in it has changed."""
    check.fail("PolicyCache", came, "one model, run through `on`, forwards only", fix, error=RuntimeError)


class HeldLayer(CacheLayerMixin):
    """The keys and values that one layer holds, (B, Hkv, held, D), and how many tokens it has seen."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    @property
    def held(self) -> int:
        return 0 if self.keys is None else self.keys.shape[-2]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = _append(self.keys, key_states), _append(self.values, value_states)
        self.seen += key_states.shape[-2]
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.held + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized, self.seen = False, 0

    def crop(self, tokens_to_remove: int) -> None:
        refuse(f"crop({tokens_to_remove})", "fork() the cache before the tokens to drop")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        refuse("beam search", "decode greedily or sample (num_beams=1)")


def _append(old: Tensor | None, new: Tensor) -> Tensor:
    if old is not None:
        return torch.cat((old, new), -2)
    # a slice of a fused projection would keep the whole of it alive
    return new if new.untyped_storage().nbytes() == new.numel() * new.element_size() else new.clone()
