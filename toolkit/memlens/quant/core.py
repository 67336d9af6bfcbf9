"""Round-to-nearest in groups: the quantizer that the weight formats and the cache formats share.

    symmetric        value = code · scale              code in [-(2^(b-1) - 1), 2^(b-1) - 1]
    zero="int"       value = (code - zero) · scale     code in [0, 2^b - 1], zero a whole number
    zero="float"     value = code · scale + zero       code in [0, 2^b - 1], zero the group's minimum

Scale and zero may be stored in 16 bits; they are then rounded so that the grid still covers the group, and codes are
computed from the stored numbers. The error therefore stays within half a stored step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memlens import check

__all__ = ["QTensor", "container", "dequantize", "pack", "quantize", "storage_bits", "unpack"]


class QTensor(NamedTuple):
    codes: Tensor  # (..., n), uint8, or int8 where symmetric
    scale: Tensor  # (..., n / group)
    zero: Tensor | None  # (..., n / group); int32 for zero="int", a float for zero="float", None where symmetric
    bits: int
    group: int | None  # None: one group per row
    shape: tuple[int, ...]
    symmetric: bool


def container(bits: int) -> int:
    """Bits that one code takes in memory: 1, 2, 4 or 8.

    >>> [container(bits) for bits in range(1, 9)]
    [1, 2, 4, 4, 8, 8, 8, 8]
    """
    if bits not in range(1, 9):
        check.fail("quantize", f"bits={bits}", "bits within [1, 8]")
    return next(size for size in (1, 2, 4, 8) if size >= bits)


def quantize(
    w: Tensor, bits: int, *, group: int | None = None, symmetric: bool = True, zero: str = "int",
    meta: torch.dtype | None = None,
) -> QTensor:  # fmt: skip
    """`w` (..., n) rounded to 2^bits levels in groups of `group` consecutive elements of its last axis.

    Rounds half to even. A group whose elements are all equal is reproduced exactly if `meta` holds its value: with
    zero="float" it has scale 0, otherwise a group of zeros has scale 1; codes are 0.

    Args:
        w: floating point, any leading axes.
        group: must divide n; None is one group per row.
        symmetric: no zero point; `zero` is then not looked at.
        zero: "int" or "float", see the formulas above.
        meta: dtype of scale and of a float zero; default: that of w.
    Raises:
        ValueError: bits outside 1..8 (symmetric: 2..8), a group that does not divide n, NaN or infinity in w, a scale
            or zero too large for `meta`, an unknown `zero`.
    """
    check.one_of("quantize", ("int", "float"), zero=zero)
    container(bits)
    if symmetric:
        check.at_least("quantize", 2, "one symmetric bit has no level but 0", bits=bits)
    check.at_least("quantize", 1, n=w.shape[-1], group=1 if group is None else group)
    check.divides("quantize", group=group or w.shape[-1], n=w.shape[-1])
    check.finite("quantize", w=w)
    fit = _symmetric if symmetric else _minimum if zero == "float" else _whole
    codes, scale, offset = fit(w.float().unflatten(-1, (-1, group or w.shape[-1])), bits, meta or w.dtype)
    return QTensor(codes.flatten(-2), scale.squeeze(-1), offset, bits, group, tuple(w.shape), symmetric)


def _symmetric(x: Tensor, bits: int, meta: torch.dtype) -> tuple[Tensor, Tensor, None]:
    top = 2 ** (bits - 1) - 1
    scale = _stored(x.abs().amax(-1, keepdim=True) / top, meta, up=True)
    scale = scale.masked_fill(scale == 0, 1.0)
    return (x / scale.float()).round().clamp(-top, top).to(torch.int8), scale, None


def _minimum(x: Tensor, bits: int, meta: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    top, (low, high) = 2**bits - 1, x.aminmax(dim=-1, keepdim=True)
    zero = _stored(low, meta, up=False)
    scale = _stored((high - zero.float()) / top, meta, up=True)
    step = scale.float().masked_fill(scale == 0, 1.0)
    return ((x - zero.float()) / step).round().clamp(0, top).to(torch.uint8), scale, zero.squeeze(-1)


def _whole(x: Tensor, bits: int, meta: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    top, (low, high) = 2**bits - 1, x.aminmax(dim=-1, keepdim=True)
    # a constant group is one step away from 0, so that (0 - zero) · scale is its value
    scale = _stored(torch.where(high > low, (high - low) / top, low.abs()), meta, up=True)
    scale = scale.masked_fill(scale == 0, 1.0)
    zero = -(low / scale.float()).round()
    codes = ((x / scale.float()).round() + zero).clamp(0, top)
    return codes.to(torch.uint8), scale, zero.squeeze(-1).to(torch.int32)


def _stored(x: Tensor, dtype: torch.dtype, *, up: bool) -> Tensor:
    """x in `dtype`, rounded up or down; a hair (2^-20) below the next number counts as that number."""
    near = x.to(dtype)
    if dtype in (torch.float32, torch.float64):
        return near
    slack = 2.0**-20 * x.abs()
    short = near.float() < x - slack if up else near.float() > x + slack
    # neighbours of a 16-bit float are neighbours as integers: away from zero is +1
    bits = near.view(torch.int16)
    grow = (near > 0) if up else (near < 0)
    moved = torch.where(near == 0, torch.tensor(1 if up else -32767, dtype=torch.int16), bits + torch.where(grow, 1, -1))
    stored = torch.where(short, moved.to(torch.int16), bits).view(dtype)
    if not bool(stored.isfinite().all()):
        came = f"a scale or zero of {x.abs().max().item():.3g}"
        check.fail("quantize", came, f"at most {torch.finfo(dtype).max:.3g}, the largest {dtype}", "use meta=torch.float32")
    return stored


def dequantize(q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values that the codes stand for, in the shape that was quantized."""
    codes = q.codes.float().unflatten(-1, (q.scale.shape[-1], -1))
    scale = q.scale.float()[..., None]
    if q.zero is None:
        values = codes * scale
    elif q.zero.is_floating_point():
        values = codes * scale + q.zero.float()[..., None]
    else:
        values = (codes - q.zero.float()[..., None]) * scale
    return values.flatten(-2).to(dtype)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (..., n) as bytes (..., ceil(n · container(bits) / 8)), the first code in the lowest bits of a byte.

    Signed codes are kept as two's complement of `container(bits)` bits.

    >>> pack(torch.tensor([1, 2, 3, 0, 3]), 2)
    tensor([57,  3], dtype=torch.uint8)

    Raises:
        ValueError: bits outside 1..8, or a code that needs more than `container(bits)` bits.
    """
    size = container(bits)
    if codes.numel():
        check.within("pack", -(2 ** (size - 1)), 2**size - 1, codes=codes)
    each = 8 // size
    whole = torch.nn.functional.pad(codes.to(torch.int16) & (2**size - 1), (0, -codes.shape[-1] % each))
    places = torch.arange(0, 8, size, device=codes.device)
    return (whole.unflatten(-1, (-1, each)) << places).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, length: int, *, signed: bool = False) -> Tensor:
    """The first `length` codes of each row of bytes (..., m): (..., length), uint8 or, where signed, int8.

    Raises:
        ValueError: bits outside 1..8, or fewer bytes than `length` codes take.
    """
    size = container(bits)
    check.within("unpack", 0, packed.shape[-1] * 8 // size, length=length)
    places = torch.arange(0, 8, size, device=packed.device, dtype=torch.uint8)
    codes = ((packed[..., None] >> places) & (2**size - 1)).flatten(-2)[..., :length]
    if not signed:
        return codes
    return torch.where(codes >= 2 ** (size - 1), codes.to(torch.int16) - 2**size, codes.to(torch.int16)).to(torch.int8)


def storage_bits(q: QTensor) -> int:
    """Bits that the packed codes, the scales and the zeros take; 3-bit codes take 4, 5 to 7 take 8."""
    metas = [x for x in (q.scale, q.zero) if x is not None]
    return q.codes.numel() * container(q.bits) + sum(8 * x.numel() * x.element_size() for x in metas)
