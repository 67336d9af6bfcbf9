"""The experiments behind the notebook on key channels and low rank, and `datasets/kv_thin`: one function for each column."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from memlens.attention.rope import unrope
from memlens.kv.cache import Prefilled
from memlens.kv.channels import at_channels, channel_energy, keep_channels, kept_channels, query_energy, widen
from memlens.kv.ksort import logit_error
from memlens.kv.lowrank import energy, low_rank
from memlens.kv.policies import Policy, full
from memlens.kv.think import think
from memlens.models.hooks import QKV, rotary_frequencies
from memlens.tasks.quantised_studies import TEXTS, copy_nll, passage

__all__ = [
    "LAMS", "RANKS", "TEXTS", "arms", "copy_nll", "energies", "from_prefill", "lams", "logit_errors", "passage",
    "rank_arms",
]  # fmt: skip

LAMS, RANKS, OBSERVED, LATER = (0.25, 0.4, 0.5, 0.6), (30, 48, 64), 32, 32
WAYS = ("query", "key", "random")


def arms(chosen: Iterable[float] = LAMS) -> dict[str, Policy]:
    """ThinK at several shares, what it must beat, and the whole cache. A fresh table draws the same random channels."""
    table = {"full": full()}
    for lam in chosen:
        for by in WAYS:
            draw = torch.Generator().manual_seed(0) if by == "random" else None
            table[f"{by} {lam}"] = full().stored(think(lam, tail=OBSERVED, by=by, generator=draw))
    return table


def rank_arms(model: Any, ranks: Iterable[int] = RANKS) -> dict[str, Policy]:
    """Keys as factors, made before and after rotary positions; values whole, attention to everything."""
    turns = {"before": rotary_frequencies(model), "after": None}
    return {f"{when} {r}": full().stored(low_rank(r, turns[when])) for r in ranks for when in turns}


def lams(nll: xr.DataArray) -> xr.DataArray:
    """The arms of `arms` as (by, lam), without the full cache."""
    rows = [[nll.sel(arm=f"{by} {lam}", drop=True) for lam in LAMS] for by in WAYS]
    share = xr.IndexVariable("lam", list(LAMS), {"long_name": "share of key channels dropped"})
    return xr.concat([xr.concat(row, share) for row in rows], xr.IndexVariable("by", list(WAYS))).rename("nll")


def from_prefill(filled: Prefilled) -> dict[int, QKV]:
    """Queries and keys after rotary positions, and values, of every layer of a prefill that kept its queries."""
    pairs = zip(filled.queries, filled.cache.layers, strict=True)
    return {index: QKV(q, layer.keys, layer.values) for index, (q, layer) in enumerate(pairs)}


@torch.no_grad()
def logit_errors(qkv: dict[int, QKV], chosen: Iterable[float] = LAMS, *, seed: int = 0) -> xr.DataArray:
    """Relative error of the logits of the newest 32 queries, channels chosen by the 32 before them, (by, lam), mean of layers.

    The queries that are scored are not those that chose.
    """
    chosen, draw = list(chosen), torch.Generator().manual_seed(seed)
    found = {(by, lam): [] for by in WAYS for lam in chosen}
    for x in qkv.values():
        seen, later, k = x.q[:, :, -LATER - OBSERVED : -LATER], x.q[:, :, -LATER:], x.k[:, :, :-LATER]
        random = torch.rand(k.shape[0], k.shape[1], k.shape[3], generator=draw)
        scores = {"query": query_energy(seen, k.shape[1]) * channel_energy(k), "key": channel_energy(k), "random": random}
        for by, lam in found:
            keep = keep_channels(scores[by], kept_channels(k.shape[-1], lam))
            found[by, lam].append(logit_error(later, k, widen(at_channels(k, keep), keep, k.shape[-1])))
    values = [[sum(found[by, lam]) / len(qkv) for lam in chosen] for by in WAYS]
    out = xr.DataArray(values, {"by": list(WAYS), "lam": chosen}, ("by", "lam"), "error")
    out.lam.attrs["long_name"] = "share of key channels dropped"
    return out.astype("float32").assign_attrs(long_name="relative error of the logits", units="")


@torch.no_grad()
def energies(filled: Prefilled, frequency: Tensor) -> xr.DataArray:
    """Share of the energy in the largest singular values, (layer, what, rank): keys before and after rotation, values."""
    rows = []
    for layer in filled.cache.layers:
        place = torch.arange(layer.keys.shape[2])
        rows.append([energy(x)[0] for x in (unrope(layer.keys, place, frequency), layer.keys, layer.values)])
    data = torch.stack([torch.stack(row) for row in rows])
    coords = {
        "layer": range(len(rows)),
        "what": ["keys before", "keys after", "values"],
        "rank": range(1, data.shape[-1] + 1),
    }
    out = xr.DataArray(data.numpy(), coords, ("layer", "what", "rank"), "energy")
    return out.assign_attrs(long_name="energy kept", units="")
