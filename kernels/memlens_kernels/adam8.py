"""Adam on 8-bit moments: one program per block of 256 decodes, updates, finds the new maxima and encodes.

No float32 moment touches global memory: per element the kernel reads the gradient and two bytes, and writes the direction
and two bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memlens_kernels.tile import Tile

__all__ = ["BLOCK", "adam8", "adam8_kernel", "tiles"]

BLOCK = 256
WARPS = 4


@triton.jit
def _decode(codes, scale, values, at, inside):
    code = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    return tl.load(values + code) * scale


@triton.jit
def _encode(x, scale, borders):
    """Number of borders below x / scale, by bisection; borders[255] is never looked at."""
    y = tl.div_rn(x, tl.where(scale > 0, scale, 1.0))
    code = tl.zeros_like(y).to(tl.int32)
    for half in tl.static_range(8):
        probe = code + (128 >> half)
        code = tl.where(y > tl.load(borders + probe - 1), probe, code)
    return code.to(tl.uint8)


@triton.jit(do_not_specialize=["numel"])
def adam8_kernel(
    g, m_codes, m_scale, v_codes, v_scale, m_values, m_borders, v_values, v_borders,
    direction, new_m_codes, new_m_scale, new_v_codes, new_v_scale,
    numel, beta1, rest1, beta2, rest2, correction, floor,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of 256 elements; rest1 and rest2 are 1 - beta, floor is what is added to sqrt(v')."""
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    grad = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    m = _decode(m_codes, tl.load(m_scale + block), m_values, at, inside)
    v = _decode(v_codes, tl.load(v_scale + block), v_values, at, inside)
    m = tl.where(inside, m + rest1 * (grad - m), 0.0)
    v = tl.where(inside, v * beta2 + rest2 * grad * grad, 0.0)
    tl.store(direction + at, tl.div_rn(m * correction, tl.sqrt_rn(v) + floor), mask=inside)
    # a NaN or an infinity in the gradient must reach the scale, where the caller looks for it
    bad = tl.sum(grad * 0.0, axis=0)
    m_most, v_most = tl.max(tl.abs(m), axis=0) + bad, tl.max(v, axis=0) + bad
    tl.store(new_m_scale + block, m_most)
    tl.store(new_v_scale + block, v_most)
    tl.store(new_m_codes + at, _encode(m, m_most, m_borders), mask=inside)
    tl.store(new_v_codes + at, _encode(v, v_most, v_borders), mask=inside)


def adam8_buffers(g: Tensor) -> tuple[Tensor, ...]:
    """Uninitialised results for `adam8`: direction, m codes, m scale, v codes, v scale."""
    blocks = triton.cdiv(g.numel(), BLOCK)
    codes = [torch.empty(g.numel(), dtype=torch.uint8, device=g.device) for _ in range(2)]
    scales = [torch.empty(blocks, dtype=torch.float32, device=g.device) for _ in range(2)]
    direction = torch.empty(g.shape, dtype=torch.float32, device=g.device)
    return direction, codes[0], scales[0], codes[1], scales[1]


Pair = tuple[Tensor, Tensor]


def adam8(
    g: Tensor, m: Pair, v: Pair, m_tables: Pair, v_tables: Pair, *, betas: tuple[float, float], correction: float,
    floor: float, out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Direction correction * m' / (sqrt(v') + floor) and the encoded moments after it.

    Args:
        g: any shape, float32, float16 or bfloat16.
        m, v: (codes (numel,) uint8, scales (ceil(numel / 256),) float32) before the step.
        m_tables, v_tables: (values (256,), borders (256,)) of each map, float32, rising.
        out: buffers from `adam8_buffers`; made here where None.
    Returns:
        direction in g's shape, float32, then m codes, m scales, v codes, v scales. A block with a NaN or infinite gradient
        has NaN scales.
    """
    out = out or adam8_buffers(g)
    if g.numel():
        adam8_kernel[(triton.cdiv(g.numel(), BLOCK),)](
            g.contiguous(), *m, *v, *m_tables, *v_tables, *out, g.numel(), beta1=betas[0], rest1=1 - betas[0],
            beta2=betas[1], rest2=1 - betas[1], correction=correction, floor=floor, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return out


def tiles() -> list[Tile]:
    """One tile for each gradient dtype."""
    found = []
    for dtype, size in (("fp32", 4), ("fp16", 2), ("bf16", 2)):
        moved = BLOCK * (size + 4 + 4) + 16  # gradient, direction, two codes in and out; four scales
        constants = {"BLOCK": BLOCK}
        found.append(
            Tile(adam8_kernel, f"{dtype} block {BLOCK}", _signature(dtype), constants, WARPS, 1, 44 * BLOCK, moved, "any")
        )
    return found


def _signature(dtype: str) -> dict[str, str]:
    """Type of every argument, by the form of its name."""
    kinds = {"g": f"*{dtype}", "numel": "i32", "BLOCK": "constexpr", "direction": "*fp32"}
    scalars = ("beta1", "rest1", "beta2", "rest2", "correction", "floor")
    names = adam8_kernel.arg_names
    return {n: kinds.get(n) or ("fp32" if n in scalars else "*u8" if n.endswith("codes") else "*fp32") for n in names}
