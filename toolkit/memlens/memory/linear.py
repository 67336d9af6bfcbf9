"""Linear attention: a matrix that remembers keys and values, read by queries, decayed and corrected on the way.

    S_t = exp(g_t) S_{t-1} + k_t u_tᵀ,   u_t = v_t  or  beta_t (v_t - S'ᵀk_t) with S' the decayed state,   o_t = scale S_tᵀ q_t

One operator carries the family: `log_decay` is absent (Based, linear attention), one number per head (RetNet, Mamba-2) or one per
key channel (GLA, KDA); `rule="delta"` replaces what a key held instead of adding to it (DeltaNet, Gated DeltaNet);
`normalize=True` divides by the same sum over ones. Sources: arXiv:2006.16236, arXiv:2406.06484, arXiv:2412.06464, arXiv:2312.06635.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memlens import backend, check
from memlens.memory.call import Inputs, LinearState, check_inputs, finish, prepare
from memlens.memory.chunked import chunked
from memlens.memory.features import poly_features, taylor_features

__all__ = [
    "AffineState", "LinearState", "affine_of", "compose", "linear_attention", "linear_attention_step", "poly_features",
    "state_of", "taylor_features",
]  # fmt: skip


KERNEL_KEY, CHANNEL_KEY = 128, 64  # the widest key that the kernels take; the second in float32 with a decay per channel


class AffineState(NamedTuple):
    """What a stretch of tokens does to any state: S_out = L S_in + M. It is all that two ranks need to exchange."""

    L: Tensor  # (batch, heads), (batch, heads, key_dim) or (batch, heads, key_dim, key_dim)
    M: Tensor  # (batch, heads, key_dim, value_dim)


def state_of(k: Tensor, v: Tensor, *, mask: Tensor | None = None, normalize: bool = False) -> LinearState:
    """The state after all tokens at once, S = sum_t k_t v_tᵀ (and z = sum_t k_t): the write without an order.

    Args:
        k, v: (batch, heads, length, key_dim) and (.., value_dim).
        mask: (batch, length) bool; False leaves a token out.
    Raises:
        ValueError: shapes that disagree.
    """
    check.shapes(
        "state_of", k=(k, "batch heads length key_dim"), v=(v, "batch heads length value_dim"), mask=(mask, "batch length")
    )
    wide = torch.promote_types(k.dtype, torch.float32)
    k, v = k.to(wide), v.to(wide)
    if mask is not None:
        k, v = (x.masked_fill(~mask[:, None, :, None], 0) for x in (k, v))
    return LinearState(k.mT @ v, k.sum(-2) if normalize else None)


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor | None = None, beta: Tensor | None = None, rule: str = "add",
    normalize: bool = False, scale: float = 1.0, eps: float = 1e-12, state: LinearState | None = None,
    mask: Tensor | None = None, chunk: int = 64, form: str = "auto",
) -> tuple[Tensor, LinearState]:  # fmt: skip
    """The output of every token and the state after the last one.

    Per token: S = exp(g) S;  u = v, or beta (v - Sᵀk) for the delta rule;  S += k uᵀ;  o = scale Sᵀq. With `normalize`
    z decays and gathers k the same way and o = scale Sᵀq / (scale zᵀq + eps).

    Args:
        q, k, v: (batch, heads, length, key_dim), (.., key_dim), (.., value_dim); each may have fewer heads that divide `heads`,
            shared by groups of neighbours. One dtype.
        log_decay: g <= 0, natural log of the share kept per token, (batch, heads, length) or (.., key_dim).
        beta: (batch, heads, length) in [0, 1], how far the delta rule moves towards v; exactly with rule="delta".
        normalize: only with rule="add"; the caller sees to it that weights are positive.
        state: what came before; None is empty.
        mask: (batch, length) bool; a False token leaves the state alone and reads zero.
        chunk: a power of two, tokens computed at once; it changes speed, not the answer. The kernel may take fewer.
        form: "reference" (the loop above), "torch" (by chunks), "triton" (kernels, for key_dim <= 128; in float32 with a decay
            per channel <= 64) or "auto".
    Returns:
        out (batch, heads, length, value_dim) in q's dtype, and the state in float32.
    Raises:
        ValueError: shapes, gates out of range or not finite, no token, a state that does not fit, normalize with delta; with
            form="triton" a key_dim above 128, or above 64 in float32 with a decay per channel.
        RuntimeError: form="triton" where it cannot run.
    """
    op = "linear_attention"
    check_inputs(op, q, k, v, log_decay, beta, rule, normalize, state, mask)
    if chunk < 1 or chunk & (chunk - 1):
        check.fail(op, f"chunk={chunk}", "a power of two")
    by_channel = log_decay is not None and log_decay.ndim == 4
    widest = CHANNEL_KEY if by_channel and q.dtype == torch.float32 else KERNEL_KEY
    form = backend.choose(op, form, q, k, v, kernel=q.shape[-1] <= widest or form == "triton")
    x = prepare(q, k, v, log_decay, beta, normalize, state, mask, native=form == "triton")
    if form == "reference":
        out, S = _reference(x, scale)
    elif form == "torch":
        out, S = chunked(*x, scale=scale, chunk=chunk)
    else:
        from memlens.memory.fused import fused  # triton loads on first use

        out, S = fused(*x, scale=scale, chunk=chunk, dtype=x.S.dtype if normalize else q.dtype)
    return finish(out, S, q.dtype, normalize, eps, mask)


def linear_attention_step(
    q: Tensor, k: Tensor, v: Tensor, state: LinearState | None, *, log_decay: Tensor | None = None, beta: Tensor | None = None,
    rule: str = "add", normalize: bool = False, scale: float = 1.0, eps: float = 1e-12, mask: Tensor | None = None,
) -> tuple[Tensor, LinearState]:  # fmt: skip
    """One token of `linear_attention`: the same arguments without the length axis, mask (batch,).

    Returns:
        out (batch, heads, value_dim) and the next state; the given state is not written to.
    """
    op = "linear_attention_step"
    check.shapes(op, q=(q, "batch heads key_dim"), k=(k, "batch k_heads key_dim"), v=(v, "batch v_heads value_dim"))
    q, k, v = (x.unsqueeze(2) for x in (q, k, v))
    log_decay, beta = (None if x is None else x.unsqueeze(2) for x in (log_decay, beta))
    mask = None if mask is None else mask.unsqueeze(1)
    check_inputs(op, q, k, v, log_decay, beta, rule, normalize, state, mask)
    out, S = _reference(prepare(q, k, v, log_decay, beta, normalize, state, mask), scale)
    out, state = finish(out, S, q.dtype, normalize, eps, mask)
    return out.squeeze(2), state


def affine_of(k: Tensor, v: Tensor, *, log_decay=None, beta=None, rule: str = "add", form: str = "auto") -> AffineState:
    """What these tokens do to any state that comes in; arguments as in `linear_attention`.

    L is one number per head or per channel for rule="add" and a matrix for the delta rule, which is read off by sending an
    identity through it with nothing to write.
    """
    q = torch.zeros_like(k)
    M = linear_attention(q, k, v, log_decay=log_decay, beta=beta, rule=rule, form=form)[1].S
    if rule == "add":
        return AffineState(M.new_ones(M.shape[:2]) if log_decay is None else log_decay.to(M.dtype).sum(2).exp(), M)
    eye = torch.eye(k.shape[-1], dtype=M.dtype, device=k.device).expand(*M.shape[:2], -1, -1)
    nothing = v.new_zeros(*v.shape[:-1], k.shape[-1])
    return AffineState(
        linear_attention(q, k, nothing, log_decay=log_decay, beta=beta, rule=rule, state=LinearState(eye), form=form)[1].S,
        M,
    )


def compose(first: AffineState, then: AffineState) -> AffineState:
    """The two stretches as one: S -> then.L (first.L S + first.M) + then.M. Associative, so ranks may combine in any tree.

    Raises:
        ValueError: M shapes that disagree, or an L that has no batch and heads in common with its M.
    """
    for name, part in (("first", first), ("then", then)):
        lead = part.M.shape[: part.L.ndim] if part.L.ndim < 4 else (*part.M.shape[:3], part.M.shape[2])
        if part.M.shape != first.M.shape or not 2 <= part.L.ndim <= 4 or part.L.shape != lead:
            check.fail(
                "compose",
                f"{name} has L {tuple(part.L.shape)}, M {tuple(part.M.shape)}",
                f"L to fit M {tuple(first.M.shape)}",
            )
    return AffineState(_times(then.L, first.L), _apply(then.L, first.M) + then.M)


def _apply(L: Tensor, M: Tensor) -> Tensor:
    return L @ M if L.ndim == 4 else L.reshape(*L.shape, *(1,) * (4 - L.ndim)) * M


def _times(a: Tensor, b: Tensor) -> Tensor:
    if a.ndim < 4 and b.ndim < 4:
        wide = max(a.ndim, b.ndim)
        return a.reshape(*a.shape, *(1,) * (wide - a.ndim)) * b.reshape(*b.shape, *(1,) * (wide - b.ndim))
    if b.ndim == 4:
        return _apply(a, b)
    return a * (b[..., None, :] if b.ndim == 3 else b[..., None, None])


def _reference(x: Inputs, scale: float) -> tuple[Tensor, Tensor]:
    S, out = x.S, []
    for t in range(x.q.shape[2]):
        q, k, v = x.q[:, :, t], x.k[:, :, t], x.v[:, :, t]
        if x.g is not None:
            kept = x.g[:, :, t].exp()
            S = kept[..., None] * S if kept.ndim == 3 else kept[..., None, None] * S
        u = v if x.beta is None else x.beta[:, :, t, None] * (v - torch.einsum("bhkv,bhk->bhv", S, k))
        S = S + k[..., :, None] * u[..., None, :]
        out.append(scale * torch.einsum("bhkv,bhk->bhv", S, q))
    return torch.stack(out, dim=2), S
