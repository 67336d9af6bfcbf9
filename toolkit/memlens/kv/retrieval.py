"""Storage that forgets nothing and reads little: a decoding step fetches the tokens that its query asks for.

    policy = full().stored(shadowkv(inv_freq, rank=30, budget=128))        keys by their factors, values in slow memory
    policy = h2o(51, 51).stored(instinfer(16, 64))                         SparF over what H2O keeps

Inside a model the prompt is read with exact attention; each later row chooses for itself, as if it came alone. The mechanisms
are in `memlens.attention.retrieval`. As with every format, the model's cache is told all keys while a layer runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from memlens import check
from memlens.attention.merge import Attended
from memlens.attention.retrieval import ShadowState, shadow_append, shadow_build, shadow_decode, shadow_read, sparf
from memlens.attention.rope import rope, unrope
from memlens.kv import storage
from memlens.kv.lowrank import same_tokens
from memlens.kv.storage import Pair, Plain

if TYPE_CHECKING:
    from memlens.kv.policies import Policy

__all__ = ["InstInfer", "ShadowKV", "instinfer", "shadowkv"]


class ShadowKV(NamedTuple):
    """The format that `shadowkv` makes."""

    build: Callable[[Tensor, Tensor], ShadowState]
    name: str = "shadowkv"
    balances: bool = False
    waits: bool = True

    def at(self, layer: int) -> ShadowKV:
        return self

    def problem(self, policy: Policy) -> str:
        return same_tokens(policy)

    def commit(self, held: ShadowState | None, k: Tensor, v: Tensor, idx: Tensor | None = None, **seen: Any) -> ShadowState:
        if idx is not None:
            check.fail("shadowkv", "an eviction", "every token in every head", "use full()")
        return self.build(k, v) if held is None else shadow_append(held, k, v)

    def count(self, held: ShadowState) -> int:
        return held.v.shape[2] + held.local.k.shape[2]

    def read(self, held: ShadowState, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return tuple(x.to(dtype) for x in shadow_read(held))

    def attend(self, q: Tensor, held: ShadowState, *, scale: float | None = None, form: str = "auto") -> Attended:
        """Exact attention to all that is held; `retrieve` is what a model's decoding does."""
        return storage.attend_all(self, q, held, scale=scale, form=form)

    def retrieve(self, held: ShadowState, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        """Out (B, H, n, Dv) of n new rows, of which row i sees what is held and the first i + 1 new tokens."""
        count, rows, out = self.count(held), q.shape[2], []
        grown = shadow_append(held, k[:, :, count:], v[:, :, count:])
        length = grown.local.k.shape[2]
        for i in range(rows):
            local = Pair(*(x[:, :, : length - rows + i + 1] for x in grown.local))
            out.append(shadow_decode(q[:, :, i : i + 1], grown._replace(local=local), scale=scale).out)
        return torch.cat(out, 2)

    def parts(self, held: ShadowState) -> dict[str, list[Tensor]]:
        fast = storage.by_part(
            *held.factors, held.landmarks, *held.exact, indices=(held.listed, held.outliers), residual=held.local
        )
        return fast | {"slow": [held.v]}

    def size(self, shape: tuple[int, int, int, int], itemsize: int = 4) -> dict[str, int]:
        from memlens.cost.storage import shadow_bytes

        batch, heads, length, dim = shape
        plan = {name: self.build.keywords[name] for name in ("rank", "chunk", "outliers", "local")}
        found = shadow_bytes(length, heads, dim, **plan, budget=0, itemsize=itemsize)
        chunks = length // plan["chunk"] - plan["local"]
        found = {part: batch * size for part, size in found.items()}
        return storage.part_bytes(
            payload=found["factors"] + found["landmarks"] + found["outliers"], residual=found["local"],
            indices=batch * heads * chunks * 4, slow=found["slow"],
        )  # fmt: skip


def shadowkv(
    inv_freq: Tensor, *, rank: int = 160, budget: int = 2048, chunk: int = 8, outliers: int = 48, local: int = 4
) -> ShadowKV:
    """ShadowKV: the prompt's keys by their factors, its values in slow memory, and a few chunks fetched at each step.

    Args:
        inv_freq: (D / 2,), the model's rotary frequencies.
        rank, budget, chunk, outliers, local: as in `memlens.attention.retrieval.shadow_build`; the paper's for long
            prompts. SmolLM2 on 512 tokens: rank=30, budget=128, outliers=6.
    Raises:
        ValueError: as `shadow_build`; with a policy that evicts.
    Source: arXiv:2410.21465.
    """
    check.at_least("shadowkv", 1, rank=rank, budget=budget, chunk=chunk)
    check.at_least("shadowkv", 0, outliers=outliers, local=local)
    check.divides("shadowkv", chunk=chunk, budget=budget)
    turns = {"rotate": partial(rope, inv_freq=inv_freq), "unrotate": partial(unrope, inv_freq=inv_freq)}
    plan = {"rank": rank, "budget": budget, "chunk": chunk, "outliers": outliers, "local": local}
    return ShadowKV(partial(shadow_build, **plan, **turns))


class InstInfer(NamedTuple):
    """The format that `instinfer` makes."""

    r: int
    topk: int | float
    name: str = "instinfer"
    balances: bool = False

    def at(self, layer: int) -> InstInfer:
        return self

    def problem(self, policy: Policy) -> str:
        if policy.rolling:
            return "SparF reads keys at the positions where they are held, and rolling moves them"
        counts = policy.merge is not None and policy.merge.counts
        return "SparF has no place for the counts of merged tokens" if counts else ""

    def commit(self, held: Pair | None, k: Tensor, v: Tensor, idx: Tensor | None = None, **seen: Any) -> Pair:
        return Plain().commit(held, k, v, idx)

    def count(self, held: Pair) -> int:
        return held.k.shape[2]

    def read(self, held: Pair, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return Plain().read(held, dtype)

    def attend(self, q: Tensor, held: Pair, *, scale: float | None = None, form: str = "auto") -> Attended:
        """Exact attention to all that is held; `retrieve` is what a model's decoding does."""
        return storage.attend_all(self, q, held, scale=scale, form=form)

    def retrieve(self, held: Pair, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        """Out (B, H, n, Dv) of n new rows, of which row i sees what is held and the first i + 1 new tokens."""
        rows, length = q.shape[2], k.shape[2]
        topk = self.topk if isinstance(self.topk, int) else max(1, round(self.topk * length))
        limits, out = (min(self.r, q.shape[-1]), min(topk, length - rows + 1)), []
        for i in range(rows):
            k_seen, v_seen = (x[:, :, : length - rows + i + 1] for x in (k, v))
            out.append(sparf(q[:, :, i : i + 1], k_seen, v_seen, *limits, scale=scale).out)
        return torch.cat(out, 2)

    def parts(self, held: Pair) -> dict[str, list[Tensor]]:
        return {"payload": [], "slow": [*held]}

    def size(self, shape: tuple[int, int, int, int], itemsize: int = 4) -> dict[str, int]:
        return storage.part_bytes(slow=sum(Plain().size(shape, itemsize).values()))


def instinfer(r: int, topk: int | float) -> InstInfer:
    """SparF as a cache: keys and values lie in slow memory, and a step fetches `r` channels and `topk` tokens.

    Args:
        r: channels of the query that estimate the scores, at most D.
        topk: tokens, or as a float the share of those held.
    Raises:
        ValueError: r or topk of 0; with a rolling policy.
    Source: arXiv:2409.04992. A drive keeps a second copy of the keys by channel, which this does not need and hold.
    """
    check.at_least("instinfer", 1, r=r)
    if not topk > 0 or (isinstance(topk, float) and topk > 1):
        check.fail("instinfer", f"topk={topk}", "a number of tokens, or a share within (0, 1]")
    return InstInfer(r, topk)
