"""Autograd around the Triton kernels of linear attention; the kernels and their launchers are in `memlens_kernels`."""

from __future__ import annotations

import torch
from torch import Tensor

from memlens import check
from memlens.memory.call import share
from memlens.memory.chunked import corrections, fold

__all__ = ["fused", "fused_taylor"]


def fused(q, k, v, g, beta, S, *, scale: float, chunk: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Out and the last state by the kernels; q, k, v in their own dtype and head counts, g, beta and S in float32.

    For the delta rule the triangular systems of the chunks are solved by torch, and the kernels take it from there.

    Raises:
        ValueError: a key dim over the kernels' limit.
    """
    from memlens_kernels.linear import max_key, plan

    kind = {"channel": g is not None and g.ndim == 4, "dtype": q.dtype}
    if q.shape[-1] > (most := max_key(**kind)):
        check.fail("linear_attention", f"key_dim={q.shape[-1]} with form='triton'", f"at most {most}", "use form='torch'")
    p = plan(q.shape[-1], v.shape[-1], **kind, chunk=chunk)
    u, w = v, None
    if beta is not None:
        length, heads = q.shape[2], S.shape[1]
        wide = [fold(share(x.float(), heads), p.chunk) for x in (k, v)]
        gate = None if g is None else fold(g if g.ndim == 4 else g[..., None], p.chunk)
        u, w = (x.flatten(2, 3)[:, :, :length] for x in corrections(*wide, gate, fold(beta, p.chunk)))
    return _Chunks.apply(q, k, u, w, g, S, scale, p, dtype)


class _Chunks(torch.autograd.Function):
    """out and last state of S <- decay S + k (u - w S)ᵀ, o = scale Sᵀq by chunks."""

    @staticmethod
    def forward(ctx, q, k, u, w, g, S, scale, p, dtype):
        from memlens_kernels.linear import linear_forward

        q, k, u, w, g = (None if x is None else x.contiguous() for x in (q, k, u, w, g))
        out, writes, states = linear_forward(q, k, u, w, g, S, scale=scale, p=p, dtype=dtype)
        ctx.save_for_backward(q, k, writes, w, g, states)
        ctx.scale, ctx.p = scale, p
        return out, states[:, :, -1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlast):
        from memlens_kernels.linear import linear_backward

        q, k, writes, w, g, states = ctx.saved_tensors
        got = linear_backward(q, k, writes, w, g, states, dout.contiguous(), dlast, scale=ctx.scale, p=ctx.p)
        dg = None if g is None else _decay_grad(q, k, g, got, ctx.p.chunk)
        dq, dk, du = (_gather(x, like.shape[1]) for x, like in ((got.q, q), (got.k, k), (got.u, writes)))
        return dq.to(q.dtype), dk.to(k.dtype), du.to(writes.dtype), got.w, dg, got.first, None, None, None


def _gather(x: Tensor, heads: int) -> Tensor:
    """The gradients of the heads that shared one, added up."""
    return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).sum(2)


def _decay_grad(q, k, g, got, chunk: int) -> Tensor:
    """dL/dg_t = sum over s >= t in t's chunk of q_s dq_s - k_s dk_s, plus what passes through the state that leaves it.

    Every product of the chunk holds exp(G_i - G_j) once, with q_i as its reader and k_j as its writer.
    """
    heads, length = got.q.shape[1:3]
    each = fold(share(q.float(), heads) * got.q - share(k.float(), heads) * got.k, chunk)
    each = each.flip(3).cumsum(3).flip(3) + got.kept[:, :, :, None]
    each = each.flatten(2, 3)[:, :, :length]
    return each if g.ndim == 4 else each.sum(-1)


def fused_taylor(q, k, v, S) -> tuple[Tensor, Tensor]:
    """`chunked_taylor` by the kernel: unnormalised out and the last packed state, both float32; v holds the column of ones.

    Raises:
        ValueError: float32 on a device, where the three states spill.
    """
    from memlens.backend import interpreting

    if q.dtype == torch.float32 and not interpreting():
        fix = "cast q, k and v to bfloat16 or float16, or use form='torch'"
        check.fail(
            "taylor_attention", "float32 with form='triton'", "half precision: the three states spill in float32", fix
        )
    return _Taylor.apply(q, k, v, S)


class _Taylor(torch.autograd.Function):
    """Forward by the kernel; backward by differentiating the torch form, which the inputs are kept for."""

    @staticmethod
    def forward(ctx, q, k, v, S):
        from memlens_kernels.taylor import taylor_forward

        ctx.save_for_backward(q, k, v, S)
        dim = q.shape[-1]
        q, k = ((x * dim**-0.25).contiguous() for x in (q, k))
        out, last = taylor_forward(q, k, v.contiguous(), _spread(S, dim))
        return out, _pack(last, dim)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlast):
        from memlens.memory.based import chunked_taylor

        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            heads = inputs[3].shape[1]
            wide = [share(x.float(), heads) for x in inputs[:3]]
            got = chunked_taylor(*wide, inputs[3], chunk=128)
        return torch.autograd.grad(got, inputs, (dout, dlast))


def _places(dim: int, device) -> tuple[Tensor, Tensor, Tensor]:
    """Of each packed feature its row in the kernel's state and that of its mirror image, and sqrt(1/2) where they are one."""
    from memlens_kernels.taylor import FEATURES

    a, b = torch.triu_indices(dim, dim, device=device)
    plain = torch.arange(1 + dim, device=device)
    pairs, mirror = (1 + FEATURES + first * FEATURES + second for first, second in ((a, b), (b, a)))
    weight = torch.where(a == b, 0.5**0.5, 1.0)
    return (
        torch.cat((plain, pairs)),
        torch.cat((plain, mirror)),
        torch.cat((torch.ones_like(plain, dtype=torch.float32), weight)),
    )


def _spread(S: Tensor, dim: int) -> Tensor:
    """The packed state (.., F, V) as the kernel's (.., 273, V): every product of two features in both orders."""
    from memlens_kernels.taylor import ROWS

    rows, mirror, weight = _places(dim, S.device)
    full = S.new_zeros(*S.shape[:2], ROWS, S.shape[-1])
    full[:, :, rows] = S / weight[:, None]
    full[:, :, mirror] = S / weight[:, None]
    return full


def _pack(full: Tensor, dim: int) -> Tensor:
    rows, _, weight = _places(dim, full.device)
    return full[:, :, rows] * weight[:, None]
