"""D2O: layers that attend densely keep more, and a token that goes is merged into the kept one that it resembles most.

    F_l    = Var_j(Σ_i P_ij),  share_l = clamp(softmax(-F̃)_l · layers · rho, 0.01, 1)        (`budget.density_softmax`)
    u_i    = max_c cos(k_i, k_c),   tau_t = beta · mean(u) + (1 - beta) · tau_{t-1},  tau_0 = mean(u)
    u_i >= tau: merged into c_i with   w_i = exp(u_i) / z,  w_c = e / z,  z = e + Σ_{i in M_c} exp(u_i);   else dropped

Source: arXiv:2406.13035. Its code averages instead and lets all heads of a layer merge the same tokens; this follows the text,
with a threshold for every kv head.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memlens import check
from memlens.attention.rope import unrope
from memlens.kv.budget import density_softmax
from memlens.kv.merge import Match, Merge, Sides, nearest_by_cosine
from memlens.kv.score import column_mass

if TYPE_CHECKING:
    from memlens.kv.cache import Prefilled
    from memlens.kv.policy import Policy

__all__ = ["d2o", "layer_density", "resembling"]


@torch.no_grad()
def layer_density(filled: Prefilled) -> Tensor:
    """F (layers,): the variance over tokens of the attention that each got, mean over heads. Small: the layer is dense.

    Raises:
        ValueError: a prefill without queries, or with tokens missing.
    """
    if filled.queries is None or any(layer.keys is None or layer.held != layer.seen for layer in filled.cache.layers):
        fix = "prefill(model, ids, keep_queries=True)"
        check.fail("layer_density", "a prefill without queries or with tokens missing", fix)
    pairs = zip(filled.cache.layers, filled.queries, strict=True)
    return torch.stack([column_mass(q, layer.keys, group="none").var(-1).mean() for layer, q in pairs])


def resembling(
    sides: Sides, tau: Tensor | None, *, beta: float, keys: str = "post_rope", threshold: float | None = None
) -> Match:
    """Every evicted token goes to the kept one with the largest cosine, if that reaches the running threshold.

    Args:
        tau: (B, Hkv) of the last eviction, NaN or None before the first; `threshold` stands in for it where it is given.
        keys: "pre_rope" compares keys before their rotation, the others as they are cached.
    Returns:
        A match whose memory is the new tau.
    """
    k_keep, k_evict, real = sides.k_keep, sides.k_evict, sides.pos_evict >= 0
    if keys == "pre_rope" and sides.inv_freq is not None:
        k_keep, k_evict = unrope(k_keep, sides.pos_keep, sides.inv_freq), unrope(k_evict, sides.pos_evict, sides.inv_freq)
    k_keep = k_keep.masked_fill((sides.pos_keep < 0)[..., None], 0.0)  # nothing resembles padding
    assign, u = nearest_by_cosine(k_evict, k_keep)
    fresh = torch.where(real, u, torch.nan).nanmean(-1)  # NaN where only padding goes
    tau = torch.full_like(fresh, torch.nan) if tau is None else tau
    mixed = torch.where(tau.isnan(), fresh, beta * fresh + (1 - beta) * tau)
    tau = torch.where(fresh.isnan(), tau, mixed)
    limit = tau if threshold is None else torch.full_like(tau, threshold)
    taken = real & (u >= limit[..., None]) & (u > -1.0)
    weight = torch.where(taken, u.exp(), 0.0)
    total = torch.full_like(sides.score, math.e).scatter_add(-1, assign, weight)
    return Match(assign, weight / total.gather(-1, assign), math.e / total, tau)


def d2o(
    rho: float, heavy_share: float = 0.75, beta: float = 0.7, first: int = 4, keys: str = "post_rope", *,
    density: Tensor | None = None, threshold: float | None = None,
) -> Policy:  # fmt: skip
    """D2O: H2O's choice in every layer, and merging by resemblance of what it would drop.

    Args:
        rho: share of the tokens seen that is kept, over all layers, in (0, 1].
        heavy_share: of the budget beyond `first`, what goes to the tokens with the most attention; the rest to the newest.
        beta: weight of the newest mean in the running threshold, in [0, 1].
        first: tokens at the beginning that are always kept.
        keys: how keys are merged, as in `memlens.kv.merge.merge_kv`; "none" merges values only.
        density: (layers,), as from `layer_density`, shares rho among the layers; None gives each the same.
        threshold: a fixed one in place of the running one; inf never merges, which is eviction.
    Raises:
        ValueError: a share or a beta outside, a negative first.
    Source: arXiv:2406.13035; its code leaves layers 0, 1 and the last uncompressed, this does not.
    """
    from memlens.kv.policies import h2o

    check.within("d2o", 1e-9, 1.0, rho=rho)
    check.within("d2o", 0.0, 1.0, heavy_share=heavy_share, beta=beta)
    check.at_least("d2o", 0, first=first)
    share = rho if density is None else tuple(density_softmax(density, rho).tolist())
    merge = Merge(partial(resembling, beta=beta, keys=keys, threshold=threshold), keys)
    options = {"first": first, "last": 1.0 - heavy_share, "merge": merge}
    return h2o(1, 0)._replace(name="d2o", budget=None, share=share, **options)
