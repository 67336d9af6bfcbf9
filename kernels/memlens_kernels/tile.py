"""What the ahead-of-time report needs to know about a kernel: one `Tile` for each shape that is shipped.

Every kernel module has a function `tiles()` that returns its tiles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["TARGETS", "Tile"]

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


class Tile(NamedTuple):
    kernel: Any  # the function under @triton.jit
    label: str  # the tile in words, e.g. "fp16 D64 128x64 causal"
    signature: dict[str, str]  # every argument by name: "*fp16", "i32", "fp32", or "constexpr"
    constants: dict[str, Any]  # the values of the constexpr arguments
    warps: int
    stages: int
    flops: int  # of one program, at the size that `at` names
    bytes: int  # read and written by one program, likewise
    at: str  # e.g. "length 4096"
    targets: tuple[str, ...] = TARGETS  # where the launcher picks it; another architecture may have its own tile
    aligned: tuple[str, ...] = ()  # arguments that are multiples of 16 at every usual launch: pointers (bytes), strides
