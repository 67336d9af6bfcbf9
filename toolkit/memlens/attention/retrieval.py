"""Attention of a decoding step to the few tokens that its query asks for, out of all that are held somewhere slower.

SparF estimates every score from the largest channels of the query, fetches the best tokens, and lets the mean value stand in
for the rest. ShadowKV asks the mean key of each chunk, rebuilds the keys of the best chunks from their factors, and keeps the
chunks that their mean describes badly.

Source: arXiv:2409.04992, section IV (SparF, after SparQ), and arXiv:2410.21465, sections 3 and 4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memlens import backend, check
from memlens.attention.exact import attend
from memlens.attention.merge import Attended
from memlens.kv.lowrank import Factors, Rotate, joint_svd, reconstruct
from memlens.kv.select import chunk_landmarks, complement, outlier_chunks, topk_keep
from memlens.kv.storage import Pair, append, own, take

__all__ = [
    "Fetched", "ShadowState", "chosen_chunks", "shadow_append", "shadow_build", "shadow_decode", "shadow_read", "sparf",
]  # fmt: skip


class Fetched(NamedTuple):
    out: Tensor  # (B, H, n, Dv), dtype of q
    i: Tensor  # (B, H, n, r) int64 ascending, channels of the first step
    j: Tensor  # (B, H, n, topk) int64 ascending, tokens of the second


def sparf(
    q: Tensor, k: Tensor, v: Tensor, r: int, topk: int, vmean: Tensor | None = None, *, scale: float | None = None,
    form: str = "auto",
) -> Fetched:  # fmt: skip
    """SparF attention of every row of q to every key: the output, the channels and the tokens that it read.

        i = the r largest |q|          s^ = softmax(scale · q_i·K_i / sqrt(|q_i|_1 / |q|_1))
        j = the topk largest s^        out = a · softmax(scale · q·K_j) V_j + (1 - a) · vmean,   a = sum of s^_j

    Args:
        q: (B, H, n, D).
        k, v: (B, Hkv, L, D) and (B, Hkv, L, Dv).
        r, topk: channels and tokens, within [1, D] and [1, L].
        vmean: (B, Hkv, Dv), what stands in for a token that is not read; default the mean of v.
        scale: default D ** -0.5.
        form: "reference" (row by row, only what is named is read), "torch", "auto".
    Raises:
        ValueError: r or topk outside, shapes that disagree.
    Source: arXiv:2409.04992, algorithm 1.
    """
    sizes = check.shapes(
        "sparf", q=(q, "batch heads rows dim"), k=(k, "batch kv_heads length dim"), v=(v, "batch kv_heads length value_dim"),
        vmean=(vmean, "batch kv_heads value_dim"),
    )  # fmt: skip
    check.divides("sparf", kv_heads=sizes["kv_heads"], heads=sizes["heads"])
    check.within("sparf", 1, sizes["dim"], r=r)
    check.within("sparf", 1, sizes["length"], topk=topk)
    scale, group = q.shape[-1] ** -0.5 if scale is None else scale, sizes["heads"] // sizes["kv_heads"]
    vmean = v.float().mean(2) if vmean is None else vmean.float()
    wide = (x.float().repeat_interleave(group, 1) for x in (k, v, vmean))
    run = _sparf_rows if backend.choose("sparf", form, q, k, v, kernel=False) == "reference" else _sparf_all
    out, i, j = run(q.float(), *wide, r, topk, scale)
    return Fetched(out.to(q.dtype), i, j)


def _sparf_all(q: Tensor, k: Tensor, v: Tensor, vmean: Tensor, r: int, topk: int, scale: float) -> tuple:
    size = q.abs()
    i = topk_keep(size, r)
    part = torch.zeros_like(q).scatter_(-1, i, q.gather(-1, i))
    share = part.abs().sum(-1, keepdim=True) / size.sum(-1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
    share = share.masked_fill(share == 0, 1.0)  # a query of zeros
    guess = (part @ k.mT * (scale * share.rsqrt())).softmax(-1)
    j = topk_keep(guess, topk)
    covered = guess.gather(-1, j).sum(-1, keepdim=True).clamp(max=1.0)
    keys, values = (_rows(x, j) for x in (k, v))
    weight = (scale * (keys @ q[..., None])[..., 0]).softmax(-1)
    out = (weight[..., None, :] @ values)[..., 0, :]
    return covered * out + (1 - covered) * vmean[:, :, None], i, j


def _rows(x: Tensor, j: Tensor) -> Tensor:
    """Tokens j (B, H, n, t) of x (B, H, L, D): (B, H, n, t, D)."""
    return take(x, j.flatten(2)).unflatten(2, j.shape[2:])


def _sparf_rows(q: Tensor, k: Tensor, v: Tensor, vmean: Tensor, r: int, topk: int, scale: float) -> tuple:
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    channels, tokens = (torch.empty(*q.shape[:3], n, dtype=torch.int64) for n in (r, topk))
    for at in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        head, at = tuple(at[:2]), tuple(at)
        row = q[at]
        channels[at] = i = topk_keep(row.abs(), r)
        share = row[i].abs().sum() / row.abs().sum() if bool(row.any()) else 1.0
        guess = torch.softmax(k[head][:, i] @ row[i] * scale / share**0.5, 0)
        tokens[at] = j = topk_keep(guess, topk)
        weight = torch.softmax(k[head][j] @ row * scale, 0)
        covered = guess[j].sum().clamp(max=1.0)
        out[at] = covered * (weight @ v[head][j]) + (1 - covered) * vmean[head]
    return out, channels, tokens


class ShadowState(NamedTuple):
    """One layer. Tokens of the chunks come first, `local` ones after them."""

    factors: Factors  # keys of the chunks before rotary positions, u (B, C·chunk, r)
    v: Tensor  # (B, Hkv, C·chunk, Dv), values of the chunks: what lies in slow memory
    landmarks: Tensor  # (B, Hkv, C - outliers, D), mean keys of the listed chunks
    listed: Tensor  # (B, Hkv, C - outliers) int32, which chunks these are
    outliers: Tensor  # (B, Hkv, outliers) int32, chunks kept exactly
    exact: Pair  # their keys and values, (B, Hkv, outliers·chunk, D)
    local: Pair  # the last chunks of the prompt, its remainder, and the generated tokens
    rotate: Rotate
    chunk: int
    budget: int  # tokens fetched at each step


def shadow_build(
    k: Tensor, v: Tensor, *, rotate: Rotate, unrotate: Rotate, rank: int, budget: int, chunk: int = 8, outliers: int = 48,
    local: int = 4,
) -> ShadowState:  # fmt: skip
    """The state after a prompt with keys k (after rotary positions) and values v, (B, Hkv, L, D).

    Args:
        rotate, unrotate: `memlens.attention.rope.rope` and `unrope` with the model's inv_freq.
        rank: of the factors, at most min(L, Hkv·D).
        budget: tokens fetched at each step, a multiple of `chunk`; at or above what is listed, all are.
        chunk: tokens that share a landmark.
        outliers: chunks of each head that are kept exactly.
        local: newest whole chunks, kept exactly like the remainder.
    Raises:
        ValueError: a budget that is no multiple of chunk, a prompt too short for the outliers, a rank outside.
    Source: arXiv:2410.21465, algorithm 1.
    """
    check.shapes("shadow_build", k=(k, "batch kv_heads length dim"), v=(v, "batch kv_heads length value_dim"))
    check.at_least("shadow_build", 1, chunk=chunk, budget=budget)
    check.divides("shadow_build", chunk=chunk, budget=budget)
    chunks = k.shape[2] // chunk - local
    fix = f"the prompt's {k.shape[2]} tokens make {chunks} chunks besides {local} local ones, of which {outliers} are outliers"
    check.at_least("shadow_build", outliers + 1, fix, chunks=chunks)
    cut = chunks * chunk
    u, sv = joint_svd(unrotate(k, torch.arange(k.shape[2], device=k.device)), rank)
    landmarks = chunk_landmarks(k[:, :, :cut], chunk)
    odd = outlier_chunks(k[:, :, :cut], landmarks, outliers)
    listed = complement(odd, chunks)
    exact = Pair(*(take(x, _tokens(odd, chunk)) for x in (k, v)))
    new = Pair(*(own(x[:, :, cut:]) for x in (k, v)))
    factors = Factors(own(u[:, :cut]), sv)
    small = (x.to(torch.int32) for x in (listed, odd))
    return ShadowState(factors, own(v[:, :, :cut]), take(landmarks, listed), *small, exact, new, rotate, chunk, budget)


def shadow_append(state: ShadowState, k: Tensor, v: Tensor) -> ShadowState:
    """The state after n generated tokens, (B, Hkv, n, D), kept exactly."""
    return state._replace(local=Pair(*append(state.local, k, v)))


def shadow_read(state: ShadowState) -> tuple[Tensor, Tensor]:
    """Keys and values of every token, oldest first: rebuilt from the factors but for outliers and local tokens."""
    k = reconstruct(*state.factors, rotate=state.rotate)
    place = _tokens(state.outliers, state.chunk)[..., None].expand(state.exact.k.shape)
    k = k.scatter(2, place, state.exact.k)
    return torch.cat((k, state.local.k), 2), torch.cat((state.v, state.local.v), 2)


def chosen_chunks(q: Tensor, state: ShadowState, *, scale: float | None = None) -> Tensor:
    """The listed chunks that a step with queries q (B, H, n, D) fetches, (B, Hkv, budget / chunk) int64 ascending.

    Each query's softmax over the landmarks, summed over the rows; a kv head takes the largest over its query heads.
    """
    landmarks, group = state.landmarks, q.shape[1] // state.landmarks.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    score = (q.unflatten(1, (-1, group)) @ landmarks[:, :, None].mT).float().mul(scale).softmax(-1)  # (B, Hkv, g, n, C)
    best = topk_keep(score.sum(3).amax(2), state.budget // state.chunk)
    return state.listed.long().gather(-1, best)


def shadow_decode(
    q: Tensor, state: ShadowState, *, causal: bool = True, scale: float | None = None, form: str = "auto"
) -> Attended:
    """Attention of a decoding step to outliers, chosen chunks and local tokens, under one softmax: (out, lse).

    Only the chosen chunks' keys are rebuilt and only their values read.

    Args:
        q: (B, H, n, D), after rotary positions; the state holds the step's own n tokens already, as the newest.
        causal: row i sees the step's tokens up to its own; all else is in the past.
        form: "reference" rebuilds every key and masks, "torch" gathers, "auto".
    Raises:
        ValueError: shapes that disagree.
    """
    sizes = check.shapes(
        "shadow_decode", q=(q, "batch heads rows dim"), landmarks=(state.landmarks, "batch kv_heads listed dim")
    )
    check.divides("shadow_decode", kv_heads=sizes["kv_heads"], heads=sizes["heads"])
    chunks = chosen_chunks(q, state, scale=scale)
    options = {"causal": causal, "scale": scale, "return_lse": True, "form": form}
    if backend.choose("shadow_decode", form, q, state.v, kernel=False) == "reference":
        return attend(q, *shadow_read(state), mask=_mask(chunks, state, sizes["heads"]), **options)
    idx = _tokens(chunks, state.chunk)
    fetched = Pair(reconstruct(*state.factors, idx, state.rotate), take(state.v, idx))
    k, v = (torch.cat(parts, 2) for parts in zip(state.exact, fetched, state.local, strict=True))
    return attend(q, k, v, **options)


def _mask(chunks: Tensor, state: ShadowState, heads: int) -> Tensor:
    """(B, H, 1, tokens) bool: what a step sees that fetches `chunks`."""
    batch, kv_heads, cut, _ = state.v.shape
    seen = torch.ones(batch, kv_heads, cut + state.local.k.shape[2], dtype=torch.bool, device=chunks.device)
    seen[..., :cut] = False
    seen = seen.scatter(-1, _tokens(torch.cat((chunks, state.outliers.long()), -1), state.chunk), True)
    return seen.repeat_interleave(heads // kv_heads, 1)[:, :, None]


def _tokens(chunks: Tensor, chunk: int) -> Tensor:
    """The tokens of chunks (B, Hkv, c), in the same order: (B, Hkv, c·chunk) int64."""
    return (chunks.long()[..., None] * chunk + torch.arange(chunk, device=chunks.device)).flatten(2)
