"""What linear attention and its kin share around the arithmetic: checks, masks, shared heads, the normaliser."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from memlens import check

__all__ = ["Inputs", "LinearState", "check_inputs", "finish", "prepare", "share"]

RULES = ("add", "delta")


class LinearState(NamedTuple):
    S: Tensor  # (batch, heads, key_dim, value_dim), float32 (float64 for float64 inputs)
    z: Tensor | None = None  # (batch, heads, key_dim), the sum of keys; present iff normalize


class Inputs(NamedTuple):
    """Checked and masked arguments, all of one head count, in the dtype of the state."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None  # log decay
    beta: Tensor | None  # present iff rule="delta"
    S: Tensor


def prepare(q, k, v, g, beta, normalize, state, mask, *, features: int | None = None, native: bool = False) -> Inputs:
    """Mask, widen, share heads, start the state; `normalize` becomes a value column of ones, so that no form need know.

    `features` is the key dim of the state where it is not that of k; `native` leaves q, k, v in their dtype and head count.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    heads = max(x.shape[1] for x in (q, k, v, g, beta) if x is not None)
    if normalize:
        v = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)
    if mask is not None:
        out = ~mask[:, None, :]
        q, k, v, g, beta = (
            None if x is None else x.masked_fill(out[..., None] if x.ndim == 4 else out, 0) for x in (q, k, v, g, beta)
        )
    g, beta = (None if x is None else share(x.to(wide), heads) for x in (g, beta))
    if not native:
        q, k, v = (share(x.to(wide), heads) for x in (q, k, v))
    if state is None:
        S = q.new_zeros(q.shape[0], heads, features or q.shape[-1], v.shape[-1], dtype=wide)
    else:
        S = torch.cat((state.S, state.z[..., None]), dim=-1) if normalize else state.S
    return Inputs(q, k, v, g, beta, S)


def share(x: Tensor, heads: int) -> Tensor:
    """Each head of x repeated for its group of neighbours, (batch, heads, ..)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def finish(out, S, dtype, normalize, eps, mask) -> tuple[Tensor, LinearState]:
    """Take the column of ones apart again, divide by it, silence masked tokens, and return q's dtype."""
    state = LinearState(S)
    if normalize:
        out = out[..., :-1] / (out[..., -1:] + eps)
        state = LinearState(S[..., :-1], S[..., -1])
    if mask is not None:
        out = out.masked_fill(~mask[:, None, :, None], 0)
    return out.to(dtype), state


def check_inputs(op, q, k, v, log_decay, beta, rule, normalize, state, mask, *, features: int | None = None) -> None:
    """Refuse what no form could compute; `features` as in `prepare`."""
    sizes = check.shapes(
        op, q=(q, "batch q_heads length key_dim"), k=(k, "batch k_heads length key_dim"),
        v=(v, "batch v_heads length value_dim"), mask=(mask, "batch length"),
    )  # fmt: skip
    check.same_dtype(op, q=q, k=k, v=v)
    check.one_of(op, RULES, rule=rule)
    check.at_least(op, 1, "pass at least one token and one channel", **sizes)
    heads = max(sizes["q_heads"], sizes["k_heads"], sizes["v_heads"])
    check.layout(op, heads, sizes["length"])
    for name in ("q_heads", "k_heads", "v_heads"):
        check.divides(op, **{name: sizes[name], "heads": heads})
    _check_gates(op, log_decay, beta, rule, normalize, {**sizes, "heads": heads})
    if state is not None:
        shape = (sizes["batch"], heads, features or sizes["key_dim"], sizes["value_dim"])
        _check_state(op, state, normalize, shape, torch.promote_types(q.dtype, torch.float32))
    if mask is not None and mask.dtype != torch.bool:
        check.fail(op, f"mask is {mask.dtype}", "bool, True where a token counts")


def _check_gates(op, log_decay, beta, rule, normalize, sizes) -> None:
    if normalize and rule != "add":
        check.fail(op, f"normalize with rule={rule!r}", "rule='add'", "the delta rule has no positive weights to divide by")
    if (beta is not None) != (rule == "delta"):
        check.fail(op, f"rule={rule!r} {'with' if beta is not None else 'without'} beta", "beta exactly with rule='delta'")
    if log_decay is not None:
        axes = "batch heads length key_dim" if log_decay.ndim == 4 else "batch heads length"
        _check_shape(op, "log_decay", log_decay, axes, sizes)
        check.finite(op, log_decay=log_decay)
        check.within(op, -math.inf, 0, log_decay=log_decay)
    if beta is not None:
        _check_shape(op, "beta", beta, "batch heads length", sizes)
        check.within(op, 0, 1, beta=beta)


def _check_shape(op, name, x, axes, sizes) -> None:
    wanted = tuple(sizes[axis] for axis in axes.split())
    if tuple(x.shape) != wanted:
        check.fail(op, f"{name} has shape {tuple(x.shape)}", f"({axes.replace(' ', ', ')}) = {wanted}")


def _check_state(op, state, normalize, shape, dtype) -> None:
    if (state.z is not None) != normalize:
        came = f"a state {'with' if state.z is not None else 'without'} z and normalize={normalize}"
        check.fail(op, came, "z exactly with normalize")
    for name, x, wanted in (("state.S", state.S, shape), ("state.z", state.z, shape[:3])):
        if x is not None and (tuple(x.shape) != wanted or x.dtype != dtype):
            came = f"{name} is {tuple(x.shape)} {x.dtype}"
            check.fail(op, came, f"{wanted} {dtype}", "pass the state that the last call returned")
