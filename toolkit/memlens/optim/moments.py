"""Adam as a function: a gradient and two moments in, a direction and two moments out."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from memlens import check

__all__ = ["EPS_MODES", "Moments", "adam_direction", "bias_correction", "norm_growth_limit", "reset_moments"]

EPS_MODES = ("torch", "hf")


class Moments(NamedTuple):
    m: Tensor  # mean of the gradient, in its shape
    v: Tensor  # mean of its square
    step: int  # updates seen


def bias_correction(step: int, betas: tuple[float, float]) -> float:
    """sqrt(1 - b2^t) / (1 - b1^t): what Adam's step is multiplied with at its t-th update, t from 1."""
    check.at_least("bias_correction", 1, step=step)
    return math.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** step)


def check_adam(op: str, g: Tensor, m_shape, v_shape, betas, eps: float, eps_mode: str, step: int) -> float:
    """Refuse what no Adam step can take; returns what is added to sqrt(v) at this step. Shapes may be None."""
    check.one_of(op, EPS_MODES, eps_mode=eps_mode)
    check.within(op, 0.0, math.inf, eps=eps)
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        check.fail(op, f"betas={tuple(betas)}", "two numbers in [0, 1)")
    if not g.is_floating_point() or g.is_sparse:
        check.fail(op, f"g is {g.dtype}, {g.layout}", "dense floating point", "build the embedding with sparse=False")
    if any(shape is not None and tuple(shape) != tuple(g.shape) for shape in (m_shape, v_shape)):
        came = f"g {tuple(g.shape)}, moments {tuple(m_shape)} and {tuple(v_shape)}"
        check.fail(op, came, "one shape", "start anew with st=None")
    return eps * math.sqrt(1 - betas[1] ** step) if eps_mode == "torch" else eps


def adam_direction(
    g: Tensor, st: Moments | None, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, eps_mode: str = "torch"
) -> tuple[Tensor, Moments]:
    """Adam's direction for a gradient, to be subtracted with a learning rate, and the moments after it.

    m' = b1 m + (1 - b1) g,   v' = b2 v + (1 - b2) g²,   c = sqrt(1 - b2^t) / (1 - b1^t)
    "torch":  c m' / (sqrt(v') + eps sqrt(1 - b2^t)),  which is  m̂ / (sqrt(v̂) + eps)
    "hf":     c m' / (sqrt(v') + eps),  what transformers' AdamW and its heirs compute

    Args:
        g: any shape, floating point; moments are kept in float32 at least.
        st: None before the first step.
        eps: at least 0.
    Returns:
        the direction, in g's shape and the moments' dtype, and the new moments; `st` is left as it was.
    Raises:
        ValueError: betas outside [0, 1), a negative eps, an unknown mode, moments of another shape.
    Source: arXiv:1412.6980, algorithm 1 and the efficient form at the end of section 2.
    """
    step = (0 if st is None else st.step) + 1
    floor = check_adam("adam_direction", g, st and st.m.shape, st and st.v.shape, betas, eps, eps_mode, step)
    g = g.to(torch.promote_types(g.dtype, torch.float32))
    if st is None:
        m, v = g * (1 - betas[0]), g * g * (1 - betas[1])
    else:
        m, v = st.m.lerp(g, 1 - betas[0]), (st.v * betas[1]).addcmul_(g, g, value=1 - betas[1])
    return (m * bias_correction(step, betas)).div_(v.sqrt().add_(floor)), Moments(m, v, step)


def norm_growth_limit(u: Tensor, prev_norm: float | None, gamma: float = 1.01) -> tuple[Tensor, float]:
    """`u`, shrunk where its norm outgrew `gamma` times the last one, and the norm to compare with next time.

    Args:
        u: an update of any shape.
        prev_norm: what the last call returned. None sets no limit, nor does 0: one step without a gradient would
            otherwise stop the parameter for good.
        gamma: largest growth per step, above 0.
    Raises:
        ValueError: gamma that is not positive.
    Source: the limiter of Fira (arXiv:2410.01623), also in APOLLO (arXiv:2412.05270).
    """
    if not gamma > 0:
        check.fail("norm_growth_limit", f"gamma={gamma}", "gamma > 0")
    norm = float(torch.linalg.vector_norm(u, dtype=torch.promote_types(u.dtype, torch.float32)))
    if not prev_norm or norm <= gamma * prev_norm:
        return u, norm
    return u * (gamma * prev_norm / norm), gamma * prev_norm


def reset_moments(st: Moments) -> Moments:
    """Moments that have seen nothing, in the same shapes and dtypes; the bias correction starts again."""
    return Moments(torch.zeros_like(st.m), torch.zeros_like(st.v), 0)
