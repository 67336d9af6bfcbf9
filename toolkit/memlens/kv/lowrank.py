"""Keys of all heads as one product of two thin matrices, and the storage format that holds them so.

    K (L, Hkv·D)  ~  U (L, r) · SV (r, Hkv·D)         the r largest singular values of the keys of a layer

Before rotary positions the keys of a text lie close to a few directions; rotation spreads them. So the factors are made from
keys that are rotated back, and what is rebuilt is rotated again for the positions where it stood.
Source: arXiv:2410.21465, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from memlens import check
from memlens.attention.merge import Attended
from memlens.attention.rope import rope, unrope
from memlens.kv import storage

if TYPE_CHECKING:
    from memlens.kv.policies import Policy

__all__ = ["Factors", "LowRank", "LowRankState", "energy", "joint_svd", "low_rank", "reconstruct"]

Rotate = Callable[[Tensor, Tensor], Tensor]  # keys (..., n, D) and positions (..., n) -> rotated keys


class Factors(NamedTuple):
    u: Tensor  # (B, L, r), columns of unit length; dtype of the keys
    sv: Tensor  # (B, Hkv, r, D)


def joint_svd(k_pre: Tensor, rank: int) -> Factors:
    """The best product of rank `rank` for the keys of all heads together, by singular values.

    The singular vectors of the shorter side are the eigenvectors of its Gram matrix, in float64; the keys projected on them
    give the other factor, so that no small singular value is divided by.

    Args:
        k_pre: (B, Hkv, L, D), before rotary positions for a small rank to do.
    Raises:
        ValueError: rank outside [1, min(L, Hkv·D)], NaN or infinity.
    """
    sizes = check.shapes("joint_svd", k_pre=(k_pre, "batch kv_heads length dim"))
    check.within("joint_svd", 1, min(sizes["length"], sizes["kv_heads"] * sizes["dim"]), rank=rank)
    check.finite("joint_svd", k_pre=k_pre)
    flat = _flat(k_pre).double()
    if sizes["length"] < flat.shape[-1]:
        u = torch.linalg.eigh(flat @ flat.mT).eigenvectors[..., -rank:].flip(-1)
        sv = u.mT @ flat
    else:
        v = torch.linalg.eigh(flat.mT @ flat).eigenvectors[..., -rank:].flip(-1)
        u, scale = _unit(flat @ v)
        sv = scale[..., None] * v.mT
    sv = sv.unflatten(-1, (sizes["kv_heads"], -1)).transpose(1, 2)
    return Factors(u.to(k_pre.dtype).contiguous(), sv.to(k_pre.dtype).contiguous())


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of x at unit length, and their lengths; a column of zeros stays."""
    length = x.norm(dim=-2)
    return x / length.masked_fill(length == 0, 1.0)[..., None, :], length


def reconstruct(u: Tensor, sv: Tensor, idx: Tensor | None = None, rotate: Rotate | None = None) -> Tensor:
    """Keys (B, Hkv, n, D) of the tokens idx from their factors, rotated for the positions idx.

    Args:
        u, sv: as `joint_svd`.
        idx: (B, Hkv, n), tokens by head; None is all of them.
        rotate: e.g. `partial(rope, inv_freq=inv_freq)`; None leaves the keys unrotated.
    Raises:
        ValueError: shapes that disagree, or an index outside [0, L).
    """
    sizes = check.shapes(
        "reconstruct", u=(u, "batch length rank"), sv=(sv, "batch kv_heads rank dim"), idx=(idx, "batch kv_heads n")
    )
    if idx is None:
        k, pos = u[:, None] @ sv, torch.arange(sizes["length"], device=u.device)
    else:
        check.within("reconstruct", 0, sizes["length"] - 1, idx=idx)
        rows = u[:, None].expand(-1, sizes["kv_heads"], -1, -1)
        k, pos = storage.take(rows, idx) @ sv, idx
    return k if rotate is None else rotate(k, pos)


def energy(x: Tensor) -> Tensor:
    """Share of the squared norm of x (B, Hkv, L, D), heads joined, in its largest singular values: (B, min(L, Hkv·D)).

    Entry r - 1 is the share that rank r keeps; the last is 1.
    """
    check.shapes("energy", x=(x, "batch kv_heads length dim"))
    squares = torch.linalg.svdvals(_flat(x)).square().cumsum(-1)
    return squares / squares[..., -1:]


def _flat(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2).to(torch.promote_types(x.dtype, torch.float32))


class LowRankState(NamedTuple):
    factors: Factors  # keys of the prompt
    tail: Tensor  # (B, Hkv, n, D), keys of later tokens
    v: Tensor  # (B, Hkv, tokens, Dv)


class LowRank(NamedTuple):
    """The format that `low_rank` makes."""

    rank: int
    rotate: Rotate | None
    unrotate: Rotate | None
    name: str = "low_rank"
    balances: bool = False
    waits: bool = True

    def at(self, layer: int) -> LowRank:
        return self

    def problem(self, policy: Policy) -> str:
        return same_tokens(policy)

    def commit(
        self, held: LowRankState | None, k: Tensor, v: Tensor, idx: Tensor | None = None, **seen: Any
    ) -> LowRankState:
        if idx is not None:
            check.fail("low_rank", "an eviction", "every token in every head", "use full()")
        if held is not None:
            return LowRankState(held.factors, torch.cat((held.tail, k), 2), torch.cat((held.v, v), 2))
        pre = k if self.unrotate is None else self.unrotate(k, torch.arange(k.shape[2], device=k.device))
        rank = min(self.rank, k.shape[2], k.shape[1] * k.shape[3])
        return LowRankState(joint_svd(pre, rank), k[:, :, :0].clone(), storage.own(v))

    def count(self, held: LowRankState) -> int:
        return held.v.shape[2]

    def read(self, held: LowRankState, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        k = reconstruct(*held.factors, rotate=self.rotate)
        return torch.cat((k, held.tail), 2).to(dtype), held.v.to(dtype)

    def attend(self, q: Tensor, held: LowRankState, *, scale: float | None = None, form: str = "auto") -> Attended:
        return storage.attend_all(self, q, held, scale=scale, form=form)

    def parts(self, held: LowRankState) -> dict[str, list[Tensor]]:
        return storage.by_part(*held.factors, held.v, residual=(held.tail,))

    def size(self, shape: tuple[int, int, int, int], itemsize: int = 4) -> dict[str, int]:
        batch, heads, length, dim = shape
        rank = min(self.rank, length, heads * dim)
        return storage.part_bytes(payload=batch * (rank * (length + heads * dim) + heads * length * dim) * itemsize)


def low_rank(rank: int, inv_freq: Tensor | None = None) -> LowRank:
    """Storage of the prompt's keys as factors of one rank for all heads; values and later keys stay as they are.

    Args:
        rank: of Hkv·D; at most the tokens of the prompt.
        inv_freq: (D / 2,), the model's rotary frequencies: keys are rotated back first. None factors them as they come.
    Raises:
        ValueError: rank below 1; with a policy that evicts, since heads that keep different tokens share no rows.
    Source: arXiv:2410.21465, section 3.
    """
    check.at_least("low_rank", 1, rank=rank)
    turns = (None, None) if inv_freq is None else (partial(turn, inv_freq=inv_freq) for turn in (rope, unrope))
    return LowRank(rank, *turns)


def same_tokens(policy: Policy) -> str:
    """Why keys of all heads cannot be joined under this policy; empty where it evicts nothing."""
    if policy.budget is None and policy.share is None:
        return ""
    return (
        f"keys are factored over all heads, which must hold the same tokens, and {policy.name!r} evicts by head; use full()"
    )
