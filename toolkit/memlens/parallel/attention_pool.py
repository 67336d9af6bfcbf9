"""A model here, its KV cache and attention in other processes: attention offloading.

    with attention_offload(model, workers=3) as pool:
        model.generate(ids, past_key_values=pool.request(), max_new_tokens=32)
        pool.volume()                                      # bytes by tensor

Rank 0 holds the weights and no cache; ranks 1 to n hold the keys and values of their share of the heads. For each layer q goes
out, then the new k and v, and the output comes back: (2 + 2/G)·e·d bytes a token. Requests live on the workers, so this process
is free for another one while it waits: two threads with a request each take turns (`turn`), and the model computes for one
while the workers attend for the other. Source: arXiv:2405.01814.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
import xarray as xr
from torch import Tensor
from transformers import Cache, CacheLayerMixin

from memlens import check
from memlens.models.hooks import use_attention
from memlens.parallel.attention_worker import FILL, FORGET, QUIT, STEP
from memlens.parallel.comm import volume
from memlens.parallel.processes import Team, hire

__all__ = ["AttentionPool", "RemoteCache", "attention_offload"]

TAGS = ("q", "kv", "out", "control")


class RemoteLayer(CacheLayerMixin):
    """How many tokens a layer's workers hold; hands through the new keys and values and keeps none."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.seen += key_states.shape[-2]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self.seen  # only the new keys are here

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        check.fail("RemoteCache", "beam search", "greedy decoding or sampling (num_beams=1)", error=RuntimeError)


class RemoteCache(Cache):
    """A request whose keys and values are on the workers of a pool; made by `AttentionPool.request`."""

    def __init__(self, pool: AttentionPool, number: int):
        super().__init__(layers=[RemoteLayer() for _ in range(pool.layers)])
        self.pool, self.number = pool, number

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.pool.current.request = self.number  # the attention of this layer follows in this thread
        return super().update(key_states, value_states, layer_idx)

    def reset(self) -> None:
        """Forget the request here and on the workers."""
        self.pool.tell(FORGET, self.number)
        for layer in self.layers:
            layer.seen = 0


class AttentionPool:
    """Rank 0's side: it splits heads over the workers, sends, and puts the outputs together."""

    def __init__(self, team: Team, layers: int, kv_heads: int, dim: int):
        self.team, self.layers, self.kv_heads, self.dim = team, layers, kv_heads, dim
        self.current, self.turn, self._numbers = threading.local(), threading.Lock(), count()
        self.waited = 0.0  # seconds in which rank 0 waited for outputs, all threads together

    @property
    def workers(self) -> int:
        return len(self.team.workers)

    def request(self) -> RemoteCache:
        """An empty cache for one batch of sequences of equal length; pass it as `past_key_values`."""
        return RemoteCache(self, next(self._numbers))

    def fill(self, request: RemoteCache, batch: int, tokens: int, layers: int | None = None) -> None:
        """Give a request `tokens` random keys and values in its first layers, to time a long context without reading one."""
        check.at_least("fill", 1, batch=batch, tokens=tokens)
        for layer in range(self.layers if layers is None else layers):
            self.tell(FILL, request.number, layer, batch, tokens)
            request.layers[layer].seen = tokens

    def tell(self, op: int, request: int = 0, layer: int = 0, batch: int = 0, tokens: int = 0) -> None:
        """Send every worker a header."""
        header = torch.tensor([op, request, layer, batch, tokens])
        for rank in range(1, self.workers + 1):
            self.team.comm.send(header, rank, "control")

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, offset: int) -> Tensor:
        """One layer's attention, by the workers: q (B,H,n,D) and the new k, v (B,Hkv,n,D) give out (B,H,n,D).

        Where this thread holds `turn`, it lends it to another thread while it waits.

        Raises:
            RuntimeError: no request of this pool, or a worker that has ended.
        """
        number = getattr(self.current, "request", None)
        if number is None or offset:
            came = "a forward without a request of this pool"
            check.fail("attention_offload", came, "past_key_values=pool.request()", error=RuntimeError)
        self.current.request, comm = None, self.team.comm
        ranks = range(1, self.workers + 1)
        queries, news = q.chunk(self.workers, 1), torch.stack((k, v)).chunk(self.workers, 2)
        try:
            self.tell(STEP, number, layer, q.shape[0], q.shape[2])
            for rank, part in zip(ranks, queries, strict=True):
                comm.send(part, rank, "q")  # before k and v: the workers start on the old keys
            for rank, part in zip(ranks, news, strict=True):
                comm.send(part, rank, "kv")
            inboxes = [comm.post(part.shape, q.dtype, rank, "out") for rank, part in zip(ranks, queries, strict=True)]
            with self._lent():
                outs = [comm.wait(inbox) for inbox in inboxes]
        except RuntimeError as error:
            self.team.check()
            raise RuntimeError(f"attention_offload: layer {layer} got no answer ({error})") from error
        return torch.cat(outs, 1)

    @contextmanager
    def _lent(self) -> Iterator[None]:
        start, mine = time.perf_counter(), getattr(self.current, "turn", False)
        if mine:
            self.turn.release()
        try:
            yield
        finally:
            self.waited += time.perf_counter() - start
            if mine:
                self.turn.acquire()

    @contextmanager
    def taking_turns(self) -> Iterator[None]:
        """In a thread: the model computes only while this thread has the turn; it is lent while the workers attend."""
        with self.turn:
            self.current.turn = True
            try:
                yield
            finally:
                self.current.turn = False

    def volume(self) -> xr.Dataset:
        """Payload bytes that rank 0 sent and received, by what they were: q, kv, out, control."""
        return volume(self.team.comm.log, TAGS)


@contextmanager
def attention_offload(model: Any, workers: int = 1, *, timeout_s: float = 60.0) -> Iterator[AttentionPool]:
    """Inside the `with`, the model's attention runs in `workers` other processes, split by heads.

    Args:
        model: a Llama-like transformers model on the CPU; unpadded batches.
        workers: each holds kv_heads / workers heads.
        timeout_s: for the workers' start and for every message.
    Raises:
        ValueError: kv heads that the workers do not divide.
        RuntimeError: a worker that does not come up, or ends.
    """
    text = model.config.get_text_config()
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    check.divides("attention_offload", workers=workers, kv_heads=kv_heads)
    sizes = {"heads": heads // workers, "kv_heads": kv_heads // workers, "dim": dim, "dtype": str(model.dtype)[6:]}
    with hire("memlens.parallel.attention_worker:serve", workers, timeout_s=timeout_s, **sizes) as team:
        pool = AttentionPool(team, text.num_hidden_layers, kv_heads, dim)
        with use_attention(model, pool.attend):
            yield pool
        if all(team.alive()):
            pool.tell(QUIT)
