"""Rotary positions: rotate, rotate back, and move keys that were already rotated.

Source: arXiv:2104.09864. Rotations add up, so a key rotated for p becomes one rotated for p + offset by rotating again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memlens import check

__all__ = ["frequencies", "rope", "shift", "unrope"]

LAYOUTS = ("half", "interleaved")


def frequencies(dim: int, *, theta: float = 10_000.0, device=None) -> Tensor:
    """Inverse frequencies theta ** (-2i / dim), float32, (dim / 2,).

    Raises:
        ValueError: an odd or non-positive dim.
    """
    if dim < 2 or dim % 2:
        check.fail("frequencies", f"dim={dim}", "an even dim of at least 2")
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    if layout == "half":
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)


def rope(x: Tensor, pos: Tensor, inv_freq: Tensor, *, layout: str = "half") -> Tensor:
    """`x` rotated by the angle pos * inv_freq in each pair of dims.

    Args:
        x: (..., length, dim); computed in float32 at least, returned in its dtype.
        pos: positions, (length,) or any shape that broadcasts to x's (..., length); integers or floats.
        inv_freq: (dim / 2,), radians per position.
        layout: which dims make a pair: "half" (i, i + dim/2; Llama) or "interleaved" (2i, 2i + 1).
    Raises:
        ValueError: an unknown layout, or inv_freq that is not dim / 2 long.
    """
    check.one_of("rope", LAYOUTS, layout=layout)
    if x.shape[-1] != 2 * inv_freq.shape[-1]:
        check.fail("rope", f"x has dim {x.shape[-1]}, inv_freq {inv_freq.shape[-1]}", "inv_freq of dim / 2")
    wide = torch.promote_types(x.dtype, torch.float32)
    angle = pos.to(wide)[..., None] * inv_freq.to(wide)
    return _turn(x.to(wide), angle.cos(), angle.sin(), layout).to(x.dtype)


def unrope(x: Tensor, pos: Tensor, inv_freq: Tensor, *, layout: str = "half") -> Tensor:
    """The inverse of `rope`: what x was before it was rotated for `pos`."""
    return rope(x, -pos, inv_freq, layout=layout)


def shift(k: Tensor, offset: Tensor | int, inv_freq: Tensor, *, layout: str = "half") -> Tensor:
    """Keys that were rotated for p, now rotated for p + offset; `offset` is one number or broadcasts like `pos`."""
    offset = torch.as_tensor(offset, device=k.device)
    return rope(k, offset.expand(k.shape[-2]) if offset.ndim == 0 else offset, inv_freq, layout=layout)
