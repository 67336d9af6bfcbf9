"""Conversions between (batch, heads, length, dim), used here, and (batch, length, heads, dim), used by neighbours."""

from __future__ import annotations

from torch import Tensor

from memlens import check

__all__ = ["from_fla", "to_fla"]


def from_fla(x: Tensor) -> Tensor:
    """A (batch, length, heads, dim) tensor as (batch, heads, length, dim); a view."""
    check.shapes("from_fla", x=(x, "batch length heads dim"))
    return x.transpose(1, 2)


def to_fla(x: Tensor) -> Tensor:
    """A (batch, heads, length, dim) tensor as (batch, length, heads, dim); a view."""
    check.shapes("to_fla", x=(x, "batch heads length dim"))
    return x.transpose(1, 2)
