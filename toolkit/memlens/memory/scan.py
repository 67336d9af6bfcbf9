"""The scan behind `selective_scan`: h = exp(dt A) h + dt x B, y = C·h, with a decay for every channel and state.

The loop over tokens is the definition. The fast form keeps only the state at every 16th token and, going back, walks each stretch
again: at (batch, length, channels, states) the full history would be `states` times the activations. Source: arXiv:2312.00752, 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["scan", "scan_reference"]

STRETCH = 16


def scan_reference(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """y (batch, length, channels) and the last h; dt >= 0, all of one dtype, B and C with groups (batch, length, groups, states)."""
    share = x.shape[2] // B.shape[2]
    y = []
    for t in range(x.shape[1]):
        b, c = (m[:, t].repeat_interleave(share, dim=1) for m in (B, C))  # (batch, channels, states)
        h = (dt[:, t, :, None] * A).exp() * h + (dt[:, t] * x[:, t])[..., None] * b
        y.append((c * h).sum(-1))
    return torch.stack(y, dim=1), h


def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """`scan_reference` with a backward of its own; first derivatives only."""
    return _Scan.apply(x, dt, A, B, C, h)


def _walk(x, dt, A, B, h) -> tuple[Tensor, Tensor]:
    """The decays and the states after each token of a stretch, both (batch, tokens, groups, channels/groups, states)."""
    decay = (dt[..., None] * A).exp()
    states = (dt * x)[..., None] * B.unsqueeze(3)
    for t in range(x.shape[1]):
        h = torch.addcmul(states[:, t], decay[:, t], h, out=states[:, t])
    return decay, states


def _grouped(x, dt, A, B, h):
    groups = B.shape[2]
    return (
        x.unflatten(2, (groups, -1)),
        dt.unflatten(2, (groups, -1)),
        A.unflatten(0, (groups, -1)),
        h.unflatten(1, (groups, -1)),
    )


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, h):
        ctx.save_for_backward(x, dt, A, B, C)
        x, dt, A, h = _grouped(x, dt, A, B, h)
        y, ctx.starts = torch.empty_like(x), []
        for t in range(0, x.shape[1], STRETCH):
            part = slice(t, t + STRETCH)
            ctx.starts.append(h)
            states = _walk(x[:, part], dt[:, part], A, B[:, part], h)[1]
            y[:, part] = torch.einsum("btgcn,btgn->btgc", states, C[:, part])
            h = states[:, -1].clone()
        return y.flatten(2), h.flatten(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh):
        x, dt, A, B, C = ctx.saved_tensors
        x, dt, A, dh = _grouped(x, dt, A, B, dh)
        dy = dy.unflatten(2, (B.shape[2], -1))
        dx, ddt, dA, dB, dC = (torch.zeros_like(m) for m in (x, dt, A, B, C))
        for n in reversed(range(len(ctx.starts))):
            part = slice(n * STRETCH, (n + 1) * STRETCH)
            start, here = ctx.starts[n], (x[:, part], dt[:, part])
            decay, states = _walk(*here, A, B[:, part], start)
            dC[:, part] = torch.einsum("btgc,btgcn->btgn", dy[:, part], states)
            grad = dy[:, part, ..., None] * C[:, part].unsqueeze(3)  # becomes the gradient of each state
            for t in reversed(range(grad.shape[1])):
                dh = grad[:, t].add_(dh) * decay[:, t]
            held = torch.cat((start[:, None], states[:, :-1]), dim=1)
            bent = grad * held * decay  # of dt A
            read = torch.einsum("btgcn,btgn->btgc", grad, B[:, part])
            ddt[:, part] = torch.einsum("btgcn,gcn->btgc", bent, A) + read * here[0]
            dx[:, part] = read * here[1]
            dA += torch.einsum("btgcn,btgc->gcn", bent, here[1])
            dB[:, part] = torch.einsum("btgcn,btgc->btgn", grad, here[0] * here[1])
        return dx.flatten(2), ddt.flatten(2), dA.flatten(0, 1), dB, dC, dh.flatten(1, 2)
