"""Optimizer steps and codecs against torch, galore-torch and a plain search."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor, nn

from memlens.bench.case import Case
from memlens.optim import Projected, dyn8, dyn8_map

__all__ = ["cases", "galore_torch_adamw"]

SHAPES = [(576, 576)] * 4 + [(1536, 576), (1536, 576), (576, 1536)]  # one layer of SmolLM2, without grouped heads
RANK, NUMEL = 64, 2_000_000


def galore_torch_adamw() -> type[torch.optim.Optimizer] | None:
    """The AdamW of PyPI's galore-torch; None where it is not installed.

    Its package file also imports bitsandbytes, which this module does not need, so the package is entered without it.
    """
    spec = find_spec("galore_torch")
    if spec is None:
        return None
    package = ModuleType("galore_torch")
    package.__path__ = list(spec.submodule_search_locations)
    held = sys.modules.get("galore_torch")
    sys.modules["galore_torch"] = package
    try:
        return import_module("galore_torch.adamw").AdamW
    finally:
        sys.modules.pop("galore_torch")
        if held is not None:
            sys.modules["galore_torch"] = held


def _layer() -> list[nn.Parameter]:
    """Parameters with gradients, the same each time."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    return params


def _steps(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """The step after the first, which takes the subspace."""
    optimizer.step()
    return optimizer.step


def _plain_encode(x: Tensor, borders: Tensor) -> tuple[Tensor, Tensor]:
    """Absmax over blocks of 256 and a binary search among the midpoints of the map."""
    blocks = x.view(-1, 256)
    scale = blocks.abs().amax(1)
    return torch.searchsorted(borders, blocks / scale[:, None]).to(torch.uint8), scale


def _codec_cases() -> list[Case]:
    x = torch.randn(NUMEL // 256 * 256, generator=torch.Generator().manual_seed(0))
    codec, table = dyn8(True), dyn8_map(True)
    borders, packed = (table[1:] + table[:-1]) / 2, codec.encode(x)

    def plain_decode():
        return table[packed.codes.long()].view(-1, 256) * packed.scale[:, None]

    def plain_encode():
        return _plain_encode(x, borders)

    label, moved = f"{len(x):,} elements", len(x) * 5.0
    return [
        Case(f"dyn8 encode {label}", lambda: codec.encode(x), plain_encode, "torch searchsorted", bytes=moved),
        Case(f"dyn8 decode {label}", lambda: codec.decode(packed), plain_decode, "torch indexing", bytes=moved),
    ]


def cases() -> list[Case]:
    """GaLore's step between refreshes against its publisher's and against full AdamW; encoding and decoding of states."""
    low = sum(2 * 2 * m * n * RANK for m, n in SHAPES)  # projection and the way back
    options = {"rank": RANK, "every": 10**9, "lr": 0.0}
    label = f"galore step, SmolLM2 layer, rank {RANK}"
    adamw = _steps(torch.optim.AdamW(_layer(), lr=0.0))
    found = [
        Case(label, _steps(Projected(_layer(), **options)), adamw, "torch AdamW", flops=low),
        Case(f"{label}, 8-bit", _steps(Projected(_layer(), states="dyn8", **options)), adamw, "torch AdamW", flops=low),
        *_codec_cases(),
    ]
    if peer := galore_torch_adamw():
        group = {"params": _layer(), "rank": RANK, "update_proj_gap": 10**9, "scale": 0.25, "proj_type": "std"}
        theirs = _steps(peer([group], lr=0.0, no_deprecation_warning=True))
        found.append(Case(label, _steps(Projected(_layer(), **options)), theirs, "galore-torch AdamW", flops=low))
    else:
        print("bench optim: left out 'galore step' against galore-torch AdamW: galore-torch is not installed")
    return found
