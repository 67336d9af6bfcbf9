"""A trace of requests on a small GPU with a host: GPU alone, pipelining, overlap, or a scheduler that chooses each time.

Requests come in order. One goes to the GPU if its whole cache will fit there, else to the host, if the policy uses the host and
its CPU can attend for one more in the GPU's time. Every iteration of a pool's requests is timed by rooflines; iterations in which
nobody comes or goes are taken together (one step of the result). Attention inside a prefill is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr

from memlens import check
from memlens.cost.devices import Device, device, link
from memlens.cost.memory import LLAMA_7B, Llama, llama_weights
from memlens.cost.serving.hybrid import hybrid_throughput, prefers_pipelining
from memlens.cost.serving.roofline import parameters, token_bytes

__all__ = ["HYBRIDS", "POLICIES", "Hybrid", "Job", "simulate_hybrid"]

POLICIES = ("gpu", "pipelining", "overlap", "apex", "best")
SPAN = 256  # iterations taken together at most: contexts grow meanwhile


class Job(NamedTuple):
    prompt: int  # tokens
    output: int  # tokens, at least 1


class Hybrid(NamedTuple):
    """A GPU, its host and the link between them, serving one model in half precision."""

    gpu: Device
    host: Device
    link: float  # B/s
    shape: Llama = LLAMA_7B
    usable: float = 0.95  # of either memory

    @property
    def room(self) -> int:
        """Tokens whose keys and values fit the GPU beside the weights."""
        weights = 2 * sum(weight.numel for weight in llama_weights(self.shape))
        return max(0, int((self.usable * self.gpu.memory - weights) / token_bytes(self.shape)))

    def linear(self, rows: float) -> float:
        """GPU seconds of a layer's linear part for a batch of rows."""
        count = parameters(self.shape) / self.shape.num_hidden_layers
        return max(2 * count * rows / self.gpu.flops, 2 * count / self.gpu.bandwidth)

    def attend(self, tokens: float, *, host: bool = False) -> float:
        """Seconds of a layer's attention over caches of `tokens` in all; on the host the link may be slower."""
        each = token_bytes(self.shape) / self.shape.num_hidden_layers
        return tokens * each / (self.host if host else self.gpu).bandwidth

    def ship(self, rows: float) -> float:
        """Seconds on the link for a layer's queries, new keys and values, and outputs of host requests."""
        return rows * 2 * 4 * self.shape.hidden_size / self.link


HYBRIDS = {
    "t4": Hybrid(device("t4"), device("host-t4"), link("pcie3")),
    "a10": Hybrid(device("a10"), device("host-a10"), link("pcie4")),
}


class _Pool:
    """Requests under way on one side: their contexts and what is left to write."""

    def __init__(self):
        self.context, self.left = np.zeros(0), np.zeros(0)

    def __len__(self) -> int:
        return len(self.context)

    def add(self, job: Job) -> None:
        self.context, self.left = np.append(self.context, job.prompt), np.append(self.left, job.output)

    def advance(self, tokens: float) -> float:
        """Write up to `tokens` more for each; returns how many were written, and drops who is done."""
        written = np.minimum(tokens, self.left)
        self.context, self.left = self.context + written, self.left - written
        stay = self.left > 1e-9
        self.context, self.left = self.context[stay], self.left[stay]
        return float(written.sum())

    @property
    def reserved(self) -> float:
        return float((self.context + self.left).sum())


class _Step(NamedTuple):
    gpu: float  # s busy in an iteration
    cpu: float
    rate: float  # tokens that each host request writes in an iteration


def simulate_hybrid(trace: Sequence[Job], device: Hybrid, policy: str) -> xr.Dataset:
    """What happens, step by step, until every request is answered.

    Args:
        trace: requests in the order in which they are served.
        device: GPU, host and model; a preset of `HYBRIDS` or your own.
        policy: "gpu", "pipelining" or "overlap" always; "apex" chooses between the last two by the inequality of
            `apex_threshold`; "best" takes what `hybrid_throughput` says is fastest.
    Returns:
        `wall` (step), s; `busy` (step, device) with device gpu and cpu, s, never above wall; `tokens` (step, device), by where
        the cache is; `strategy`, `iterations` and requests still `waiting` (step). Attribute `throughput`: tokens/s while
        requests wait, so that neither an empty machine nor the last stragglers count.
    Raises:
        ValueError: an unknown policy, an empty trace, or a request whose cache can never fit the GPU.
    """
    check.one_of("simulate_hybrid", POLICIES, policy=policy)
    _check_trace(trace, device)
    waiting, gpu, cpu, rows = list(trace), _Pool(), _Pool(), []
    layers = device.shape.num_hidden_layers
    while waiting or len(gpu) or len(cpu):
        fresh = _admit(waiting, gpu, cpu, device, policy)
        strategy = _strategy(policy, device, gpu, cpu, fresh)
        one = _iteration(strategy, device, gpu, cpu, fresh)
        # the prefill's iteration stands alone; then as many as pass before somebody is done
        count = 1 if fresh else _until_done(gpu, cpu, one.rate)
        if count > 1:
            one = _iteration(strategy, device, gpu, cpu, 0, ahead=(count - 1) / 2)
        wall = max(one.gpu, one.cpu) * layers
        tokens = gpu.advance(count), cpu.advance(count * one.rate)
        busy = one.gpu * layers * count, one.cpu * layers * count
        rows.append((wall * count, busy, tokens, strategy, count, len(waiting)))
    return _labelled(rows)


def _check_trace(trace: Sequence[Job], device: Hybrid) -> None:
    check.at_least("simulate_hybrid", 1, requests=len(trace))
    longest = max(job.prompt + job.output for job in trace)
    if longest > device.room:
        came = f"a request of {longest} tokens"
        check.fail("simulate_hybrid", came, f"at most {device.room}, what fits the {device.gpu.name}", "shorten it")
    check.at_least("simulate_hybrid", 1, prompt=min(j.prompt for j in trace), output=min(j.output for j in trace))


def _admit(waiting: list[Job], gpu: _Pool, cpu: _Pool, device: Hybrid, policy: str) -> int:
    """Move requests to where they fit; returns the prompt tokens to prefill now."""
    fresh = 0
    while waiting:
        need = waiting[0].prompt + waiting[0].output
        if gpu.reserved + need <= device.room:
            pool = gpu
        elif policy != "gpu" and device.host.bandwidth > 0 and _host_takes(waiting[0], gpu, cpu, device, policy):
            pool = cpu
        else:
            return fresh
        fresh += waiting[0].prompt
        pool.add(waiting.pop(0))
    return fresh


def _host_takes(job: Job, gpu: _Pool, cpu: _Pool, device: Hybrid, policy: str) -> bool:
    """Whether the host has the memory, and its CPU the time, for one more."""
    total = cpu.reserved + job.prompt + job.output
    if total * token_bytes(device.shape) > device.usable * device.host.memory:
        return False
    trial = _Pool()
    trial.context = np.append(cpu.context + cpu.left / 2, job.prompt + job.output / 2)
    trial.left = np.append(cpu.left, job.output)
    one = _iteration(_strategy(policy, device, gpu, trial, 0), device, gpu, trial, 0)
    return one.cpu <= one.gpu


def _strategy(policy: str, device: Hybrid, gpu: _Pool, cpu: _Pool, fresh: int) -> str:
    if not len(cpu):
        return "gpu"
    if policy in ("gpu", "pipelining", "overlap"):
        return policy
    if not len(gpu):
        return "overlap"
    mean = float(np.concatenate((gpu.context, cpu.context)).mean())
    profile = {
        "N_G": 1 / device.attend(mean), "N_C": 1 / device.attend(mean, host=True),
        "T_gl": device.linear(len(gpu)), "T_ga": device.attend(gpu.context.sum()),
    }  # fmt: skip
    if policy == "best":
        return max(("pipelining", "overlap"), key=lambda name: hybrid_throughput(name, **profile))
    return "pipelining" if prefers_pipelining(**profile, prefill=device.linear(fresh) if fresh else 0.0) else "overlap"


def _iteration(strategy: str, device: Hybrid, gpu: _Pool, cpu: _Pool, fresh: int, ahead: float = 0.0) -> _Step:
    """Seconds of one layer, `ahead` iterations from now."""
    layers = device.shape.num_hidden_layers
    own = device.attend(gpu.context.sum() + ahead * len(gpu))
    if strategy == "gpu":
        return _Step(device.linear(len(gpu) + fresh) + own, 0.0, 0.0)
    rate = 1.0 if strategy == "pipelining" else 1 / layers
    held = cpu.context.sum() + ahead * rate * len(cpu)
    if strategy == "pipelining":
        work = device.linear(len(gpu) + fresh) * (len(gpu) > 0) + device.linear(len(cpu)) + own
        return _Step(work, max(device.attend(held, host=True), device.ship(len(cpu))), rate)
    # each host request is at one layer: a layer sees a share 1/layers of them
    share = len(cpu) / layers
    work = device.linear(len(gpu) + share + fresh) + own
    return _Step(work, max(device.attend(held / layers, host=True), device.ship(share)), rate)


def _until_done(gpu: _Pool, cpu: _Pool, rate: float) -> int:
    left = [pool.left.min() / speed for pool, speed in ((gpu, 1.0), (cpu, rate)) if len(pool) and speed > 0]
    return int(max(1, min(SPAN, np.ceil(min(left) - 1e-9))))


def _labelled(rows: list) -> xr.Dataset:
    wall, busy, tokens, strategy, count, waiting = zip(*rows, strict=True)
    data = xr.Dataset(
        {
            "wall": ("step", np.array(wall)), "busy": (("step", "device"), np.array(busy)),
            "tokens": (("step", "device"), np.array(tokens)), "strategy": ("step", list(strategy)),
            "iterations": ("step", list(count)), "waiting": ("step", list(waiting)),
        },
        {"step": range(len(rows)), "device": ["gpu", "cpu"]},
    )  # fmt: skip
    data.wall.attrs, data.busy.attrs = ({"long_name": word, "units": "s"} for word in ("time", "busy"))
    data.tokens.attrs = {"long_name": "tokens written", "units": ""}
    loaded = data.isel(step=data.waiting > 0) if max(waiting) else data
    return data.assign_attrs(throughput=float(loaded.tokens.sum() / loaded.wall.sum()))
