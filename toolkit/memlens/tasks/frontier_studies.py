"""The experiments behind the notebook on bytes against loss, and `datasets/kv_frontier`: one function for each column."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from memlens.catalog.kv_taxonomy import coverage
from memlens.kv.advice import PLANS, Advice
from memlens.kv.budget import prefix_search
from memlens.kv.cache import Prefilled, compress, continue_with
from memlens.kv.d2o import d2o
from memlens.kv.kivi import kivi
from memlens.kv.ksort import block_floats, ksort
from memlens.kv.plan import Plan
from memlens.kv.policies import Policy, full, h2o, prefixkv, snapkv
from memlens.kv.prefixkv import layer_mass, prefix_curves
from memlens.kv.retrieval import shadowkv
from memlens.models.hooks import rotary_frequencies
from memlens.tasks.cache_probes import kl_divergence
from memlens.tasks.cache_studies import PROMPT, REST, TEXTS
from memlens.tasks.merge_studies import passage, whole

__all__ = [
    "KEPT", "KINDS", "PROMPT", "REST", "TEXTS", "advice_data", "by_name", "coverage_data", "figure_data",
    "labelled", "leaf_policies", "losses", "measure", "passage", "plans", "share", "whole",
]  # fmt: skip

KEPT, BITS, DROPPED = (0.125, 0.1875, 0.25, 0.375, 0.4375, 0.5, 0.75), (16, 4, 2), (0.0, 0.25, 0.4)
KINDS = ("bits", "channels", "eviction", "merging", "combined")
HELD = ("payload", "scales", "indices", "residual", "slow")  # of a cache's bytes, what holds keys and values


def plans() -> list[Plan]:
    """The grid: tokens x bits x channels for H2O, tokens x bits for SnapKV and for D2O, which merges what goes into values."""
    grid = [Plan(bits=bits, dropped=dropped) for bits in BITS for dropped in DROPPED if (bits, dropped) != (16, 0.0)]
    grid += [Plan("H2O", kept, bits) for kept in KEPT for bits in BITS]
    grid += [Plan("H2O", kept, bits, 0.25) for kept in (0.25, 0.375, 0.5) for bits in BITS[:2]]
    grid += [Plan("SnapKV", kept, bits) for kept in (0.125, 0.25, 0.5) for bits in BITS[:2]]
    return grid + [Plan("D2O", kept, bits) for kept in (0.125, 0.25, 0.375, 0.5) for bits in BITS[:2]]


def by_name(names: Iterable[str]) -> list[Plan]:
    """The plans of the grid that have these names.

    Raises:
        KeyError: a name that the grid lacks.
    """
    table = {plan.name: plan for plan in plans()}
    return [table[name] for name in names]


def share(plan: Plan, config: Any, length: int = PROMPT) -> float:
    """Bytes of a plan's cache over those of the full cache, both with plain numbers of 16 bits."""
    return sum(plan.bytes(config, length).values()) / sum(Plan().bytes(config, length).values())


@torch.no_grad()
def measure(
    model: Any, ids: Tensor, filled: Prefilled, policies: Mapping[str, Policy], full: Tensor | None = None
) -> xr.Dataset:
    """What each policy costs on one prompt and what its cache holds.

    `kl` (arm): mean over what follows the prompt of KL(full || compressed) of the next-token distribution, nats. `held` (arm):
    bytes of the tensors that hold keys and values right after the prompt, in the model's own dtype.
    """
    rest, full = ids[:, filled.queries[0].shape[2] :], whole(model, ids, filled) if full is None else full
    kl, held = [], []
    for policy in policies.values():
        cache = compress(filled, policy)
        held.append(sum(cache.nbytes().get(part, 0) for part in HELD))
        kl.append(float(kl_divergence(full, continue_with(model, cache, rest)).mean()))
    out = xr.Dataset({"kl": ("arm", kl), "held": ("arm", held)}, {"arm": list(policies)})
    out.kl.attrs = {"long_name": "KL from the full cache", "units": "nats"}
    out.held.attrs = {"long_name": "keys and values held", "units": "bytes"}
    return out


def labelled(data: xr.Dataset, config: Any, length: int = PROMPT) -> xr.Dataset:
    """Measured plans with what the plan says: `share` of the full cache's bytes, `axes` that it compresses, and its `kind`."""
    chosen = by_name(data.arm.values)
    coords = {
        "share": ("arm", [share(plan, config, length) for plan in chosen]),
        "axes": ("arm", [plan.parts for plan in chosen]),
        "kind": ("arm", [_kind(plan) for plan in chosen]),
    }
    out = data.assign_coords(coords)
    out.share.attrs = {"long_name": "bytes, share of a 16-bit cache", "units": ""}
    return out


def _kind(plan: Plan) -> str:
    if plan.parts > 1:
        return "combined"
    return {"H2O": "eviction", "SnapKV": "eviction", "D2O": "merging"}.get(
        plan.select, "bits" if plan.bits != 16 else "channels"
    )


def figure_data(kl: xr.DataArray, named: Iterable[str] = ()) -> xr.Dataset:
    """`labelled` losses (arm) as (kind, arm) with the others NaN, and `name`, the text beside the points in `named`."""
    named = set(named)
    rows = [kl.where(kl.kind == kind).drop_vars(("kind", "axes")) for kind in KINDS]
    out = xr.concat(rows, xr.IndexVariable("kind", list(KINDS))).to_dataset(name="kl").reset_coords("share")
    out["share"] = kl.share.drop_vars(("kind", "axes", "share"))
    out["name"] = ("arm", [arm if arm in named else "" for arm in kl.arm.values])
    out.kl.attrs, out.share.attrs = kl.attrs, kl.share.attrs
    return out


@torch.no_grad()
def leaf_policies(model: Any, filled: Prefilled) -> dict[str, Policy]:
    """A method for each covered leaf of the taxonomy's token level, at about a quarter of a 16-bit cache's bytes.

    ShadowKV holds as much in fast memory, and half of the full cache in slow memory besides.
    """
    length, layers = filled.queries[0].shape[2], len(filled.queries)
    budget = length // 4
    # its fixed point lies 25 tokens from the end, so no layer has fewer than 32
    counts = prefix_search(prefix_curves(layer_mass(filled)), layers * budget, 31)
    return {
        "snapkv": snapkv(budget),
        "h2o": h2o(budget // 2, budget - budget // 2),
        "prefixkv": prefixkv([count / length for count in counts]),
        "d2o": d2o(0.25, keys="none")._replace(when="prompt"),
        "kivi": full().stored(kivi(2, group=32, residual=64)),
        "ksort": full().stored(block_floats(4, values=4, order=ksort(model))),
        "shadowkv": full().stored(shadowkv(rotary_frequencies(model), rank=30, budget=64, outliers=6)),
    }


def losses(kl: xr.DataArray) -> dict[str, float]:
    """The loss of each plan that `advise` considers, from measured ones (arm): 0 for the full cache; where it lies changes none."""
    known = {"full": 0.0, **{str(arm): float(kl.sel(arm=arm)) for arm in kl.arm.values}}
    return {plan.name: known[plan._replace(away=False).name] for plan in PLANS}


def advice_data(advice: Advice, config: Any, context: int, batch: int) -> xr.Dataset:
    """The bytes on the device of every plan that was considered, (answer, plan) GB: advised (best first), too large, unsuitable."""
    why = {one.name: one.why for one in advice.refused}
    table = {plan.name: plan for plan in PLANS}
    order = [one.name for one in advice.ranked] + [name for name in table if name in why]
    rows = {answer: [float("nan")] * len(order) for answer in ("advised", "too large", "unsuitable")}
    for place, name in enumerate(order):
        sizes = table[name].bytes(config, context, batch=batch)
        answer = "advised" if name not in why else "too large" if " leave " in why[name] else "unsuitable"
        rows[answer][place] = (sum(sizes.values()) - sizes.get("slow", 0)) / 1e9
    rows = {answer: row for answer, row in rows.items() if any(size == size for size in row)}
    out = xr.Dataset({"size": (("answer", "plan"), list(rows.values()))}, {"answer": list(rows), "plan": order})
    out.size.attrs, out.plan.attrs = {"long_name": "cache on the device", "units": "GB"}, {"long_name": ""}
    return out


def coverage_data() -> xr.Dataset:
    """`catalog.coverage` as (level, leaf), with short names of the leaves; NaN where a leaf is on another level."""
    counts = coverage()
    levels = list(dict.fromkeys(counts.level.values))
    rows = [counts.where(counts.level == level).drop_vars("level") for level in levels]
    out = xr.concat(rows, xr.IndexVariable("level", levels)).rename("methods")
    short = [path.split("/", 1)[1].replace("/", ": ") for path in counts.leaf.values]
    return out.assign_coords(leaf=("leaf", short, {"long_name": ""})).assign_attrs(counts.attrs).to_dataset()
