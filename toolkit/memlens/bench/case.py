"""What a benchmark compares: one call of ours and one of a named peer, on the same inputs in the same process."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

__all__ = ["Case"]


class Case(NamedTuple):
    name: str  # "attend torch 1x9x1024x64"
    ours: Callable[[], object]
    peer: Callable[[], object]
    peer_name: str  # "torch scaled_dot_product_attention"
    flops: float = 0.0  # of one call, for the roofline; 0 where unknown
    bytes: float = 0.0  # moved at least, likewise
