"""Block floating point: consecutive elements share one exponent and keep a short two's-complement mantissa each.

    e = floor(log2 max|x|)      step = 2^(e - m + 2)      mantissa = clamp(round(x / step), -2^(m-1), 2^(m-1) - 1)

BFP12 has 4-bit and BFP16 8-bit mantissas beside an 8-bit exponent. Source: the format as arXiv:2403.20137 uses it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memlens import check

__all__ = ["Blocks", "bfp", "decode", "encode"]

LOW, HIGH = -119, 126  # so that no step, and nothing that is scaled by one, leaves float32


class Blocks(NamedTuple):
    mantissa: Tensor  # (..., n) int8
    exponent: Tensor  # (..., n / block) int8
    bits: int  # of a mantissa


def encode(x: Tensor, mantissa: int, block: int) -> Blocks:
    """Mantissas and exponents of blocks of `block` elements along the last axis; rounds half to even.

    Raises:
        ValueError: mantissa outside 2..8, a block that does not divide n, NaN or infinity.
    """
    check.within("bfp", 2, 8, mantissa=mantissa)
    check.at_least("bfp", 1, block=block, n=x.shape[-1])
    check.divides("bfp", block=block, n=x.shape[-1])
    check.finite("bfp", x=x)
    rows = x.float().unflatten(-1, (-1, block))
    # frexp gives max = f · 2^e with f in [0.5, 1); an all-zero block has e = 0, and any exponent serves
    exponent = (rows.abs().amax(-1).frexp().exponent - 1).clamp(LOW, HIGH)
    codes = torch.ldexp(rows, (mantissa - 2 - exponent)[..., None])
    codes = codes.round().clamp(-(2 ** (mantissa - 1)), 2 ** (mantissa - 1) - 1)
    return Blocks(codes.flatten(-2).to(torch.int8), exponent.to(torch.int8), mantissa)


def decode(blocks: Blocks, dtype: torch.dtype = torch.float32) -> Tensor:
    """mantissa · 2^(e - m + 2), in the shape that was encoded."""
    rows = blocks.mantissa.float().unflatten(-1, (blocks.exponent.shape[-1], -1))
    return torch.ldexp(rows, (blocks.exponent.int() + 2 - blocks.bits)[..., None]).flatten(-2).to(dtype)


def bfp(x: Tensor, mantissa: int, block: int) -> Tensor:
    """`x` (..., n) as it comes back from block floating point, in its dtype; stored, it takes mantissa + 8 / block bits.

    >>> bfp(torch.tensor([1.0, 0.4, -0.1, 0.0]), 4, 4)
    tensor([1.0000, 0.5000, 0.0000, 0.0000])

    Raises:
        ValueError: as `encode`.
    """
    return decode(encode(x, mantissa, block), x.dtype)
