"""Which tile each attention kernel runs with on each target, and what one program of it reads, writes and computes."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memlens_kernels.tile import TARGETS, Tile

__all__ = [
    "DELTA_ROWS",
    "LENGTH",
    "SHAPES",
    "Config",
    "Shape",
    "config",
    "make_tile",
    "picked",
    "precision",
    "target",
    "work",
]

DELTA_ROWS = 64
LENGTH = 4096  # at which the flops and bytes of a tile are counted


class Shape(NamedTuple):
    """What a launcher picks a tile by, and the report compiles."""

    dtype: str
    dim: int
    causal: bool = True
    masked: bool = False

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return 4 if self.dtype == "fp32" else 2


class Config(NamedTuple):
    block_q: int
    block_k: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """As launch arguments."""
        return {"BLOCK_Q": self.block_q, "BLOCK_K": self.block_k, "num_warps": self.warps, "num_stages": self.stages}


DIMS = (64, 128, 256)  # padded; smaller ones run with the tiles of 64
CALLS = ((True, False), (False, False), (False, True))  # causal, masked; with both a tile is the masked one
SHAPES = [
    *(Shape(dtype, dim, *call) for dtype, dim, call in product(("fp16", "fp32"), DIMS, CALLS)),
    *(Shape("bf16", dim) for dim in (64, 128)),
]
CONFIGS = {  # for each of DIMS; measured by the compile report: no spill where it is picked
    ("half", "forward"): (Config(128, 64, 4, 3), Config(128, 32, 8, 3), Config(32, 32, 4, 1)),
    ("half", "dkdv"): (Config(32, 64, 4, 2), Config(32, 64, 8, 2), Config(16, 32, 8, 1)),
    ("half", "dq"): (Config(64, 64, 4, 2), Config(64, 64, 8, 2), Config(16, 32, 8, 1)),
    ("half masked", "forward"): (Config(64, 64, 4, 3), Config(64, 32, 8, 2), Config(32, 32, 8, 1)),
    ("half masked", "dkdv"): (Config(32, 64, 4, 1), Config(32, 32, 4, 1), Config(16, 32, 8, 1)),
    ("half masked", "dq"): (Config(64, 32, 4, 2), Config(64, 32, 8, 2), Config(16, 32, 8, 1)),
    ("float32", "forward"): (Config(32, 32, 4, 2), Config(32, 32, 8, 1), Config(16, 32, 8, 1)),
    ("float32", "dkdv"): (Config(32, 32, 8, 1), Config(16, 32, 8, 1), Config(16, 16, 8, 1)),
    ("float32", "dq"): (Config(32, 32, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 4, 1)),
}
ELSEWHERE = {  # a target with more room, or less
    ("half", "forward", 128, "sm_90"): Config(128, 64, 8, 3), ("half", "forward", 128, "sm_100"): Config(128, 64, 8, 3),
    ("half", "dkdv", 128, "sm_100"): Config(32, 32, 4, 2), ("half", "dkdv", 128, "gfx942"): Config(32, 32, 4, 2),
    ("half", "dkdv", 64, "sm_80"): Config(32, 64, 4, 3), ("half", "dq", 128, "gfx942"): Config(64, 32, 8, 2),
    ("half", "dq", 256, "gfx942"): Config(32, 16, 8, 1), ("half masked", "dq", 256, "gfx942"): Config(32, 16, 8, 1),
    ("float32", "dkdv", 64, "sm_80"): Config(32, 16, 8, 1), ("float32", "dkdv", 64, "gfx942"): Config(16, 32, 4, 1),
    ("float32", "dkdv", 128, "sm_80"): Config(32, 32, 8, 1), ("float32", "forward", 256, "sm_80"): Config(32, 32, 8, 1),
    ("float32", "forward", 256, "gfx942"): Config(16, 16, 4, 1), ("float32", "dkdv", 256, "gfx942"): Config(16, 16, 4, 1),
}  # fmt: skip


def config(kernel: str, dim: int, size: int, on: str, *, masked: bool = False) -> Config:
    """Tile, warps and stages of "forward", "dkdv" or "dq" for a padded dim and `size` bytes an element on a target."""
    kind, dim = "float32" if size > 2 else "half masked" if masked else "half", max(DIMS[0], dim)
    return ELSEWHERE.get((kind, kernel, dim, on), CONFIGS[kind, kernel][DIMS.index(dim)])


def picked(kernel: str, shape: Shape) -> dict[Config, tuple[str, ...]]:
    """Each tile that a shape runs with, and the targets that pick it."""
    on = {name: config(kernel, shape.dim, shape.size, name, masked=shape.masked) for name in TARGETS}
    return {tile: tuple(name for name in TARGETS if on[name] == tile) for tile in on.values()}


def precision(size: int) -> str:
    """How the products of elements of `size` bytes are computed: float32 without rounding its operands."""
    return "ieee" if size > 2 else "tf32"


def target(q: Tensor) -> str:
    """The name in `TARGETS` whose tiles fit the tensor's device."""
    if torch.version.hip:
        return "gfx942"
    return f"sm_{10 * torch.cuda.get_device_capability(q.device)[0]}" if q.is_cuda else "sm_80"


def work(name: str, shape: Shape, tile: Config, visited: int) -> tuple[int, int]:
    """Flops and bytes of one program that visits so many rows of the other side; lse and delta are four bytes, a mask is one."""
    q, k, dim = tile.block_q, tile.block_k, shape.dim
    row, seen = dim * shape.size, visited * shape.masked
    return {
        "forward": (4 * q * visited * dim, row * (2 * q + 2 * visited) + 4 * q + q * seen),
        "delta": (2 * q * dim, row * 2 * q + 8 * q),
        "dkdv": (8 * k * visited * dim, row * (4 * k + 2 * visited) + 8 * visited + k * seen),
        "dq": (6 * q * visited * dim, row * (3 * q + 2 * visited) + 8 * q + q * seen),
    }[name]


POINTERS = {
    **dict.fromkeys(("q", "k", "v", "out", "dout", "dq", "dk", "dv")), **dict.fromkeys(("lse", "dlse", "delta"), "*fp32"),
    **dict.fromkeys(("starts", "blocks"), "*i32"), "mask": "*u8",
}  # fmt: skip


def make_tile(
    kernel: Any, label: str, shape: Shape, tile: Config, cost: tuple[int, int], at: str, targets: tuple[str, ...]
) -> Tile:  # fmt: skip
    """The compile request for a call with equal key and value dims and rows that start at 16-byte addresses."""
    given = {
        "DIM": shape.dim, "VALUE_DIM": shape.dim, "BLOCK_D": shape.dim, "BLOCK_V": shape.dim, "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k, "CAUSAL": shape.causal, "MASK": shape.masked, "PRECISION": precision(shape.size), "DLSE": True,
    }  # fmt: skip
    constants = {name: given[name] for name in kernel.arg_names if name in given}
    signature = {name: "constexpr" if name in constants else _kind(name, shape.dtype) for name in kernel.arg_names}
    rows = [f"{name}_{axis}" for name in ("q", "k", "v", "do") for axis in ("batch", "head", "row")]
    aligned = tuple(name for name in kernel.arg_names if name in POINTERS or name in rows)
    label = f"{label} {shape.dtype} D{shape.dim} {tile.block_q}x{tile.block_k}"
    label += " causal" * shape.causal + " masked" * shape.masked
    return Tile(kernel, label, signature, constants, tile.warps, tile.stages, *cost, at, targets, aligned)


def _kind(name: str, dtype: str) -> str:
    if name in POINTERS:
        return POINTERS[name] or f"*{dtype}"
    return "fp32" if name.startswith("scale") else "i32"
