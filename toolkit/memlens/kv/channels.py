"""Thinner keys: of each kv head only the channels that the queries use are kept, for all but the newest tokens.

    score_c = mean_t q_tc² · mean_t k_tc²        over the newest queries, and over the keys

The product is, up to a constant, the squared Frobenius norm of what channel c adds to Q Kᵀ, so the channels with the lowest
scores are dropped one by one at the least cost each. What is left of the product needs only the same channels of the query:

    cp = think(k, q[:, :, -32:], 0.4, 32)        39 of 64 channels; the 32 newest tokens keep all
    out, lse = attend_pruned(q, cp, v)

Source: arXiv:2407.21018, section 3, and its public code. The storage format of a cache is `memlens.kv.think.think`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memlens import backend, check
from memlens.attention.exact import attend
from memlens.attention.merge import Attended, merge_many
from memlens.kv.select import topk_keep

__all__ = [
    "ChannelPruned", "attend_pruned", "at_channels", "channel_energy", "keep_channels", "kept_channels", "query_energy",
    "think", "widen",
]  # fmt: skip


class ChannelPruned(NamedTuple):
    k_small: Tensor  # (B, Hkv, L - tail, n), the older tokens
    keep_idx: Tensor  # (B, Hkv, n) int64, ascending: which channels they are
    tail: Tensor  # (B, Hkv, tail, D), the newest tokens with all channels


def channel_energy(x: Tensor) -> Tensor:
    """Mean of squares over the tokens of x (B, Hkv, L, D): (B, Hkv, D) float32.

    Raises:
        ValueError: no tokens.
    """
    sizes = check.shapes("channel_energy", x=(x, "batch kv_heads length dim"))
    check.at_least("channel_energy", 1, length=sizes["length"])
    return x.float().square().mean(2)


def query_energy(q: Tensor, kv_heads: int) -> Tensor:
    """`channel_energy` of queries (B, H, n, D), averaged over the query heads of each kv head: (B, Hkv, D)."""
    check.divides("query_energy", kv_heads=kv_heads, heads=q.shape[1])
    return channel_energy(q).unflatten(1, (kv_heads, -1)).mean(2)


def keep_channels(score: Tensor, n: int) -> Tensor:
    """The n channels with the highest score (B, Hkv, D): (B, Hkv, n) int64 ascending, ties to the lower channel.

    Raises:
        ValueError: n outside [1, D], NaN in the score.
    """
    check.within("keep_channels", 1, score.shape[-1], n=n)
    return topk_keep(score, n)


def kept_channels(dim: int, lam: float) -> int:
    """How many of `dim` channels stay when the share `lam` of them, rounded down, is dropped.

    Raises:
        ValueError: lam outside [0, 1).
    """
    if not 0 <= lam < 1:
        check.fail("think", f"lam={lam}", "a share of the channels within [0, 1)", "0 keeps all, 0.4 is usual")
    return dim - int(lam * dim + 1e-9)  # 0.3 · 10 is 3, not 2.999


def think(k: Tensor, q_obs: Tensor, lam: float = 0.4, tail: int = 32) -> ChannelPruned:
    """Keys (B, Hkv, L, D) with the share `lam` of the channels dropped that `q_obs` uses least, by kv head.

    Args:
        k: keys after rotary positions; all of them count in the score.
        q_obs: (B, H, n, D), the newest queries, usually 32, after rotary positions.
        lam: floor(lam · D) channels are dropped.
        tail: the newest tokens, which keep all channels.
    Raises:
        ValueError: lam outside [0, 1), a negative tail, heads that do not divide.
    Source: arXiv:2407.21018, equation 5; the query heads of a kv head share the mean of their squares.
    """
    check.shapes("think", k=(k, "batch kv_heads length dim"), q_obs=(q_obs, "batch heads rows dim"))
    check.at_least("think", 0, tail=tail)
    n, cut = kept_channels(k.shape[-1], lam), max(0, k.shape[2] - tail)
    keep = keep_channels(query_energy(q_obs, k.shape[1]) * channel_energy(k), n)
    return ChannelPruned(at_channels(k[:, :, :cut], keep), keep, k[:, :, cut:])


def at_channels(x: Tensor, keep: Tensor) -> Tensor:
    """Channels keep (B, Hkv, n) of x (B, H, L, D): (B, H, L, n). Query head h uses those of kv head h // (H / Hkv)."""
    keep = keep.long().repeat_interleave(x.shape[1] // keep.shape[1], 1)
    return x.gather(-1, keep[:, :, None].expand(*x.shape[:3], -1))


def widen(x: Tensor, keep: Tensor, dim: int) -> Tensor:
    """The inverse of `at_channels`, (B, H, L, dim): zero in the channels that were dropped."""
    keep = keep.long().repeat_interleave(x.shape[1] // keep.shape[1], 1)
    return x.new_zeros(*x.shape[:3], dim).scatter_(-1, keep[:, :, None].expand_as(x), x)


def attend_pruned(q: Tensor, cp: ChannelPruned, v: Tensor, *, scale: float | None = None, form: str = "auto") -> Attended:
    """Attention of every row of q to every token, from pruned keys and full ones under one softmax: (out, lse).

        s_j = scale · q[S]·k_small_j  for the older tokens,    scale · q·k_j  for the tail

    No key is widened: the query is narrowed instead.

    Args:
        q: (B, H, n, D).
        cp: from `think`.
        v: (B, Hkv, L, Dv), values of the older tokens and the tail.
        scale: default D ** -0.5, with D of the whole head.
        form: "reference" (all scores, one softmax), "torch" (each part by `attend`, merged), "triton" (one pass over both
            layouts), "auto".
    Raises:
        ValueError: shapes that disagree, or heads that do not divide.
    """
    sizes = check.shapes(
        "attend_pruned", q=(q, "batch heads rows dim"), keep_idx=(cp.keep_idx, "batch kv_heads n"),
        k_small=(cp.k_small, "batch kv_heads old n"), tail=(cp.tail, "batch kv_heads new dim"),
        v=(v, "batch kv_heads length value_dim"),
    )  # fmt: skip
    check.divides("attend_pruned", kv_heads=sizes["kv_heads"], heads=sizes["heads"])
    if sizes["old"] + sizes["new"] != sizes["length"]:
        check.fail("attend_pruned", f"{sizes['length']} values", f"{sizes['old']} + {sizes['new']}, one for each key")
    scale = sizes["dim"] ** -0.5 if scale is None else scale
    why = _problem(q, v) if form in ("auto", "triton") else ""
    if why and form == "triton":
        check.fail("attend_pruned", why, "sizes that the kernel takes", "use form='torch'")
    form = backend.choose("attend_pruned", form, q, cp.k_small, v, kernel=not why)
    if form == "triton":
        return _kernel(q, cp, v, scale)
    if form == "reference":
        return _reference(q, cp, v, scale)
    old = attend(
        at_channels(q, cp.keep_idx), cp.k_small, v[:, :, : sizes["old"]], causal=False, scale=scale, return_lse=True
    )
    new = attend(q, cp.tail, v[:, :, sizes["old"] :], causal=False, scale=scale, return_lse=True)
    return merge_many([old, new])


def _reference(q: Tensor, cp: ChannelPruned, v: Tensor, scale: float) -> Attended:
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // v.shape[1]
    small, tail, value = (x.to(wide).repeat_interleave(group, 1) for x in (cp.k_small, cp.tail, v))
    narrow = at_channels(q, cp.keep_idx).to(wide)
    score = scale * torch.cat((narrow @ small.mT, q.to(wide) @ tail.mT), -1)
    lse = score.logsumexp(-1)
    return Attended(((score - lse[..., None]).exp() @ value).to(q.dtype), lse)


def _problem(q: Tensor, v: Tensor) -> str:
    """Why the kernel cannot take these; empty where it can, or where there is no Triton to ask."""
    if backend.triton_problem(q, v):
        return ""
    from memlens_kernels.pruned import problem

    return problem(q.shape[-1], v.shape[-1], q.shape[1] // v.shape[1] * q.shape[2])


def _kernel(q: Tensor, cp: ChannelPruned, v: Tensor, scale: float) -> Attended:
    from memlens_kernels.pruned import decode_pruned

    rows = q.unflatten(1, (v.shape[1], -1)).flatten(2, 3)  # (B, Hkv, group · n, D)
    out, lse = decode_pruned(rows, *cp, v, scale=scale)
    shape = (*q.shape[:3], v.shape[-1])
    return merge_many([(o.view(shape), part.view(shape[:3])) for o, part in zip(out, lse, strict=True)])
