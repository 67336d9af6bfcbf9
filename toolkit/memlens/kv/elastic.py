"""Elastic Cache: after the prompt, neighbours are averaged into anchors; while writing, the token at one fixed index goes.

    score_j   = column sum of the attention, mean over all heads of the layer      one selection for the layer
    anchors   = the first `start`, the last token, and the best scores; ceil((1 - ratio) · seen) of them
    anchor c  = mean over c and the tokens nearest to it in position, of K and of V

The model counts an averaged token once, though it stands for several: `counts=True` adds log(count) to its logit. That is
not in the paper.

Source: arXiv:2407.18121. Its code keeps tokens whose index, not whose rank, exceeds a number; this keeps the best ranks.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from memlens import check
from memlens.kv.merge import Match, Merge, Sides, nearest_by_position
from memlens.kv.policy import Block, LayerState, Policy
from memlens.kv.score import column_mass
from memlens.kv.select import extend

__all__ = ["Shield", "averaged", "elastic", "layer_frequency"]


class Shield(NamedTuple):
    """Anchors that take nothing in: an average with an attention sink or a heavy token spoils it."""

    first: int = 0
    last: int = 0
    heavy: int = 0  # those with the best scores


OPEN = Shield()


def layer_frequency(state: LayerState, block: Block) -> LayerState:
    """A token is worth the attention that it got so far, averaged over all heads: the same tokens stay in each of them."""
    seen = {"q_start": block.q_start, "alive": block.alive, "scale": block.scale}
    mass = column_mass(block.q, block.k, lse=block.lse, **seen)
    shared = mass.mean(1, keepdim=True).expand_as(mass).contiguous()
    return state._replace(stream=extend(state.stream, shared, pad=block.pad))


def averaged(sides: Sides, memory: None, *, reach: int | None = None, shield: Shield = OPEN) -> Match:
    """Every evicted token goes to the kept one nearest in position; the weights of a bucket are equal.

    `reach`: tokens further than this from their anchor are dropped.
    """
    place = torch.arange(sides.pos_keep.shape[-1], device=sides.pos_keep.device)
    may = (place >= shield.first) & (place < len(place) - shield.last)
    rank = sides.score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    may = may & (rank >= shield.heavy) & (sides.pos_keep >= 0)
    assign = nearest_by_position(sides.pos_evict, sides.pos_keep, open=may)
    far = (sides.pos_keep.gather(-1, assign) - sides.pos_evict).abs()
    taken = may.gather(-1, assign) & (sides.pos_evict >= 0)
    taken = (taken if reach is None else taken & (far <= reach)).float()
    size = torch.ones_like(sides.score).scatter_add(-1, assign, taken)  # anchor included
    return Match(assign, taken / size.gather(-1, assign), 1 / size)


def elastic(
    ratio: float, start: int = 1, distance: int = -25, keys: str = "pre_rope", *, counts: bool = False,
    reach: int | None = None, shield: Shield = OPEN,
) -> Policy:  # fmt: skip
    """Elastic Cache: a share `ratio` of the tokens is merged away at the end of the prompt, and kept away later.

    Args:
        ratio: share to remove, in [0, 1): a layer holds ceil((1 - ratio) · seen) tokens.
        start: first tokens that are always anchors, as the prompt's last one is.
        distance: while writing, the token at index (anchors after the prompt) + distance goes whenever there is one too many.
        keys: how keys are averaged, as in `memlens.kv.merge.merge_kv`.
        counts: add log(count) to the logit of a token that stands for several.
        reach, shield: tokens further from their anchor are dropped; anchors that take nothing in.
    Raises:
        ValueError: a ratio outside [0, 1), start < 0; while writing, a point outside [start, held - 1].
    Source: arXiv:2407.18121; `counts`, `reach` and `shield` are ours.
    """
    check.within("elastic", 0.0, 1.0 - 1e-9, ratio=ratio)
    check.at_least("elastic", 0, start=start)
    merge = Merge(partial(averaged, reach=reach, shield=shield), keys, counts)
    options = {"first": start, "last": 1, "when": "prompt", "merge": merge, "distance": distance}
    return Policy("elastic", layer_frequency, share=1.0 - ratio, **options)
