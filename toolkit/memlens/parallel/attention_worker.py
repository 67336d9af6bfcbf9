"""What an attention worker does: it keeps the keys and values of some heads for every request, and attends to them.

For each layer it hears a header, then q, then the new k and v, and answers with the attention's output. It starts on the keys
it holds as soon as q is there, and merges the part of the new ones, which arrive later:

    out(old ∪ new) = merge(out(old), out(new))

Source: arXiv:2405.01814, section 4.2.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from memlens.attention.exact import attend
from memlens.attention.merge import Attended, merge
from memlens.parallel.comm import Comm

__all__ = ["FILL", "FORGET", "HEADER", "QUIT", "STEP", "serve", "step"]

STEP, FORGET, FILL, QUIT = range(4)
HEADER = 5  # operation, request, layer, batch, tokens: int64
PATIENCE = 30 * 24 * 3600.0  # seconds; a notebook may rest, and the worker leaves with its parent anyway


def serve(comm: Comm, *, heads: int, kv_heads: int, dim: int, dtype: str) -> None:
    """Answer rank 0 until it says QUIT; the sizes are those of this worker's share of the heads."""
    kind, held = getattr(torch, dtype), {}
    while True:
        header = comm.receive((HEADER,), torch.int64, 0, "control", timeout_s=PATIENCE)
        op, request, layer, batch, tokens = header.tolist()
        if op == QUIT:
            return
        if op == FORGET:
            held = {place: kv for place, kv in held.items() if place[0] != request}
        elif op == FILL:
            # tensors of their own for every layer, as a real request has: shared ones would stay in the processor's cache
            held[request, layer] = Held().append(*_noise((2, batch, kv_heads, tokens, dim), kind))
        else:
            q = comm.receive((batch, heads, tokens, dim), kind, 0, "q")
            inbox = comm.post((2, batch, kv_heads, tokens, dim), kind, 0, "kv")
            mine = held.setdefault((request, layer), Held())
            before = attend(q, *mine.tensors, causal=False, return_lse=True) if mine.length else None
            k, v = comm.wait(inbox)
            comm.send(step(q, k, v, before).out, 0, "out")
            mine.append(k, v)  # after the answer: rank 0 does not wait for it
        comm.log.clear()  # a worker serves for long; rank 0 keeps the books


def step(q: Tensor, k: Tensor, v: Tensor, before: Attended | None) -> Attended:
    """Attention of new tokens to older keys (already attended to: `before`) and, causally, to themselves."""
    new = attend(q, k, v, return_lse=True)
    return new if before is None else merge(*before, *new)


class Held:
    """Keys and values of one request and layer, in room that grows with spare when it is full."""

    def __init__(self):
        self.length, self._room = 0, None

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """(B, Hkv, length, D) each."""
        return tuple(self._room[..., : self.length, :])

    def append(self, k: Tensor, v: Tensor) -> Held:
        """Add tokens at the end."""
        end = self.length + k.shape[2]
        if self._room is None or end > self._room.shape[3]:
            room = k.new_empty(2, *k.shape[:2], max(end + 256, 2 * self.length), k.shape[3])
            if self.length:
                room[..., : self.length, :] = self._room[..., : self.length, :]
            self._room = room
        self._room[0, :, :, self.length : end], self._room[1, :, :, self.length : end] = k, v
        self.length = end
        return self


@lru_cache(1)
def _noise(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
