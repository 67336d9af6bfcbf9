"""Memory: chunks against the token loop and against softmax, and one decode step from a state against one from a cache."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from memlens import check
from memlens.bench.case import Case

__all__ = ["cases", "decode_pair", "decode_seconds"]

HEADS, DIM, FEATURE_DIM = 16, 64, 16


def decode_pair(length: int, *, generator: torch.Generator) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """One decode step of 16 heads of 64 after `length` tokens: from a float32 KV cache, and from Based's packed state.

    Neither writes: the cache is full, and the step's new state is a result.
    """
    from memlens.attention.exact import attend
    from memlens.memory.linear import LinearState, linear_attention_step, state_of, taylor_features

    check.at_least("decode_pair", 1, length=length)
    q, k, v = (torch.randn(1, HEADS, length, DIM, generator=generator) for _ in range(3))
    q = q[:, :, -1:]
    state = LinearState(torch.zeros(1, HEADS, 153, DIM), torch.zeros(1, HEADS, 153))
    for start in range(0, length, 1024):
        part = slice(start, start + 1024)
        added = state_of(taylor_features(k[:, :, part, :FEATURE_DIM]), v[:, :, part], normalize=True)
        state = LinearState(state.S + added.S, state.z + added.z)
    small = [x[:, :, -1, :FEATURE_DIM] for x in (q, k)]
    newest = v[:, :, -1]

    def from_state() -> Tensor:
        return linear_attention_step(*(taylor_features(x) for x in small), newest, state, normalize=True)[0]

    return partial(attend, q, k, v), from_state


def decode_seconds(lengths: list[int], *, rounds: int = 15, generator: torch.Generator) -> Tensor:
    """Least seconds of each half of `decode_pair` on one thread, (2, lengths): cache, state.

    Each half repeats by itself, as decoding does: in turns, the cache would sweep the state out of the processor's own. One
    thread and the least, not the median: a step of a millisecond is shorter than what a busy machine takes from it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        taken = [[_least(call, rounds) for call in decode_pair(length, generator=generator)] for length in lengths]
    finally:
        torch.set_num_threads(threads)
    return torch.tensor(taken, dtype=torch.float64).T


def _least(call: Callable[[], Tensor], rounds: int) -> float:
    best = math.inf
    for turn in range(rounds + 2):  # two to warm up
        start = time.perf_counter()
        call()
        taken = time.perf_counter() - start
        best = min(best, taken) if turn > 1 else best
    return best


def cases() -> list[Case]:
    """1,024 tokens, 8 heads of 64, forward; one decode step after 8,192."""
    from memlens.memory.based import taylor_attention
    from memlens.memory.linear import linear_attention

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 8, 1024, DIM, generator=generator) for _ in range(3))
    k = F.normalize(k, dim=-1)
    decay = -0.1 * torch.rand(1, 8, 1024, generator=generator)
    beta = torch.rand(1, 8, 1024, generator=generator)
    size, found = f"1x8x1024x{DIM}", []
    for name, options in {
        "plain": {}, "decay per head": {"log_decay": decay},
        "decay per channel": {"log_decay": decay[..., None].expand(-1, -1, -1, DIM)},
        "gated delta": {"log_decay": decay, "beta": beta, "rule": "delta"},
    }.items():  # fmt: skip
        run = partial(linear_attention, q, k, v, **options)
        found.append(Case(f"linear_attention {name} {size}", run, partial(run, form="reference"), "our token loop"))
    few = [x[..., :FEATURE_DIM].contiguous() for x in (q, k)]
    softmax = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
    found.append(
        Case(f"taylor_attention {size}", partial(taylor_attention, *few, v), softmax, "torch scaled_dot_product_attention")
    )
    cache, state = decode_pair(8192, generator=generator)
    found.append(Case("decode step, state of 153 features, 16 heads", state, cache, "attend over 8,192 cached tokens"))
    return found
