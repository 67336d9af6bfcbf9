"""What one attention call asks for, and the autograd function that every fast form runs through.

A form is a pair of functions without autograd:

    forward(q, k, v, bias, call) -> out, lse
    backward(q, k, v, bias, call, out, lse, dout, dlse) -> dq, dk, dv, dbias

The backward recomputes the probabilities from lse, so nothing of size (q_len, k_len) is kept between the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memlens.attention.merge import Attended

__all__ = ["Call", "additive", "differentiable", "visible", "window"]


class Call(NamedTuple):
    scale: float
    causal: bool
    offset: int  # query i has position offset + i
    mask: Tensor | None = None  # bool, 4-d, each axis of full size or 1; True = may attend
    blocks: Any = None  # the plan of a block-sparse call


def window(x: Tensor | None, rows: slice, keys: slice) -> Tensor | None:
    """The part of a mask or bias for some rows and keys; an axis of size 1 stays as it is."""
    if x is None:
        return None
    x = x[..., rows, :] if x.shape[-2] > 1 else x
    return x[..., keys] if x.shape[-1] > 1 else x


def visible(call: Call, rows: slice, keys: slice, device: torch.device) -> Tensor | None:
    """Which keys each row of a tile may attend to: bool, broadcastable to the tile; None where all may."""
    seen = window(call.mask, rows, keys)
    if not call.causal or keys.stop - 1 <= call.offset + rows.start:
        return seen
    position = torch.arange(rows.start, rows.stop, device=device) + call.offset
    past = torch.arange(keys.start, keys.stop, device=device) <= position[:, None]
    return past if seen is None else past & seen


def additive(call: Call, bias: Tensor | None, rows: slice, keys: slice, like: Tensor) -> Tensor | None:
    """Bias, mask and diagonal of a tile as one tensor to add to its scores (-inf = hidden); None where there is none."""
    seen, added = visible(call, rows, keys, like.device), window(bias, rows, keys)
    wide = torch.promote_types(like.dtype, torch.float32)
    if added is not None:
        added = added.to(wide)
        return added if seen is None else torch.where(seen, added, -torch.inf)
    if seen is None:
        return None
    return torch.zeros(seen.shape, dtype=wide, device=like.device).masked_fill_(~seen, -torch.inf)


class _Attend(torch.autograd.Function):
    # without a separate setup_context, which costs as much as a small call itself
    @staticmethod
    def forward(ctx, q, k, v, bias, call, forward, backward):
        out, lse = forward(q, k, v, bias, call)
        ctx.call, ctx.backward_form = call, backward
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, bias, out, lse = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 7
        if dout is None:
            dout = torch.zeros_like(out)
        if dlse is not None:
            # an empty row has lse = -inf whatever the inputs are: its gradient is 0
            dlse = dlse.masked_fill(lse == -torch.inf, 0.0)
        bias = bias if ctx.needs_input_grad[3] or bias is None else bias.detach()
        grads = ctx.backward_form(q, k, v, bias, ctx.call, out, lse, dout, dlse)
        return (*grads, None, None, None)


def differentiable(forward: Callable, backward: Callable, q, k, v, bias: Tensor | None, call: Call) -> Attended:
    """Run a form so that the gradients of out and lse flow into q, k, v and bias."""
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in (q, k, v, bias)):
        return Attended(*forward(q, k, v, bias, call))
    return Attended(*_Attend.apply(q, k, v, bias, call, forward, backward))
