"""The merge step: what a policy gives up is folded into what it keeps, instead of being lost.

    x_c' = w_c · x_c + Σ_{i in M_c} w_i · x_i          M_c: the evicted tokens assigned to the kept token c

A rule is a `Merge`: a function that says which kept token takes which evicted one in, and with which weights; what happens to
the keys ("post_rope": averaged as they are cached; "pre_rope": each is first turned to the position of the token that takes it
in, which is averaging before the rotation; "none": values only); and whether the tokens that a kept one stands for are counted.
A count m adds log(m) to the logit of its token, in every later forward: then equal tokens merge without any loss.

`memlens.kv.d2o` and `memlens.kv.elastic` are two rules. Sources there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from memlens import backend, check
from memlens.attention.rope import shift
from memlens.kv.select import StreamState, complement, gather_kv

if TYPE_CHECKING:
    from memlens.kv.policies import LayerState

__all__ = [
    "Match",
    "Merge",
    "Sides",
    "fold",
    "log_counts",
    "merge_into",
    "merge_kv",
    "nearest_by_cosine",
    "nearest_by_position",
]

KEYS = ("post_rope", "pre_rope", "none")
COUNT = "count"  # in StreamState.aux: how many tokens a held one stands for, (B, Hkv, L) float32
TILE = 1 << 20  # cosines held at a time by the torch form


class Sides(NamedTuple):
    """The two sides of an eviction in one layer, as a rule sees them: b tokens kept, e given up."""

    k_keep: Tensor  # (B, Hkv, b, D), as cached
    k_evict: Tensor  # (B, Hkv, e, D)
    pos_keep: Tensor  # (B, Hkv, b) int32, ascending; negative for padding
    pos_evict: Tensor  # (B, Hkv, e)
    score: Tensor  # (B, Hkv, b), the policy's
    inv_freq: Tensor | None  # of the model's rotary table, where the merge turns keys


class Match(NamedTuple):
    assign: Tensor  # (B, Hkv, e) int64: which of the b kept tokens takes it in
    w_evict: Tensor  # (B, Hkv, e) float32; 0 drops it
    w_self: Tensor  # (B, Hkv, b) float32: what a kept token keeps of itself
    memory: Any = None  # of the rule, for the layer's next eviction


class Merge(NamedTuple):
    rule: Callable[[Sides, Any], Match]  # (sides, memory) -> match
    keys: str = "post_rope"
    counts: bool = False  # whether kept tokens count what they took in, and their logits grow by log(count)


@torch.no_grad()
def nearest_by_cosine(k_evict: Tensor, k_keep: Tensor, *, form: str = "auto") -> tuple[Tensor, Tensor]:
    """For each evicted key the kept one with the largest cosine: (assign (B, Hkv, e) int64, sim (B, Hkv, e) float32).

    Ties go to the lower index. A key of length zero has no direction: its cosine with anything is -1. The e x b matrix is
    never held whole.

    Args:
        k_evict: (B, Hkv, e, D).
        k_keep: (B, Hkv, b, D), b at least 1.
        form: "reference" (pair by pair), "torch" (blocks of rows), "triton" (the kernel), "auto".
    Raises:
        ValueError: no kept key, shapes that disagree, NaN or infinity in the keys.
        RuntimeError: form="triton" where it cannot run, saying why.
    """
    spec = "batch kv_heads {} dim"
    sizes = check.shapes(
        "nearest_by_cosine", k_evict=(k_evict, spec.format("evicted")), k_keep=(k_keep, spec.format("kept"))
    )
    check.at_least("nearest_by_cosine", 1, "there is nothing to merge into", kept=sizes["kept"])
    check.finite("nearest_by_cosine", k_evict=k_evict, k_keep=k_keep)
    check.same_dtype("nearest_by_cosine", k_evict=k_evict, k_keep=k_keep)
    return _FORMS[backend.choose("nearest_by_cosine", form, k_evict, k_keep)](k_evict, k_keep)


def _reference(k_evict: Tensor, k_keep: Tensor) -> tuple[Tensor, Tensor]:
    assign = torch.zeros(k_evict.shape[:-1], dtype=torch.int64, device=k_evict.device)
    sim = torch.full(k_evict.shape[:-1], -2.0, device=k_evict.device)
    for c in range(k_keep.shape[2]):
        one, other = k_evict.float(), k_keep[:, :, c, None].float()
        norm = one.norm(dim=-1) * other.norm(dim=-1)
        cosine = torch.where(norm > 0, (one * other).sum(-1) / norm, -1.0)
        better = cosine > sim
        assign, sim = torch.where(better, c, assign), torch.where(better, cosine, sim)
    return assign, sim


def _torch(k_evict: Tensor, k_keep: Tensor) -> tuple[Tensor, Tensor]:
    one, other = _directions(k_evict), _directions(k_keep)
    flat, columns = k_keep.norm(dim=-1) == 0, other.transpose(-1, -2)
    step = max(1, TILE // max(1, flat.numel()))
    parts = [(rows @ columns).masked_fill_(flat[:, :, None], -1.0).max(-1) for rows in one.split(step, 2)]
    assign = torch.cat([part.indices for part in parts], 2)
    sim = torch.cat([part.values for part in parts], 2)
    none = k_evict.norm(dim=-1) == 0
    return assign.masked_fill(none, 0), sim.masked_fill(none, -1.0)


def _directions(k: Tensor) -> Tensor:
    k = k.float()
    return k / k.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def _triton(k_evict: Tensor, k_keep: Tensor) -> tuple[Tensor, Tensor]:
    from memlens_kernels.nearest import nearest_by_cosine as launch

    return launch(k_evict, k_keep)


_FORMS = {"reference": _reference, "torch": _torch, "triton": _triton}


def nearest_by_position(pos_evict: Tensor, pos_keep: Tensor, *, open: Tensor | None = None) -> Tensor:
    """For each evicted token the kept one nearest in the text: (..., e) int64, ties to the lower index.

    Args:
        pos_evict: (..., e).
        pos_keep: (..., b), ascending, b at least 1.
        open: (..., b) bool, the kept tokens that may be chosen; where none may, the answer is 0.
    Raises:
        ValueError: no kept token, or positions that do not ascend.
    """
    count = pos_keep.shape[-1]
    check.at_least("nearest_by_position", 1, "there is nothing to merge into", kept=count)
    if bool((pos_keep.diff(dim=-1) <= 0).any()):
        check.fail(
            "nearest_by_position", "positions of kept tokens that fall or repeat", "ascending ones", "sort the index"
        )
    pos_keep, pos_evict = pos_keep.long().contiguous(), pos_evict.long().contiguous()
    place = torch.arange(count, device=pos_keep.device).expand(pos_keep.shape)
    may = torch.ones_like(place, dtype=torch.bool) if open is None else open
    before = torch.where(may, place, -1).cummax(-1).values
    after = torch.where(may, place, count).flip(-1).cummin(-1).values.flip(-1)
    right = torch.searchsorted(pos_keep, pos_evict)
    low = before.gather(-1, (right - 1).clamp(min=0)).masked_fill(right == 0, -1)
    high = after.gather(-1, right.clamp(max=count - 1)).masked_fill(right == count, count)
    far = torch.iinfo(torch.int64).max
    below = (pos_evict - pos_keep.gather(-1, low.clamp(min=0))).masked_fill(low < 0, far)
    above = (pos_keep.gather(-1, high.clamp(max=count - 1)) - pos_evict).masked_fill(high == count, far)
    return torch.where(below <= above, low, high).clamp(0, count - 1)


def merge_into(x_keep: Tensor, x_evict: Tensor, assign: Tensor, w_evict: Tensor, w_self: Tensor) -> Tensor:
    """w_self · x_keep with w_evict · x_evict added where `assign` says: (B, Hkv, b, D) in x_keep's dtype.

    A kept token that takes nothing in (all its weights 0) is returned as it is, whatever its w_self.

    Args:
        x_keep, x_evict: (B, Hkv, b, D) and (B, Hkv, e, D): keys, values or anything else per token.
        assign, w_evict: (B, Hkv, e).
        w_self: (B, Hkv, b).
    Raises:
        ValueError: shapes that disagree, an assignment outside [0, b).
    """
    rows = "batch kv_heads"
    check.shapes(
        "merge_into", x_keep=(x_keep, f"{rows} kept dim"), x_evict=(x_evict, f"{rows} evicted dim"),
        assign=(assign, f"{rows} evicted"), w_evict=(w_evict, f"{rows} evicted"), w_self=(w_self, f"{rows} kept"),
    )  # fmt: skip
    check.within("merge_into", 0, x_keep.shape[2] - 1, assign=assign)
    wide = torch.promote_types(x_keep.dtype, torch.float32)
    spread = assign[..., None].expand(*assign.shape, x_keep.shape[-1])
    total = (w_self[..., None] * x_keep.to(wide)).scatter_add(2, spread, w_evict[..., None] * x_evict.to(wide))
    taken = torch.zeros_like(w_self).scatter_add(2, assign, (w_evict != 0).to(w_self)) > 0
    return torch.where(taken[..., None], total.to(x_keep.dtype), x_keep)


def merge_kv(
    k: Tensor, v: Tensor, idx: Tensor, match: Match, *, keys: str = "post_rope", pos: Tensor | None = None,
    inv_freq: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The keys and values at idx with the others merged into them, (B, Hkv, b, D) and (B, Hkv, b, Dv).

    Args:
        k, v: (B, Hkv, L, D) and (B, Hkv, L, Dv); k as cached, after the rotation.
        idx: (B, Hkv, b) ascending, the tokens that stay.
        match: which of them takes which of the others in, and how much of it.
        keys: "post_rope" averages keys as they are; "pre_rope" turns an evicted key to the position of the token that takes
            it in, so that the average is one of unrotated keys, rotated for that position; "none" leaves keys alone.
        pos: (B, Hkv, L) positions, and inv_freq (D / 2,): for "pre_rope".
    Raises:
        ValueError: an unknown word, or "pre_rope" without positions and frequencies.
    """
    check.one_of("merge_kv", KEYS, keys=keys)
    if keys == "pre_rope" and (pos is None or inv_freq is None):
        fix = "give pos and inv_freq, or keys='post_rope' or 'none'; a cache has them once it ran inside `on(model)`"
        check.fail("merge_kv", "keys='pre_rope' without rotary positions", "where each key was rotated to", fix)
    gone = complement(idx, k.shape[2])
    (k_keep, v_keep), (k_evict, v_evict) = gather_kv(k, v, idx), gather_kv(k, v, gone)
    values = merge_into(v_keep, v_evict, match.assign, match.w_evict, match.w_self)
    if keys == "none":
        return k_keep, values
    if keys == "pre_rope":
        there = pos.gather(-1, idx).gather(-1, match.assign)
        k_evict = shift(k_evict, there - pos.gather(-1, gone), inv_freq)
    return merge_into(k_keep, k_evict, match.assign, match.w_evict, match.w_self), values


# --- inside a cache ------------------------------------------------------------------------------------------------


def fold(
    merge: Merge, state: LayerState, k: Tensor, v: Tensor, idx: Tensor, inv_freq: Tensor | None = None
) -> tuple[LayerState, tuple[Tensor, Tensor]]:
    """A layer's state, still of all tokens, and the keys and values of those at idx with the others merged into them.

    Padding is neither merged nor merged into: it has left before any real token does.
    """
    held = state.stream
    gone = complement(idx, k.shape[2])
    pos_keep, pos_evict = held.pos.gather(-1, idx), held.pos.gather(-1, gone)
    (k_keep, _), (k_evict, _) = gather_kv(k, v, idx), gather_kv(k, v, gone)
    sides = Sides(k_keep, k_evict, pos_keep, pos_evict, held.score.gather(-1, idx), inv_freq)
    match = merge.rule(sides, state.merged)
    match = match._replace(w_evict=match.w_evict.masked_fill(pos_evict < 0, 0.0))
    kept = merge_kv(k, v, idx, match, keys=merge.keys, pos=held.pos, inv_freq=inv_freq)
    if merge.counts:
        count = held.aux.get(COUNT)
        count = torch.ones_like(held.score) if count is None else count
        moved = count.gather(-1, gone).masked_fill(match.w_evict == 0, 0.0)
        count = count.scatter_add(-1, idx.gather(-1, match.assign), moved)
        held = held._replace(aux={**held.aux, COUNT: count})
    return state._replace(stream=held, merged=match.memory), kept


def split_counts(state: LayerState) -> tuple[LayerState, Tensor | None]:
    """The state as a score sees it, and the counts (B, Hkv, held) that `join_counts` puts back."""
    aux = dict(state.stream.aux)
    count = aux.pop(COUNT, None)
    return (state if count is None else state._replace(stream=state.stream._replace(aux=aux))), count


def join_counts(state: LayerState, count: Tensor | None) -> LayerState:
    """The state with its counts, 1 for each token that came since."""
    if count is None:
        return state
    aux = {**state.stream.aux, COUNT: _grown(count, state.stream.score.shape[-1] - count.shape[-1], 1.0)}
    return state._replace(stream=state.stream._replace(aux=aux))


def log_counts(stream: StreamState, rows: int, heads: int) -> Tensor | None:
    """log(count) of the tokens held and of `rows` new ones, (B, heads, 1, L), to add to the logits; None where all are 1."""
    count = stream.aux.get(COUNT)
    if count is None:
        return None
    return _grown(count.log(), rows, 0.0).repeat_interleave(heads // count.shape[1], 1)[:, :, None]


def counted(q: Tensor, k: Tensor, count: Tensor, scale: float | None) -> tuple[Tensor, Tensor, float]:
    """Queries and keys with log(count) as one more channel, and their scale: any score then sees the logits as attended."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    extra = _grown(count.log() / scale, k.shape[2] - count.shape[-1], 0.0)
    return torch.cat((q, torch.ones_like(q[..., :1])), -1), torch.cat((k, extra[..., None].to(k)), -1), scale


def _grown(x: Tensor, by: int, value: float) -> Tensor:
    return torch.nn.functional.pad(x, (0, by), value=value)
