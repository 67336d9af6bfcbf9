"""Which tile each attention kernel runs with on each target, and what one program of it reads, writes and computes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from memlens_kernels.tile import TARGETS, Tile

__all__ = ["DELTA_ROWS", "LENGTH", "Config", "config", "make_tile", "picked", "target", "work"]

DELTA_ROWS = 64
LENGTH = 4096  # at which the flops and bytes of a tile are counted


class Config(NamedTuple):
    block_q: int
    block_k: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """As launch arguments."""
        return {"BLOCK_Q": self.block_q, "BLOCK_K": self.block_k, "num_warps": self.warps, "num_stages": self.stages}


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


def picked(kernel: str, dim: int) -> dict[Config, tuple[str, ...]]:
    """Each tile that two-byte elements of a dim run with, and the targets that pick it."""
    on = {name: config(kernel, dim, 2, name) for name in TARGETS}
    return {tile: tuple(name for name in TARGETS if on[name] == tile) for tile in on.values()}


def target(q: Tensor) -> str:
    """The name in `TARGETS` whose tiles fit the tensor's device."""
    if torch.version.hip:
        return "gfx942"
    return f"sm_{10 * torch.cuda.get_device_capability(q.device)[0]}" if q.is_cuda else "sm_80"


def work(name: str, dim: int, tile: Config, visited: int) -> tuple[int, int]:
    """Flops and bytes of one program that visits so many rows of the other side; two-byte elements, lse and delta four."""
    q, k = tile.block_q, tile.block_k
    return {
        "forward": (4 * q * visited * dim, 2 * dim * (2 * q + 2 * visited) + 4 * q),
        "delta": (2 * q * dim, 2 * dim * 2 * q + 8 * q),
        "dkdv": (8 * k * visited * dim, 2 * dim * (4 * k + 2 * visited) + 8 * visited),
        "dq": (6 * q * visited * dim, 2 * dim * (3 * q + 2 * visited) + 8 * q),
    }[name]


POINTERS = {
    **dict.fromkeys(("q", "k", "v", "out", "dout", "dq", "dk", "dv")), **dict.fromkeys(("lse", "dlse", "delta"), "*fp32"),
    **dict.fromkeys(("starts", "blocks"), "*i32"), "mask": "*u8",
}  # fmt: skip


def make_tile(
    kernel: Any, label: str, dtype: str, dim: int, tile: Config, cost: tuple[int, int], at: str, targets: tuple[str, ...]
) -> Tile:  # fmt: skip
    """The compile request for a causal call with equal key and value dims and rows that start at 16-byte addresses."""
    given = {
        "DIM": dim, "VALUE_DIM": dim, "BLOCK_D": dim, "BLOCK_V": dim, "BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k,
        "CAUSAL": True, "MASK": False, "PRECISION": "tf32", "DLSE": True,
    }  # fmt: skip
    constants = {name: given[name] for name in kernel.arg_names if name in given}
    signature = {name: "constexpr" if name in constants else _kind(name, dtype) for name in kernel.arg_names}
    rows = [f"{name}_{axis}" for name in ("q", "k", "v", "do") for axis in ("batch", "head", "row")]
    aligned = tuple(name for name in kernel.arg_names if name in POINTERS or name in rows)
    label = f"{label} {tile.block_q}x{tile.block_k} causal"
    return Tile(kernel, label, signature, constants, tile.warps, tile.stages, *cost, at, targets, aligned)


def _kind(name: str, dtype: str) -> str:
    if name in POINTERS:
        return POINTERS[name] or f"*{dtype}"
    return "fp32" if name.startswith("scale") else "i32"
