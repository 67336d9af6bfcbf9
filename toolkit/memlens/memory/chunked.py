"""Linear attention by chunks in plain torch: inside a chunk a masked matrix product, between chunks the state.

No exponent is ever positive. A decay between two tokens is a sum of log decays from the later to the earlier, never the difference
of two running sums, so a token that forgets everything (g = -1000) neither overflows nor costs its neighbours digits.

For the delta rule the corrections u of a chunk solve (I + A) u = beta (v - k̃ᵀS), A strictly lower: arXiv:2406.06484, section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["chunked", "corrections", "fold", "from_start", "pairwise", "to_end"]


def chunked(q, k, v, g, beta, S, *, scale: float, chunk: int) -> tuple[Tensor, Tensor]:
    """Out (batch, heads, length, value_dim) and the last state, for arguments of one head count and one dtype.

    Args:
        q, k, v: (batch, heads, length, dim). g: None, (batch, heads, length) or (.., key_dim). beta: None or (batch, heads, length).
        S: (batch, heads, key_dim, value_dim), the state before the first token.
        chunk: a power of two.
    """
    length = q.shape[2]
    chunk = min(chunk, 1 << (length - 1).bit_length())
    q, k, v, g, beta = (None if x is None else fold(x, chunk) for x in (q, k, v, g, beta))
    if g is not None and g.ndim < k.ndim:
        g = g[..., None]
    u, w = (v, None) if beta is None else corrections(k, v, g, beta)
    written, kept = to_end(k, g).mT, None if g is None else g.sum(-2).exp()[..., None]
    starts, writes = [], []
    for n in range(k.shape[2]):
        starts.append(S)
        writes.append(u[:, :, n] if w is None else u[:, :, n] - w[:, :, n] @ S)
        S = (S if kept is None else kept[:, :, n] * S) + written[:, :, n] @ writes[-1]
    out = from_start(q, g) @ torch.stack(starts, 2) + pairwise(q, k, g) @ torch.stack(writes, 2)
    return scale * out.flatten(2, 3)[:, :, :length], S


def fold(x: Tensor, chunk: int) -> Tensor:
    """(batch, heads, length, ..) as (batch, heads, chunks, chunk, ..); zeros fill the last chunk, which change nothing."""
    short = -x.shape[2] % chunk
    if short:
        x = F.pad(x, (0, 0) * (x.ndim - 3) + (0, short))
    return x.unflatten(2, (-1, chunk))


def corrections(k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor) -> tuple[Tensor, Tensor]:
    """What the delta rule writes in each chunk, as u - w S for the state S that enters it: u (.., value_dim), w (.., key_dim)."""
    right = beta[..., None] * torch.cat((v, from_start(k, g)), dim=-1)
    left = beta[..., None] * pairwise(k, k, g)  # the solver takes the diagonal as ones
    solved = torch.linalg.solve_triangular(left, right, upper=False, unitriangular=True)
    return solved.split((v.shape[-1], k.shape[-1]), dim=-1)


def from_start(x: Tensor, g: Tensor | None) -> Tensor:
    """x_i times the decay from the start of its chunk up to and with i."""
    return x if g is None else x * g.cumsum(-2).exp()


def to_end(x: Tensor, g: Tensor | None) -> Tensor:
    """x_j times the decay after j up to the end of its chunk."""
    return x if g is None else x * _after(g).exp()


def _after(g: Tensor) -> Tensor:
    # shifted first and summed then: subtracting g_j from a sum that holds it would lose digits
    return F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def pairwise(a: Tensor, b: Tensor, g: Tensor | None) -> Tensor:
    """A[i, j] = sum_d a[i, d] b[j, d] exp(g[j + 1, d] + .. + g[i, d]) for j <= i, zero above: (.., chunk, chunk).

    Args:
        g: None, (.., chunk, 1) or (.., chunk, dim), at most 0; chunk a power of two in the last case.
    """
    if g is None:
        return (a @ b.mT).tril()
    if g.shape[-1] == 1:
        between = g.expand(*g.shape[:-1], g.shape[-2]).tril(-1).cumsum(-2)
        return (a @ b.mT * between.exp()).tril()
    return _pairwise_by_channel(a, b, g)


def _pairwise_by_channel(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """Blocks doubled from 1 to the chunk: a late row meets an early column at the middle, both decayed up to there."""
    blocks = (a * b).sum(-1)[..., None, None]
    while (size := blocks.shape[-1]) < a.shape[-2]:
        late, early = a.unflatten(-2, (-1, 2, size))[..., 1, :, :], b.unflatten(-2, (-1, 2, size))[..., 0, :, :]
        before, after = g.unflatten(-2, (-1, 2, size)).unbind(-3)
        cross = from_start(late, after) @ to_end(early, before).mT
        upper, lower = blocks.unflatten(-3, (-1, 2)).unbind(-3)
        blocks = torch.cat((torch.cat((upper, torch.zeros_like(upper)), -1), torch.cat((cross, lower), -1)), -2)
    return blocks[..., 0, :, :]
