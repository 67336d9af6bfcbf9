"""Which tile each attention kernel runs with on each target, and what one program of it reads, writes and computes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DELTA_ROWS", "LENGTH", "Config", "argument", "config", "target", "work"]

DELTA_ROWS = 64
LENGTH = 4096  # at which the flops and bytes of a tile are counted


class Config(NamedTuple):
    block_q: int
    block_k: int
    warps: int
    stages: int


CONFIGS = {  # measured by the compile report: no spill where it is picked
    ("forward", 64): Config(128, 64, 4, 3), ("forward", 128): Config(128, 32, 8, 3),
    ("dkdv", 64): Config(32, 64, 4, 2), ("dkdv", 128): Config(32, 64, 8, 2),
    ("dq", 64): Config(64, 64, 4, 2), ("dq", 128): Config(64, 64, 8, 2),
}  # fmt: skip
ELSEWHERE = {  # a target with more room, or less
    ("forward", 128, "sm_90"): Config(128, 64, 8, 3), ("forward", 128, "sm_100"): Config(128, 64, 8, 3),
    ("dkdv", 128, "sm_100"): Config(32, 32, 4, 2), ("dkdv", 128, "gfx942"): Config(32, 32, 4, 2),
    ("dq", 128, "gfx942"): Config(64, 32, 8, 2),
}  # fmt: skip


def config(kernel: str, dim: int, size: int, on: str) -> Config:
    """Tile, warps and stages of "forward", "dkdv" or "dq" for a padded dim and `size` bytes an element on a target."""
    if size > 2 or dim > 128:
        return Config(32, 32, 4, 1) if kernel != "forward" or dim > 128 else Config(64, 32, 4, 2)
    dim = max(64, dim)
    return ELSEWHERE.get((kernel, dim, on), CONFIGS[kernel, dim])


def target(q: Tensor) -> str:
    """The name in `TARGETS` whose tiles fit the tensor's device."""
    if torch.version.hip:
        return "gfx942"
    return f"sm_{10 * torch.cuda.get_device_capability(q.device)[0]}" if q.is_cuda else "sm_80"


def work(name: str, dim: int, tile: Config) -> tuple[int, int]:
    """Flops and bytes of one program at `LENGTH` with two-byte elements; lse and delta have four."""
    q, k = tile.block_q, tile.block_k
    return {
        "forward": (4 * q * LENGTH * dim, 2 * dim * (2 * q + 2 * LENGTH) + 4 * q),
        "delta": (2 * q * dim, 2 * dim * 2 * q + 8 * q),
        "dkdv": (8 * k * LENGTH * dim, 2 * dim * (4 * k + 2 * LENGTH) + 8 * LENGTH),
        "dq": (6 * q * LENGTH * dim, 2 * dim * (3 * q + 2 * LENGTH) + 8 * q),
    }[name]


def argument(name: str, dtype: str) -> str:
    """The type of a kernel argument by its name, as a compile signature writes it."""
    if name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv"):
        return f"*{dtype}"
    if name in ("lse", "dlse", "delta"):
        return "*fp32"
    return "*u8" if name == "mask" else "fp32" if name.startswith("scale") else "i32"
