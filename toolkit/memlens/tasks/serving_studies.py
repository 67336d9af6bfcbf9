"""The experiments behind the notebook on serving: decoding with attention elsewhere, turns, plans by context, this CPU's times."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import xarray as xr
from torch import Tensor

from memlens import check
from memlens.attention.exact import attend
from memlens.cost.serving.hybrid_trace import HYBRIDS, Job, simulate_hybrid
from memlens.cost.serving.roofline import LLAMA3_70B, Pools, cost_per_token

__all__ = ["Decoded", "cheapest", "decode", "hybrid_gains", "layer_times", "ping_pong", "plans"]

MOST_DEVICES = 16


class Decoded(NamedTuple):
    tokens: Tensor  # (B, new) ids
    logits: Tensor  # (B, new, V) that they were chosen from


@torch.no_grad()
def decode(model: Any, ids: Tensor, new: int, cache: Any = None) -> Decoded:
    """Greedy decoding, one forward for each token, in any cache that transformers takes (default: its own)."""
    check.shapes("decode", ids=(ids, "batch length"))
    check.at_least("decode", 1, new=new)
    logits, step = [], ids
    for _ in range(new):
        out = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
        logits.append(out.logits[:, -1])
    return Decoded(torch.stack([x.argmax(-1) for x in logits], 1), torch.stack(logits, 1))


def ping_pong(
    model: Any, pool: Any, *, context: int, batch: int = 1, layers: int = 10, tokens: int = 2, rounds: int = 16
) -> xr.Dataset:  # fmt: skip
    """Two batches with attention in the pool: one after the other, and taking turns; seconds for a slice, by round.

    A slice is what the model does between two attentions. With one batch at a time, `model` (round) is its time and `attention`
    (round) the time that it waits for the answer; `turns` (round) is the time for a slice when two batches share the devices. The
    head, which no attention follows, is left out. Rounds alternate, so that a load from elsewhere meets both; take medians.

    Args:
        context: random tokens that each sequence begins with.
        batch: sequences in a batch.
        layers: of the model, the first ones, which are enough for a time per slice.
        tokens: decoded for each sequence in a round.
    """
    check.at_least("ping_pong", 1, context=context, batch=batch, layers=layers, tokens=tokens, rounds=rounds)
    requests = [pool.request(), pool.request()]
    for request in requests:
        pool.fill(request, batch, context, layers)
    slices, rows = 2 * tokens * layers, []
    with _first(model, layers), ThreadPoolExecutor(2) as threads:
        for _ in range(rounds + 1):  # the first warms up
            start, waited = time.perf_counter(), pool.waited
            for request in requests:
                _write(model, request, batch, tokens)
            waited = pool.waited - waited
            busy = time.perf_counter() - start - waited
            start = time.perf_counter()
            for job in [threads.submit(_write_in_turns, model, pool, request, batch, tokens) for request in requests]:
                job.result()
            rows.append([busy, waited, time.perf_counter() - start])
    for request in requests:
        request.reset()
    columns = zip(*rows[1:], strict=True)
    names = ("model", "attention", "turns")
    return xr.Dataset({name: ("round", [x / slices for x in column]) for name, column in zip(names, columns, strict=True)})


@contextmanager
def _first(model: Any, layers: int) -> Iterator[None]:
    """Only the first layers of a model run inside."""
    whole = model.base_model.layers
    try:
        model.base_model.layers = whole[:layers]
        yield
    finally:
        model.base_model.layers = whole


@torch.no_grad()
def _write(model: Any, request: Any, batch: int, tokens: int) -> None:
    for _ in range(tokens):
        model.base_model(torch.zeros(batch, 1, dtype=torch.long), past_key_values=request, use_cache=True)


def _write_in_turns(model: Any, pool: Any, request: Any, batch: int, tokens: int) -> None:
    with pool.taking_turns():
        _write(model, request, batch, tokens)


def plans(*, two_pools: bool) -> list[Pools]:
    """Ways to spend up to 16 devices: H100s, or H100s for the model and H20s for attention with 2 or 3 batches in flight."""
    if not two_pools:
        return [Pools(("h100", count)) for count in range(1, MOST_DEVICES + 1)]
    counts = [(a, b) for a in range(1, MOST_DEVICES) for b in range(1, MOST_DEVICES + 1 - a)]
    return [Pools(("h100", a), ("h20", b), batches) for a, b in counts for batches in (2, 3)]


def cheapest(contexts: Iterable[int], shape: Any = LLAMA3_70B) -> xr.Dataset:
    """The cheapest token by context, one pool against two: `cost` (pool, context) in $, `gain` (context), `plan` in words."""
    contexts = list(contexts)
    best = [
        [min((cost_per_token(plan, shape=shape, context=l), plan) for plan in plans(two_pools=two)) for l in contexts]
        for two in (False, True)
    ]
    data = xr.Dataset(
        {
            "cost": (("pool", "context"), [[1e6 * cost for cost, _ in row] for row in best]),
            "plan": (("pool", "context"), [[_words(plan) for _, plan in row] for row in best]),
        },
        {"pool": ["H100 only", "H100 + H20"], "context": contexts},
    )
    data["gain"] = data.cost[0].drop_vars("pool") / data.cost[1].drop_vars("pool")
    data.cost.attrs = {"long_name": "a million tokens", "units": "$"}
    data.gain.attrs = {"long_name": "tokens per dollar, two pools over one", "units": ""}
    data.context.attrs = {"long_name": "context", "units": "tokens"}
    return data


def _words(plan: Pools) -> str:
    return " + ".join(f"{pool[1]} {pool[0].upper()}" for pool in (plan.model, plan.attention) if pool)


def hybrid_gains(
    presets: Iterable[str], prompts: Iterable[int], outputs: Iterable[int], policies: Iterable[str], *, requests: int = 200
) -> xr.DataArray:
    """Throughput over the GPU alone, (device, policy, output, prompt); NaN where a request's cache cannot fit the GPU.

    A trace has at least `requests` equal ones, and 24 times as many as the GPU holds, so that its beginning counts little.
    """
    presets, prompts, outputs, policies = map(list, (presets, prompts, outputs, policies))
    found = xr.DataArray(
        float("nan"),
        {"device": presets, "policy": policies, "output": outputs, "prompt": prompts},
        ("device", "policy", "output", "prompt"),
        "gain",
        {"long_name": "throughput over the GPU alone", "units": ""},
    )
    for name in presets:
        for output in outputs:
            for prompt in prompts:
                if prompt + output > HYBRIDS[name].room:
                    continue
                count = max(requests, 24 * HYBRIDS[name].room // (prompt + output))
                trace, place = [Job(prompt, output)] * count, {"device": name, "output": output, "prompt": prompt}
                alone = simulate_hybrid(trace, HYBRIDS[name], "gpu").throughput
                for policy in policies:
                    gain = simulate_hybrid(trace, HYBRIDS[name], policy).throughput / alone
                    found.loc[place | {"policy": policy}] = gain
    found.prompt.attrs = {"long_name": "prompt", "units": "tokens"}
    return found


@torch.no_grad()
def layer_times(model: Any, contexts: Iterable[int], *, repeats: int = 7) -> xr.Dataset:
    """CPU seconds of one decoded token in one layer on this machine: `linear`, and `attention` (context). Medians."""
    text, contexts = model.config.get_text_config(), list(contexts)
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    dim, layer = text.hidden_size // heads, model.model.layers[0]
    x, generator = torch.randn(1, 1, text.hidden_size), torch.Generator().manual_seed(0)
    q = torch.randn(1, heads, 1, dim, generator=generator)

    def linear() -> None:
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.self_attn.o_proj):
            part(x)
        layer.mlp(x)

    found = []
    for context in contexts:
        k, v = (torch.randn(1, kv_heads, context, dim, generator=generator) for _ in range(2))
        found.append(_median(lambda k=k, v=v: attend(q, k, v), repeats))
    data = xr.Dataset({"linear": _median(linear, repeats), "attention": ("context", found)}, {"context": contexts})
    data.context.attrs = {"long_name": "context", "units": "tokens"}
    return data


def _median(work: Any, repeats: int, inner: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        for _ in range(inner):
            work()
        times.append((time.thread_time() - start) / inner)
    return sorted(times)[repeats // 2]
