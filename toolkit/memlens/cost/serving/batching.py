"""A whole batch of prompts on one GPU, iteration by iteration: an LRU prefix cache in order of arrival, or groups by prefix.

Every iteration decodes one token for each request that writes and fills up with prefill, `chunk` tokens at most in all. It takes

    max(2·N·tokens / flops, 2·N / bandwidth) + keys and values read / bandwidth

The first policy is what an online engine does (`LRU`), the second knows the batch (`BATCHLLM`): each group's prefix is computed
once and lives while the group runs, groups that write much start first, and requests are admitted while memory lasts. A grouped
prefix is read once an iteration for all who write behind it. Source: arXiv:2412.03594, sections 4 and 5.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from memlens import check
from memlens.cost.devices import Device, device
from memlens.cost.memory import LLAMA_7B, llama_weights
from memlens.cost.serving.grouping import order_groups, single_level
from memlens.cost.serving.prefix import prefix_tree
from memlens.cost.serving.residency import Grouped, Residency, Shared
from memlens.cost.serving.roofline import parameters, token_bytes

__all__ = ["BATCHLLM", "LRU", "Batching", "Request", "simulate_batching"]


class Request(NamedTuple):
    prompt: tuple[int, ...]  # token ids
    output: int  # tokens that it will write


class Batching(NamedTuple):
    share: str = "lru"  # "lru": whatever is still cached; "group": one prefix for each group; "none"
    order: str = "arrival"  # or "ratio": groups by tokens written over tokens read
    most: int | None = None  # requests at once; None: as many as memory holds
    chunk: int = 2048  # tokens of an iteration
    method: str = "greedy"  # of `single_level`, for "group"


LRU = Batching("lru", "arrival", most=256)
BATCHLLM = Batching("group", "ratio")


def simulate_batching(
    requests: Sequence[Request], policy: Batching = BATCHLLM, *, gpu: Device | None = None, shape: Any = LLAMA_7B,
    memory: int | None = None,
) -> xr.Dataset:  # fmt: skip
    """Every iteration until all requests are answered.

    Args:
        requests: the batch, in order of arrival.
        policy: `LRU`, `BATCHLLM` or your own.
        gpu: default one A100.
        memory: tokens whose keys and values fit; default nine tenths of the GPU less the weights.
    Returns:
        `time` s, `prefill`, `decode`, `memory` tokens, by (step). Attributes: `makespan` s, `saved` (share of the prompt tokens
        that were not computed), `tokens` (mean per iteration), `computed` and `total` prompt tokens.
    Raises:
        ValueError: an unknown word in the policy, an empty batch, or a request longer than the memory.
    """
    check.one_of("simulate_batching", ("lru", "group", "none"), share=policy.share)
    check.one_of("simulate_batching", ("arrival", "ratio"), order=policy.order)
    check.at_least("simulate_batching", 1, chunk=policy.chunk, requests=len(requests), most=policy.most or 1)
    gpu = gpu or device("a100")
    memory = _room(gpu, shape) if memory is None else memory
    longest = max(len(request.prompt) + request.output for request in requests)
    if longest > memory:
        check.fail("simulate_batching", f"a request of {longest} tokens", f"at most {memory}, what the memory holds")
    check.at_least("simulate_batching", 1, output=min(request.output for request in requests))
    order, held = _plan(requests, policy, memory)
    return _labelled(_run(requests, order, held, policy, gpu, shape), sum(len(r.prompt) for r in requests))


def _room(gpu: Device, shape: Any) -> int:
    weights = 2 * sum(weight.numel for weight in llama_weights(shape))
    return int((0.9 * gpu.memory - weights) / token_bytes(shape))


def _plan(requests: Sequence[Request], policy: Batching, memory: int) -> tuple[list[int], Residency]:
    """The order in which requests start, and what is kept of them."""
    tree = prefix_tree([request.prompt for request in requests])
    groups, lengths = single_level(tree, policy.method), [len(request.prompt) for request in requests]
    if policy.order == "ratio":
        groups = order_groups(groups, lengths, [request.output for request in requests])
    order = [i for group in groups for i in group.requests] if policy.order == "ratio" else list(range(len(requests)))
    outputs = [request.output for request in requests]
    if policy.share == "group":
        return order, Grouped(groups, lengths, outputs, memory)
    return order, Shared(tree, lengths, outputs, memory, keep=policy.share == "lru")


def _run(requests: Sequence, order: list[int], held: Residency, policy: Batching, gpu: Device, shape: Any) -> list[tuple]:
    """One row for each iteration: seconds, prefill, decode, memory."""
    count, each = parameters(shape), token_bytes(shape)
    waiting, filling, ends, rows = order[::-1], [], [], []
    writing = 0
    while waiting or filling or ends:
        budget = max(0, policy.chunk - writing)
        _admit(waiting, filling, held, writing, budget, policy.most)
        fill, begun = _fill(filling, budget)
        tokens = writing + fill
        seconds = max(2 * count * tokens / gpu.flops, 2 * count / gpu.bandwidth) + each * held.read / gpu.bandwidth
        rows.append((seconds, fill, writing, held.used))
        held.grow(writing)
        step = len(rows)
        for i in begun:  # the last piece of its prompt gave the first token
            held.begin(i)
            heapq.heappush(ends, (step + requests[i].output - 1, i))
            writing += 1
        while ends and ends[0][0] <= step:
            held.finish(heapq.heappop(ends)[1])
            writing -= 1
    return rows


def _admit(waiting: list[int], filling: list, held: Residency, writing: int, budget: int, most: int | None) -> None:
    """Start requests while there is room for them, and a token of this iteration left."""
    queued = sum(left for _, left in filling)
    while waiting and queued < budget and (most is None or writing + len(filling) < most):
        need = held.admit(waiting[-1])
        if need is None:
            return
        filling.append([waiting.pop(), need])
        queued += need


def _fill(filling: list, budget: int) -> tuple[int, list[int]]:
    """Spend the budget on prompts in order; returns the tokens spent and who is ready to write."""
    spent, begun = 0, []
    while filling and (filling[0][1] <= budget - spent):
        i, left = filling.pop(0)
        spent += left
        begun.append(i)
    if filling and budget > spent:
        filling[0][1] -= budget - spent
        spent = budget
    return spent, begun


def _labelled(rows: list[tuple], total: int) -> xr.Dataset:
    names = ("time", "prefill", "decode", "memory")
    columns = zip(*rows, strict=True)
    data = xr.Dataset({name: ("step", np.array(column)) for name, column in zip(names, columns, strict=True)})
    data.time.attrs = {"long_name": "iteration", "units": "s"}
    for name in names[1:]:
        data[name].attrs = {"long_name": name, "units": "tokens"}
    computed = int(data.prefill.sum())
    work = data.prefill + data.decode
    return data.assign_attrs(
        makespan=float(data.time.sum()),
        saved=1 - computed / total,
        tokens=float(work.mean()),
        computed=computed,
        total=total,
    )
