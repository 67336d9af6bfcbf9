"""How well a semantic cache answers, by category and threshold, and what it does over a trace with a clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import xarray as xr
from torch import Tensor

from memlens import check
from memlens.recall.store import CategoryPolicy, SemanticCache
from memlens.tasks.category_queries import CATEGORIES, Query

__all__ = ["GRID", "HALVES", "Trace", "answered", "calibrate", "curves", "replay", "trace"]

GRID = (*(round(0.50 + 0.01 * step, 2) for step in range(50)), 1.0)
STORED = (0, 1)  # wordings whose answers are cached
HALVES = {"calibrated": (2, 3), "held out": (4, 5)}  # wordings that are asked
UNKNOWN = 4  # every fourth intent is in no cache: whatever is answered to it is wrong


def filled(
    queries: Sequence[Query], vectors: Tensor, policies: Mapping[str, CategoryPolicy], index: str = "flat"
) -> SemanticCache:  # fmt: skip
    """A cache of the stored wordings of all intents but every fourth; an answer is the number of its intent."""
    cache = SemanticCache(policies, index=index, dim=vectors.shape[1])
    for query, vector in zip(queries, vectors, strict=True):
        if query.wording in STORED and query.intent % UNKNOWN != UNKNOWN - 1:
            cache.insert(query.text, vector, query.category, query.intent, now=0.0)
    return cache


def answered(
    queries: Sequence[Query], vectors: Tensor, policies: Mapping[str, CategoryPolicy], half: str, *, index: str = "flat"
) -> xr.Dataset:  # fmt: skip
    """`hit` (share of queries answered rightly) and `false` (answered wrongly), by category, asked of a real cache.

    Args:
        half: which wordings are asked, "calibrated" or "held out".
    """
    check.one_of("answered", HALVES, half=half)
    cache = filled(queries, vectors, policies, index)
    counts = {category: [0, 0, 0] for category in CATEGORIES}
    for query, vector in zip(queries, vectors, strict=True):
        if query.wording not in HALVES[half]:
            continue
        hit = cache.lookup(query.text, vector, query.category, now=0.0)
        count = counts[query.category]
        count[0] += 1
        if hit is not None:
            right = hit.answer == query.intent and query.intent % UNKNOWN != UNKNOWN - 1
            count[1 if right else 2] += 1
    shares = {name: [counts[c][place] / counts[c][0] for c in CATEGORIES] for name, place in (("hit", 1), ("false", 2))}
    data = xr.Dataset({name: ("category", values) for name, values in shares.items()}, {"category": list(CATEGORIES)})
    data.hit.attrs, data["false"].attrs = {"long_name": "answered rightly"}, {"long_name": "answered wrongly"}
    return data.assign_coords(asked=("category", [counts[c][0] for c in CATEGORIES]))


def curves(queries: Sequence[Query], vectors: Tensor, half: str, grid: Sequence[float] = GRID) -> xr.Dataset:
    """`answered` with one threshold for every category, (threshold, category)."""
    rows = [answered(queries, vectors, {c: CategoryPolicy(threshold) for c in CATEGORIES}, half) for threshold in grid]
    out = xr.concat(rows, xr.IndexVariable("threshold", list(grid)))
    out.threshold.attrs["long_name"] = "least cosine of a hit"
    return out


def calibrate(curve: xr.Dataset, *, most: float = 0.03) -> dict[str, float]:
    """The lowest threshold of each category at which, from there on, at most this share is answered wrongly; and "global".

    "global" is one threshold that keeps the promise in every category; "pooled" keeps it over all queries together.
    """
    check.within("calibrate", 0, 1, most=most)
    grid = curve.threshold.values

    def lowest(false: xr.DataArray) -> float:
        bad = (false > most).values.nonzero()[0]
        return float(grid[min(len(grid) - 1, bad[-1] + 1)] if len(bad) else grid[0])

    found = {category: lowest(curve["false"].sel(category=category)) for category in CATEGORIES}
    pooled = (curve["false"] * curve.asked).sum("category") / curve.asked.sum("category")
    return {**found, "global": max(found.values()), "pooled": lowest(pooled)}


# --- a trace with a clock -------------------------------------------------------------------------------------------


class Trace(NamedTuple):
    place: list[int]  # of the query among all
    now: list[float]  # seconds


SHARES = {"code": 0.3, "chat": 0.3, "finance": 0.2, "legal": 0.2}  # of the traffic
ZIPF = ("code", "chat")  # asked again and again; the others uniformly
LIFE = {"finance": 60.0}  # seconds for which an answer is true


def trace(queries: Sequence[Query], count: int = 2000, *, gap: float = 1.0, generator: torch.Generator) -> Trace:
    """`count` queries, one each `gap` seconds on average: the category by its share, the intent Zipf or uniform, any wording."""
    places = {c: [i for i, query in enumerate(queries) if query.category == c] for c in CATEGORIES}
    kinds = torch.multinomial(torch.tensor(list(SHARES.values())), count, replacement=True, generator=generator).tolist()
    waits = torch.empty(count).exponential_(1 / gap, generator=generator)
    chosen = []
    for kind in kinds:
        of_kind = places[list(SHARES)[kind]]
        intents = len(of_kind) // 6
        weight = 1 / torch.arange(1, intents + 1) if list(SHARES)[kind] in ZIPF else torch.ones(intents)
        intent = int(torch.multinomial(weight, 1, generator=generator))
        chosen.append(of_kind[6 * intent + int(torch.randint(6, (), generator=generator))])
    return Trace(chosen, waits.cumsum(0).tolist())


def replay(
    queries: Sequence[Query], vectors: Tensor, asked: Trace, policies: Mapping[str, CategoryPolicy], *, load: float = 0.0,
    index: str = "flat", **how: float,
) -> xr.Dataset:  # fmt: skip
    """Shares by category over a trace, misses asked of the model and cached: `hit`, `false`, `stale`.

    `false` is a hit with another intent; `stale` a hit whose answer was true once and is no more.

    Args:
        load, how: as `SemanticCache.lookup`.
    """
    cache = SemanticCache(policies, index=index, dim=vectors.shape[1])
    counts = {c: {"asked": 0, "hit": 0, "false": 0, "stale": 0} for c in CATEGORIES}
    for place, now in zip(asked.place, asked.now, strict=True):
        query, vector = queries[place], vectors[place]
        count = counts[query.category]
        count["asked"] += 1
        hit = cache.lookup(query.text, vector, query.category, now=now, load=load, **how)
        if hit is None:
            cache.insert(query.text, vector, query.category, (query.intent, now), now=now)
            continue
        intent, written = hit.answer
        count["hit"] += 1
        count["false"] += intent != query.intent
        count["stale"] += intent == query.intent and now - written >= LIFE.get(query.category, float("inf"))
    shares = {n: ("category", [counts[c][n] / counts[c]["asked"] for c in CATEGORIES]) for n in ("hit", "false", "stale")}
    data = xr.Dataset(shares, {"category": list(CATEGORIES)})
    return data.assign_coords(asked=("category", [counts[c]["asked"] for c in CATEGORIES]))
