"""The experiments behind the cache notebooks and `datasets/kv`: one function for each column, so that either can run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import xarray as xr

from memlens import data
from memlens.kv.budget import tokens
from memlens.kv.policies import Policy, h2o, random_keep, snapkv, streaming
from memlens.tasks.cache_probes import ask_codes, code_lookup, natural_kl, stream_kl

__all__ = ["BUDGETS", "SEEDS", "SHARES", "TEXTS", "h2o_kl", "h2o_policies", "h2o_stream", "snapkv_arms", "snapkv_codes"]

TEXTS = {"paradise_lost": 2000, "hamlet": 3000, "areopagitica": 4000}  # verse, drama, prose: first token of 640
PROMPT, REST, STREAM, CHUNK = 512, 95, 640, 32
BUDGETS = (0.1, 0.2, 0.4)  # shares of the prompt
SHARES, SEEDS, WINDOW = (0.2, 0.4), (0, 1, 2), 16


def h2o_policies(budget: int, seed: int = 0) -> dict[str, Policy]:
    """H2O, half heavy hitters and half recent, and what it must beat at the same number of tokens."""
    return {
        "H2O": h2o(budget // 2, budget - budget // 2),
        "sink+recent": streaming(budget),
        "random+sink": random_keep(budget, generator=torch.Generator().manual_seed(seed)),
    }


def h2o_kl(model: Any, tokenizer: Any, name: str, shares: Sequence[float]) -> xr.DataArray:
    """KL from the full cache on one text, (budget, method, token) nats: 512 tokens compressed, 95 more read."""
    ids = data.text(name, start=TEXTS[name], length=PROMPT + REST, tokenizer=tokenizer)
    arms = {
        (share, method): policy
        for share in shares
        for method, policy in h2o_policies(tokens(length=PROMPT, ratio=share)).items()
    }
    flat = natural_kl(model, ids, PROMPT, {f"{share} {method}": policy for (share, method), policy in arms.items()})
    methods = list(h2o_policies(100))
    out = flat.drop_vars("method").data.reshape(len(shares), len(methods), -1)
    coords = {"budget": list(shares), "method": methods, "token": flat.token}
    kl = xr.DataArray(out, coords, ("budget", "method", "token"), "kl", flat.attrs)
    kl.budget.attrs = {"long_name": "budget", "units": "share of the prompt"}
    return kl


def h2o_stream(
    model: Any, tokenizer: Any, name: str, methods: Sequence[str] | None = None, *, length: int = STREAM
) -> xr.DataArray:
    """KL from the full cache on `length` streamed tokens with 128 held, (policy, position) nats, from 256 on."""
    ids = data.text(name, start=TEXTS[name], length=length, tokenizer=tokenizer)
    arms = {"half heavy, half recent": h2o(64, 64), "heavy only": h2o(128, 0), "sink+recent": streaming(128)}
    chosen = {method: arms[method] for method in methods or arms}
    return stream_kl(model, ids, chosen, chunk=CHUNK, start=256).rename(method="policy", token="position")


def snapkv_arms(share: float) -> dict[str, dict]:
    """The arms of the lookup experiment, as arguments of `ask_codes`."""

    def of(make):
        return lambda length: make(tokens(length=length, ratio=share))

    pooled = of(lambda budget: snapkv(budget, window=WINDOW))
    return {
        "SnapKV": {"policy": pooled},
        "no pooling": {"policy": of(lambda budget: snapkv(budget, window=WINDOW, kernel=1))},
        "window before the question": {"policy": pooled, "question_seen": False},
        "H2O": {"policy": of(lambda budget: h2o(budget // 2, budget - budget // 2))},
    }


def snapkv_codes(model: Any, tokenizer: Any, seed: int, shares: Sequence[float]) -> xr.Dataset:
    """24 codes, each asked for once: `nll` and `right` (budget, method, question, digit); `full` has no budget."""
    lookup = code_lookup(tokenizer, items=24, generator=torch.Generator().manual_seed(seed))
    full = ask_codes(model, lookup).drop_vars(["held", "line"])
    rows = [
        xr.concat([ask_codes(model, lookup, **arm).drop_vars(["held", "line"]) for arm in arms.values()], "method")
        for arms in map(snapkv_arms, shares)
    ]
    out = xr.concat(rows, "budget").assign_coords(budget=list(shares), method=list(snapkv_arms(0.5)))
    out = out.assign(full_nll=full.nll, full_right=full.right)
    out.budget.attrs = {"long_name": "budget", "units": "share of the prompt"}
    return out
