"""The experiments behind the notebooks on layer budgets and on merging, and `datasets/kv_merging`, a function for each column."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import xarray as xr
from torch import Tensor

from memlens import check, data
from memlens.kv.budget import allocate, density_softmax, prefix_search, tokens
from memlens.kv.cache import Prefilled, compress, continue_with, prefill
from memlens.kv.d2o import d2o, layer_density
from memlens.kv.elastic import Shield, elastic
from memlens.kv.policies import Policy, h2o
from memlens.kv.prefixkv import layer_mass, prefix_curves
from memlens.tasks.cache_probes import kl_divergence
from memlens.tasks.cache_studies import PROMPT, REST, TEXTS

__all__ = [
    "FOURFOLD", "KEPT", "PROMPTS", "Profile", "SHARES", "TEXTS", "Written", "anchor_arms", "anchor_kl", "chosen",
    "compared", "fold_arms", "fold_kl", "held_while_writing", "layer_counts", "layer_kl", "passage", "profile",
    "smallest_mass", "whole",
]  # fmt: skip

SHARES, KEPT = (0.1, 0.2, 0.4), (0.25, 0.5)  # of the prompt's tokens that stay
SINKS, RECENT = 4, 0.25  # what every arm keeps anyway: the first tokens, and of the rest the newest share
PROMPTS = {**{name: (name, start) for name, start in TEXTS.items()}, "macbeth": ("macbeth", 3000)}
FOURFOLD = "every token four times"


def passage(tokenizer: Any, name: str, length: int = PROMPT + REST) -> Tensor:
    """The tokens of a prompt and of what follows it, (1, length).

    Raises:
        ValueError: a name that is neither in `PROMPTS` nor `FOURFOLD`.
    """
    check.one_of("passage", (*PROMPTS, FOURFOLD), name=name)
    text, start = PROMPTS["paradise_lost" if name == FOURFOLD else name]
    if name != FOURFOLD:
        return data.text(text, start=start, length=length, tokenizer=tokenizer)
    quarter = data.text(text, start=start, length=-(-length // 4), tokenizer=tokenizer)
    return quarter.repeat_interleave(4, 1)[:, :length]


@torch.no_grad()
def compared(
    model: Any, ids: Tensor, filled: Prefilled, policies: Mapping[str, Policy], full: Tensor | None = None
) -> list[float]:
    """Mean KL(full || compressed) over what follows the prompt, nats, for each policy; as `natural_kl`, one prefill for many.

    `full`: what `whole` returned for this prompt, where it is at hand.
    """
    rest, full = ids[:, filled.queries[0].shape[2] :], whole(model, ids, filled) if full is None else full
    return [float(kl_divergence(full, continue_with(model, compress(filled, p), rest)).mean()) for p in policies.values()]


def whole(model: Any, ids: Tensor, filled: Prefilled) -> Tensor:
    """The logits (1, n, V) of what follows the prompt, on the full cache."""
    return continue_with(model, filled.cache.fork(), ids[:, filled.queries[0].shape[2] :])


# --- layer budgets -------------------------------------------------------------------------------------------------


class Profile(NamedTuple):
    """What the rules for sharing look at, from one prompt."""

    mass: Tensor  # (layers, L): attention on each token, mean over heads
    weighted: Tensor  # (layers, L): the same, times the length of the value
    density: Tensor  # (layers,): D2O's variance


def profile(filled: Prefilled) -> Profile:
    """The profile of a prompt that was prefilled with its queries."""
    return Profile(layer_mass(filled), layer_mass(filled, by_value=True), layer_density(filled))


def layer_counts(of: Profile, total: int) -> dict[str, list[int]]:
    """Tokens for each layer under every rule; each list sums to `total`, no layer has fewer than 6.

    "no sinks" leaves the mass of the first four tokens out, "by value" weights mass by the length of the value.
    """
    (layers, length), low = of.mass.shape, SINKS + 2
    curves = {
        "prefix": prefix_curves(of.mass), "no sinks": prefix_curves(of.mass, sinks=SINKS),
        "by value": prefix_curves(of.weighted), "both": prefix_curves(of.weighted, sinks=SINKS),
    }  # fmt: skip
    density = density_softmax(of.density, total / (layers * length))
    falling = torch.linspace(1.6, 0.4, layers)
    return {
        "uniform": allocate([1.0] * layers, total, low=low, high=length),
        "pyramid": allocate(falling, total, low=low, high=length),
        "density": allocate(density, total, low=low, high=length),
        **{name: prefix_search(curve, total, low - 1) for name, curve in curves.items()},
    }


def smallest_mass(curves: Tensor, counts: Sequence[int]) -> float:
    """The smallest share of its mass that any layer keeps."""
    return min(float(row[count - 1]) for row, count in zip(curves, counts, strict=True))


def chosen(counts: Sequence[int]) -> Policy:
    """H2O's choice within each layer and kv head, with the layer's own number of tokens."""
    return h2o(1, 0)._replace(budget=tuple(counts), first=SINKS, last=RECENT)


def layer_kl(
    model: Any, ids: Tensor, filled: Prefilled, shares: Sequence[float] = SHARES, arms: Sequence[str] | None = None,
    full: Tensor | None = None,
) -> xr.DataArray:  # fmt: skip
    """KL from the full cache under each layer budget, (budget, arm) nats."""

    seen, length = profile(filled), filled.queries[0].shape[2]

    def policies(share: float) -> dict[str, Policy]:
        counts = layer_counts(seen, len(filled.queries) * tokens(length=length, ratio=share))
        return {arm: chosen(counts[arm]) for arm in arms or counts}

    return _grid(model, ids, filled, shares, policies, full)


# --- merging -------------------------------------------------------------------------------------------------------


def fold_arms(share: float) -> dict[str, Policy]:
    """D2O's choice; what is dropped is lost, or merged into the values, into rotated keys, into keys before rotation."""
    merging = {"values": "none", "rotated keys": "post_rope", "unrotated keys": "pre_rope"}
    return {
        "evicted": d2o(share)._replace(merge=None),
        **{name: d2o(share, keys=keys) for name, keys in merging.items()},
    }


def fold_kl(
    model: Any, ids: Tensor, filled: Prefilled, shares: Sequence[float] = SHARES, arms: Sequence[str] | None = None,
    full: Tensor | None = None,
) -> xr.DataArray:  # fmt: skip
    """KL from the full cache for D2O's ways of merging, (budget, arm) nats."""
    return _grid(model, ids, filled, shares, lambda share: _only(fold_arms(share), arms), full)


def anchor_arms(kept: float) -> dict[str, Policy]:
    """Elastic Cache with its own anchors, and guarded: sinks, recent and heavy anchors take nothing in, buckets are short."""
    ratio, recent, guarded = 1.0 - kept, 32, {"reach": 2, "shield": Shield(4, 32, 8)}
    plain = {
        "evicted": elastic(ratio)._replace(merge=None),
        "merged": elastic(ratio),
        "merged, counted": elastic(ratio, counts=True),
    }
    careful = {
        "guarded: evicted": elastic(ratio, 4)._replace(merge=None),
        "guarded: merged": elastic(ratio, 4, **guarded),
        "guarded: counted": elastic(ratio, 4, counts=True, **guarded),
    }
    return plain | {name: policy._replace(last=recent) for name, policy in careful.items()}


def anchor_kl(
    model: Any, ids: Tensor, filled: Prefilled, shares: Sequence[float] = KEPT, arms: Sequence[str] | None = None,
    full: Tensor | None = None,
) -> xr.DataArray:  # fmt: skip
    """KL from the full cache for merging by position, (budget, arm) nats."""
    return _grid(model, ids, filled, shares, lambda kept: _only(anchor_arms(kept), arms), full)


class Written(NamedTuple):
    held: list[int]  # after each forward, in every layer
    anchors: list[int]  # where the tokens stood that the prompt left, in layer 0
    final: list[int]  # where those stand that are held at the end
    drift: float  # furthest that held was from (1 - ratio) of the tokens seen
    predicted: list[int]  # what should be held at the end: the first anchors, up to the point, and the newest tokens


def held_while_writing(
    model: Any, ids: Tensor, ratio: float, prompt: int, *, chunk: int = 16, distance: int = -25
) -> Written:
    """What Elastic Cache holds after a prompt, and after each `chunk` of the tokens that follow it.

    Raises:
        ValueError: layers that hold different numbers of tokens.
    """
    _, cache, _ = prefill(model, ids[:, :prompt], elastic(ratio, distance=distance))
    anchors, held, drift = cache.positions(0)[0, 0].tolist(), [], 0.0
    for part in ids[:, prompt:].split(chunk, 1):
        continue_with(model, cache, part, keep=1)
        check.within("held_while_writing", cache.held[0], cache.held[0], held=min(cache.held), most=max(cache.held))
        held.append(cache.held[0])
        drift = max(drift, abs(held[-1] - (1 - ratio) * cache.get_seq_length()))
    every, point = [*anchors, *range(prompt, ids.shape[1])], len(anchors) + distance
    predicted = every[:point] + every[len(every) - (held[-1] - point) :]
    return Written(held, anchors, cache.positions(0)[0, 0].tolist(), drift, predicted)


def _only(arms: dict[str, Policy], names: Sequence[str] | None) -> dict[str, Policy]:
    return arms if names is None else {name: arms[name] for name in names}


def _grid(
    model: Any,
    ids: Tensor,
    filled: Prefilled,
    shares: Sequence[float],
    policies: Callable[[float], dict[str, Policy]],
    full: Tensor | None,
) -> xr.DataArray:
    tables = [policies(share) for share in shares]
    full = whole(model, ids, filled) if full is None else full
    values = [compared(model, ids, filled, table, full) for table in tables]
    kl = xr.DataArray(values, {"budget": list(shares), "arm": list(tables[0])}, ("budget", "arm"), "kl")
    kl.budget.attrs = {"long_name": "budget", "units": "share of the prompt"}
    return kl.assign_attrs(long_name="KL from the full cache", units="nats")
