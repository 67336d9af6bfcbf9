"""One layer of a Hugging Face cache: what it holds, as plain tensors or in a format of `memlens.kv.storage`."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import CacheLayerMixin

from memlens import check
from memlens.attention.exact import attend
from memlens.attention.merge import merge
from memlens.kv.observe import decode_observe, merge_observed
from memlens.kv.select import gather_kv
from memlens.kv.storage import Storage, changed, query_peak

__all__ = ["HeldLayer", "refuse"]


def refuse(came: str, fix: str) -> NoReturn:
    """Refuse a use that would spoil the cache, before anything in it has changed."""
    check.fail("PolicyCache", came, "one model, run through `on`, forwards only", fix, error=RuntimeError)


class HeldLayer(CacheLayerMixin):
    """The keys and values that one layer holds, (B, Hkv, held, D), and how many tokens it has seen.

    With a storage format they are plain only while the layer runs: from `update` to `settle`. Where the format attends in
    place only the new ones are (`apart`), unless `whole` asks for all.
    """

    def __init__(self, store: Storage | None = None):
        super().__init__()
        self.seen, self.store = 0, store
        self.stored: Any = None  # the format's state; None before the first tokens were settled
        self.query_peak: Tensor | None = None  # of the prompt, for a format that asks for it
        self.query_rows: Tensor | None = None  # the prompt's newest queries, likewise
        self.pad: Tensor | None = None  # (B,) tokens of left padding in it
        self.most = 0  # tokens held at once so far
        self.apart = False  # keys and values are the new tokens alone, behind those in `stored`
        self.settled = 0  # bytes held when the last tokens had been settled

    @property
    def held(self) -> int:
        plain = 0 if self.keys is None else self.keys.shape[-2]
        if self.stored is None or (self.keys is not None and not self.apart):
            return plain
        return plain + self.store.count(self.stored)

    @property
    def nbytes(self) -> int:
        """Bytes of everything that the layer keeps alive."""
        return sum(x.untyped_storage().nbytes() for tensors in self.parts().values() for x in tensors)

    def parts(self) -> dict[str, list[Tensor]]:
        """The tensors held, by part: payload, scales, indices, residual."""
        plain = [x for x in (self.keys, self.values) if x is not None]
        stored = {} if self.stored is None else self.store.parts(self.stored)
        return stored | {"payload": stored.get("payload", []) + plain}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.keys is None and self.stored is not None:
            self.apart = getattr(self.store, "in_place", False)
            if not self.apart:
                self.keys, self.values = self.store.read(self.stored, self.dtype)
        self.keys, self.values = _append(self.keys, key_states), _append(self.values, value_states)
        self.seen, self.most = self.seen + key_states.shape[-2], max(self.most, self.held)
        return self.keys, self.values

    def whole(self) -> tuple[Tensor, Tensor]:
        """Keys and values of every token held, read from the format where they were not yet."""
        if self.apart:
            old = self.store.read(self.stored, self.dtype)
            self.keys, self.values = (torch.cat(pair, -2) for pair in zip(old, (self.keys, self.values), strict=True))
            self.apart = False
        return self.keys, self.values

    def blank(self) -> tuple[Tensor, Tensor]:
        """Stand-ins of the shape of all keys and values, without memory; NaN, so that a score which reads them is refused."""
        return tuple(
            x.new_full((1,), torch.nan).expand(*x.shape[:2], self.held, x.shape[-1]) for x in (self.keys, self.values)
        )

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, bias: Tensor | None, scale: float | None,
        tally: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """(out, lse, mass) over all that is held, or over what the format retrieves of it once it has a prompt; lse is None then.

        mass (B, H, L) is what each key got from a single row, where `tally` asks for it and it costs no second product.
        """
        if self.apart and tally and q.shape[2] == 1:
            new = decode_observe(q, k, v, group="none", scale=scale)
            return merge_observed([self.store.attend(q, self.stored, scale=scale, tally=True), new])
        if self.apart:
            new = attend(q, k, v, scale=scale, return_lse=True)
            return *merge(*self.store.attend(q, self.stored, scale=scale), *new), None
        retrieve = getattr(self.store, "retrieve", None)
        if retrieve is None or self.stored is None:
            if tally and q.shape[2] == 1 and mask is None and bias is None:
                return decode_observe(q, k, v, group="none", scale=scale)
            return *attend(q, k, v, mask=mask, bias=bias, scale=scale, return_lse=True), None
        if mask is not None or bias is not None:
            fix = "run prompts of one length or one by one, and choose a policy without a bias"
            refuse(f"padding, or a bias on the scores, with {self.store.name!r}, which retrieves", fix)
        return retrieve(self.stored, q, k, v, scale=scale), None, None

    def observe(self, q: Tensor, pad: Tensor | None = None) -> None:
        """Take note of the queries, for a format that asks for them."""
        if self.store is not None and self.store.balances and self.stored is None:
            peak = query_peak(q, self.keys.shape[1])
            self.query_peak = peak if self.query_peak is None else torch.maximum(self.query_peak, peak)
        if rows := getattr(self.store, "rows", 0) if self.stored is None else 0:
            if pad is not None:
                place = torch.arange(self.seen - q.shape[2], self.seen, device=q.device)
                q = q * (place >= pad[:, None])[:, None, :, None]
            self.query_rows, self.pad = _append(self.query_rows, q)[:, :, -rows:].clone(), pad

    def settle(self, idx: Tensor | None, score: Tensor, merged: tuple[Tensor, Tensor] | None = None) -> int:
        """Keep the tokens idx (None: all), as the format holds them; returns its bytes while both forms were alive.

        `merged` are the keys and values at idx where they are not those that are held.
        """
        before = self.nbytes
        if self.store is None and idx is None:
            self.settled = before
            return before
        if merged is not None:
            (self.keys, self.values), idx = merged, None
        if self.store is None and merged is None:
            self.keys, self.values = gather_kv(self.keys, self.values, idx)
        elif self.store is not None:
            count = 0 if self.stored is None or self.apart else self.store.count(self.stored)
            new = (x[..., count:, :] for x in (self.keys, self.values))
            asked = {} if self.query_rows is None else {"query_rows": self.query_rows, "pad": self.pad}
            self.stored = self.store.commit(self.stored, *new, idx, score=score, query_peak=self.query_peak, **asked)
            self.keys = self.values = self.query_peak = self.query_rows = self.pad = None
            self.apart = False
        self.settled = self.nbytes
        return before + self.settled

    def repeat(self, times: int) -> None:
        """Repeat every row of the batch."""
        held = (self.keys, self.values, self.stored, self.query_peak, self.query_rows, self.pad)
        held = changed(held, lambda x: x.repeat_interleave(times, 0))
        self.keys, self.values, self.stored, self.query_peak, self.query_rows, self.pad = held

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.held + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.keys = self.values = self.stored = self.query_peak = self.query_rows = self.pad = None
        self.is_initialized, self.apart, self.seen, self.most = False, False, 0, 0

    def crop(self, tokens_to_remove: int) -> None:
        refuse(f"crop({tokens_to_remove})", "fork() the cache before the tokens to drop")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        refuse("beam search", "decode greedily or sample (num_beams=1)")


def _append(old: Tensor | None, new: Tensor) -> Tensor:
    if old is not None:
        return torch.cat((old, new), -2)
    # a slice of a fused projection would keep the whole of it alive
    return new if new.untyped_storage().nbytes() == new.numel() * new.element_size() else new.clone()
