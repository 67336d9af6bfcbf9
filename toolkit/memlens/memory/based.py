"""Based's linear branch: weights 1 + s + s²/2 in place of exp(s), and a state of 153 features in place of the keys.

Every form is `taylor_features` and `linear_attention(normalize=True)` by definition. The fast forms build no features for pairs inside
a chunk: there the weight comes from s itself, and only what leaves the chunk is expanded. Source: arXiv:2402.18668.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memlens import backend, check
from memlens.memory.call import LinearState, check_inputs, finish, prepare
from memlens.memory.chunked import fold
from memlens.memory.features import feature_count, taylor_features

__all__ = ["taylor_attention", "taylor_weight"]

KERNEL_FEATURES = 16


def taylor_weight(s: Tensor) -> Tensor:
    """1 + s + s²/2 = ((1 + s)² + 1)/2, never below 1/2."""
    return ((1 + s).square() + 1) / 2


def taylor_attention(
    q: Tensor, k: Tensor, v: Tensor, *, state: LinearState | None = None, mask: Tensor | None = None, eps: float = 1e-12,
    chunk: int = 128, form: str = "auto",
) -> tuple[Tensor, LinearState]:  # fmt: skip
    """Attention with weight w_ij = 1 + s + s²/2, s = q_i·k_j / sqrt(feature_dim): sum_j w_ij v_j / (sum_j w_ij + eps), j <= i.

    Args:
        q, k: (batch, heads, length, feature_dim); k and v may have fewer heads that divide `heads`.
        v: (batch, heads, length, value_dim).
        state: S (batch, heads, F, value_dim) and z (batch, heads, F) as returned, F = 1 + f + f(f + 1)/2 packed features.
        mask: (batch, length) bool; a False token leaves the state alone and reads zero.
        chunk: a power of two; the torch form holds (chunk, chunk) weights.
        form: "reference" (token by token over features), "torch", "triton", "auto". The kernel goes forward, for
            feature_dim <= 16; its backward is the torch form's.
    Returns:
        out (batch, heads, length, value_dim) in q's dtype, and the state in float32.
    Raises:
        ValueError: as `linear_attention`; with form="triton" feature_dim above 16, or float32 on a device.
    """
    op = "taylor_attention"
    check.shapes(op, q=(q, "batch q_heads length feature_dim"))
    check.at_least(op, 1, "give q and k a feature", feature_dim=q.shape[-1])
    features = feature_count(q.shape[-1])
    check_inputs(op, q, k, v, None, None, "add", True, state, mask, features=features)
    if chunk < 1 or chunk & (chunk - 1):
        check.fail(op, f"chunk={chunk}", "a power of two")
    if form == "triton" and q.shape[-1] > KERNEL_FEATURES:
        check.fail(op, f"feature_dim={q.shape[-1]} with form='triton'", f"at most {KERNEL_FEATURES}", "use form='torch'")
    fits = q.shape[-1] <= KERNEL_FEATURES and (form == "triton" or q.dtype != torch.float32)
    form = backend.choose(op, form, q, k, v, kernel=fits)
    x = prepare(q, k, v, None, None, True, state, mask, features=features, native=form == "triton")
    if form == "triton":
        from memlens.memory.fused import fused_taylor  # triton loads on first use

        out, S = fused_taylor(x.q, x.k, x.v, x.S)
    else:
        run = _reference if form == "reference" else chunked_taylor
        out, S = run(x.q, x.k, x.v, x.S, chunk=chunk, fresh=state is None)
    return finish(out, S, q.dtype, True, eps, mask)


def _reference(q, k, v, S, *, chunk, fresh) -> tuple[Tensor, Tensor]:
    f_q, f_k, out = taylor_features(q), taylor_features(k), []
    for t in range(q.shape[2]):
        S = S + f_k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append(torch.einsum("bhfv,bhf->bhv", S, f_q[:, :, t]))
    return torch.stack(out, dim=2), S


def chunked_taylor(q, k, v, S, *, chunk: int, fresh: bool = False) -> tuple[Tensor, Tensor]:
    """Unnormalised out and the last state; v holds the column of ones, and `fresh` says that S is zero."""
    length = q.shape[2]
    q, k, v = (fold(x, min(chunk, 1 << (length - 1).bit_length())) for x in (q, k, v))
    out = taylor_weight(q @ k.mT * q.shape[-1] ** -0.5).tril() @ v
    # a token of the filling has features too, that of the constant: its v is zero, which keeps it out of the state
    after = S[:, :, None] + (taylor_features(k).mT @ v).cumsum(2)
    skip = int(fresh)
    if out.shape[2] > skip:
        before = torch.cat((S[:, :, None], after[:, :, :-1]), dim=2)[:, :, skip:]
        past = taylor_features(q[:, :, skip:]) @ before
        out = torch.cat((out[:, :, :skip], out[:, :, skip:] + past), dim=2)
    return out.flatten(2, 3)[:, :, :length], after[:, :, -1]
