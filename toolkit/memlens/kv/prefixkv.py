"""PrefixKV: every layer keeps the same share of its attention mass, so that layers differ in how many tokens they hold.

    a_j    = column sum of the attention, mean over heads;   C_l(k) = share of layer l's mass on its k best tokens
    k_l(p) = min{k : C_l(k) >= p},  and p is chosen so that the k_l sum to the budget        (`budget.prefix_search`)

Source: arXiv:2412.03409. The configuration is found once, on a few texts, and reused as a ratio for each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memlens import check
from memlens.kv.elastic import layer_frequency
from memlens.kv.policy import Policy
from memlens.kv.score import column_mass

if TYPE_CHECKING:
    from memlens.kv.cache import Prefilled

__all__ = ["layer_mass", "prefix_curves", "prefixkv"]


@torch.no_grad()
def layer_mass(filled: Prefilled, *, by_value: bool = False) -> Tensor:
    """The attention that each token of a prefilled prompt got, mean over heads: (layers, L) float32.

    `by_value` weights a token in each kv head by the length of its value: attention on a value near zero adds nothing.

    Raises:
        ValueError: a prefill without queries, of several rows, or with tokens missing.
    """
    if filled.queries is None or any(layer.keys is None or layer.held != layer.seen for layer in filled.cache.layers):
        check.fail(
            "layer_mass", "a prefill without queries or with tokens missing", "prefill(model, ids, keep_queries=True)"
        )
    check.within("layer_mass", 1, 1, batch=filled.queries[0].shape[0])
    rows = []
    for layer, q in zip(filled.cache.layers, filled.queries, strict=True):
        mass = column_mass(q, layer.keys)[0]  # (Hkv, L)
        rows.append((mass * layer.values[0].norm(dim=-1) if by_value else mass).mean(0))
    return torch.stack(rows).float()


def prefix_curves(mass: Tensor, *, sinks: int = 0) -> Tensor:
    """Share of the mass (layers, L) that falls on each layer's best k tokens, (layers, L), rising to 1.

    `sinks`: the first tokens count as best, and their mass as none: what they hold is attention without content.

    Raises:
        ValueError: negative or non-finite mass, or more sinks than tokens.
    """
    length = check.shapes("prefix_curves", mass=(mass, "layers length"))["length"]
    check.within("prefix_curves", 0, length - 1, sinks=sinks)
    check.finite("prefix_curves", mass=mass)
    check.within("prefix_curves", 0.0, torch.inf, mass=mass)
    best = mass[:, sinks:].double().sort(dim=1, descending=True).values.cumsum(1)
    share = best / best[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)
    return torch.nn.functional.pad(share, (sinks, 0)).clamp(max=1.0)


def prefixkv(ratios: Sequence[float], start: int = 1, distance: int = -25) -> Policy:
    """PrefixKV: each layer keeps its own share of the tokens, those with the most attention, one choice for all its heads.

    Args:
        ratios: of the tokens seen, one for each layer, in (0, 1]: `budget.prefix_search(curves, total)` over the length.
        start: first tokens that are always kept, as the prompt's last one is; they count inside the share.
        distance: while writing, the token at index (held after the prompt) + distance goes whenever there is one too many.
    Raises:
        ValueError: no ratios, one outside (0, 1], start < 0.
    Source: arXiv:2412.03409; its search stops within 5 tokens of the total and rescales, ours is exact.
    """
    ratios = tuple(float(ratio) for ratio in ratios)
    check.at_least("prefixkv", 1, layers=len(ratios))
    check.within("prefixkv", 1e-9, 1.0, **{f"ratio of layer {i}": ratio for i, ratio in enumerate(ratios)})
    check.at_least("prefixkv", 0, start=start)
    options = {"first": start, "last": 1, "when": "prompt", "distance": distance}
    return Policy("prefixkv", layer_frequency, share=ratios, **options)
