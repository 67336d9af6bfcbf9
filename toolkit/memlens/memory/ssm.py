"""State-space mixers: short causal convolutions, the selective scan, and Mamba's block built from them.

Source: arXiv:2312.00752. The scan with one decay per head is `linear_attention(rule="add", q=C, k=B, v=dt x, log_decay=dt A)`; what is
here is the scan whose decay differs in every channel and every state.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memlens import backend, check
from memlens.memory.scan import scan, scan_reference

__all__ = ["MambaParams", "MambaState", "gated_short_conv", "mamba_mixer", "selective_scan", "short_conv"]

ACTIVATIONS = {None: lambda x: x, "silu": F.silu}


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None, state: Tensor | None = None,
    segment: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A causal convolution of each channel by itself, y_t = act(bias + sum_i weight[:, i] x_{t - taps + 1 + i}), and its state.

    Args:
        x: (batch, length, channels). weight: (channels, taps), the last tap is the present. bias: (channels,).
        activation: None or "silu".
        state: (batch, channels, taps - 1), the inputs before the first token, oldest first; None is zeros.
        segment: (batch, length) integers; a token sees only inputs of its own segment, and of the state iff it is in the segment
            of the first token (which the state is taken to continue).
    Returns:
        y like x, and the last taps - 1 inputs; of the last token's segment only where segments are given.
    Raises:
        ValueError: shapes that disagree, no token, no tap.
    """
    op = "short_conv"
    sizes = check.shapes(
        op,
        x=(x, "batch length channels"),
        weight=(weight, "channels taps"),
        bias=(bias, "channels"),
        segment=(segment, "batch length"),
    )
    check.at_least(op, 1, **sizes)
    check.one_of(op, ["silu"] if activation else ["None"], activation=str(activation))
    taps, length = sizes["taps"], sizes["length"]
    if state is None:
        state = x.new_zeros(sizes["batch"], sizes["channels"], taps - 1)
    elif state.shape != (sizes["batch"], sizes["channels"], taps - 1):
        check.fail(
            op,
            f"state has shape {tuple(state.shape)}",
            f"(batch, channels, taps - 1) = {(sizes['batch'], sizes['channels'], taps - 1)}",
        )
    past = torch.cat((state.mT.to(x.dtype), x), dim=1)
    where = None if segment is None else torch.cat((segment[:, :1].expand(-1, taps - 1), segment), dim=1)
    y = x * weight[:, -1]
    for i in range(taps - 1):
        term = past[:, i : i + length] * weight[:, i]
        y = y + (term if where is None else term.masked_fill((where[:, i : i + length] != segment)[..., None], 0))
    y = ACTIVATIONS[activation](y if bias is None else y + bias)
    kept = past[:, length:]
    if where is not None:
        kept = kept.masked_fill((where[:, length:] != segment[:, -1:])[..., None], 0)
    return y, kept.mT


def gated_short_conv(
    x: Tensor, w_in: Tensor, conv: Tensor, w_out: Tensor, *, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A short convolution between two products: b, c, u = x w_inᵀ;  y = (c · conv(b · u)) w_outᵀ, and the convolution's state.

    Args:
        x: (batch, length, d). w_in: (3 channels, d). conv: (channels, taps). w_out: (d, channels).
    """
    check.shapes(
        "gated_short_conv",
        x=(x, "batch length d"),
        w_in=(w_in, "three_channels d"),
        conv=(conv, "channels taps"),
        w_out=(w_out, "d channels"),
    )
    if w_in.shape[0] != 3 * conv.shape[0]:
        check.fail(
            "gated_short_conv", f"w_in has {w_in.shape[0]} rows, conv {conv.shape[0]} channels", "3 rows for each channel"
        )
    b, c, u = F.linear(x, w_in).chunk(3, dim=-1)
    y, state = short_conv(b * u, conv, state=state)
    return F.linear(c * y, w_out), state


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, *, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, softplus: bool = True, state: Tensor | None = None, form: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mamba's recurrence, h = exp(dt A) h + dt B x;  y = C·h + D x;  times silu(z) if given.

    Args:
        x, dt, z: (batch, length, channels). A: (channels, states) < 0. Bm, Cm: (batch, length, groups, states), groups divide channels.
        D, dt_bias: (channels,). softplus: whether dt + dt_bias passes through it; without, it must be >= 0.
        state: (batch, channels, states) float32, h before the first token; None is zeros.
    Returns:
        y like x, and h after the last token.
    Raises:
        ValueError: shapes that disagree, A not negative, a negative step, no token.
    Source: arXiv:2312.00752, algorithm 2.
    """
    op = "selective_scan"
    sizes = check.shapes(
        op, x=(x, "batch length channels"), dt=(dt, "batch length channels"), z=(z, "batch length channels"), A=(A, "channels states"),
        Bm=(Bm, "batch length groups states"), Cm=(Cm, "batch length groups states"), D=(D, "channels"), dt_bias=(dt_bias, "channels"),
        state=(state, "batch channels states"),
    )  # fmt: skip
    check.at_least(op, 1, **sizes)
    check.divides(op, groups=sizes["groups"], channels=sizes["channels"])
    if A.numel() and not bool((A < 0).all()):
        check.fail(op, "A has an entry >= 0", "A < 0", "a state that grows has no bound; pass -exp(A_log)")
    form = backend.choose(op, form, x, kernel=False)
    wide = torch.promote_types(x.dtype, torch.float32)
    step = dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias.to(wide)
    step = F.softplus(step) if softplus else step
    check.within(op, 0, math.inf, dt=step)
    h = x.new_zeros(sizes["batch"], sizes["channels"], sizes["states"], dtype=wide) if state is None else state
    run = scan_reference if form == "reference" else scan
    y, h = run(x.to(wide), step, A.to(wide), Bm.to(wide), Cm.to(wide), h)
    y = y if D is None else y + D * x
    return (y if z is None else y * F.silu(z)).to(x.dtype), h


class MambaParams(NamedTuple):
    """Weights of one Mamba block; `rank` is the width of the step's bottleneck."""

    in_proj: Tensor  # (2 channels, d)
    conv: Tensor  # (channels, taps)
    conv_bias: Tensor  # (channels,)
    x_proj: Tensor  # (rank + 2 states, channels)
    dt_proj: Tensor  # (channels, rank)
    dt_bias: Tensor  # (channels,)
    A_log: Tensor  # (channels, states); A = -exp(A_log)
    D: Tensor  # (channels,)
    out_proj: Tensor  # (d, channels)


class MambaState(NamedTuple):
    conv: Tensor  # (batch, channels, taps - 1)
    h: Tensor  # (batch, channels, states), float32


def mamba_mixer(
    x: Tensor, p: MambaParams, *, state: MambaState | None = None, return_memory: bool = False, form: str = "auto"
):
    """Mamba's block: project to x and z, short convolution with silu, selective scan, gate by silu(z), project back.

    Args:
        x: (batch, length, d).
        return_memory: also return what the scan read before the gate, (batch, length, channels), for layers that share it.
    Returns:
        y (batch, length, d) and the state, and the memory if asked for.
    Source: arXiv:2312.00752, section 3.4.
    """
    check.shapes(
        "mamba_mixer", x=(x, "batch length d"), in_proj=(p.in_proj, "two_channels d"), out_proj=(p.out_proj, "d channels")
    )
    inner, z = F.linear(x, p.in_proj).chunk(2, dim=-1)
    inner, conv = short_conv(inner, p.conv, p.conv_bias, activation="silu", state=state.conv if state else None)
    states = p.A_log.shape[-1]
    low, B, C = F.linear(inner, p.x_proj).split((p.dt_proj.shape[-1], states, states), dim=-1)
    memory, h = selective_scan(
        inner, F.linear(low, p.dt_proj), -p.A_log.exp(), B.unsqueeze(2), C.unsqueeze(2),
        D=p.D, dt_bias=p.dt_bias, state=state.h if state else None, form=form,
    )  # fmt: skip
    y = F.linear(memory * F.silu(z), p.out_proj)
    return (y, MambaState(conv, h), memory) if return_memory else (y, MambaState(conv, h))
