"""Keys and values in few bits: groups with a scale and a zero each, codes packed into 32-bit words.

    axis=-2   groups of tokens inside one channel, words along the tokens ("per channel": keys)
    axis=-1   groups of channels inside one token, words along the channels ("per token": values)

    scale = (max - min) / (2^bits - 1)      zero = min      value = code · scale + zero

Source: arXiv:2402.02750 (KIVI), section 3. The rounding is `memlens.quant.core`.
"""

from __future__ import annotations

from math import lcm, prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from memlens import backend, check
from memlens.quant import core

if TYPE_CHECKING:
    from memlens.kv.storage import Storage

__all__ = [
    "Packed", "affine_quantize", "bits_per_element", "cache_bytes", "dequantize", "join", "pack", "packed_bytes",
    "read_at", "span", "take_rows", "unit", "unpack",
]  # fmt: skip

BITS = (1, 2, 3, 4, 8)
AXES = (-2, -1)


class Packed(NamedTuple):
    codes: Tensor  # int32, 32 / container(bits) codes a word along `axis`, the first in the lowest bits
    scale: Tensor  # one per group: `shape` with `axis` divided by `group`
    zero: Tensor  # the group's minimum, likewise
    bits: int
    axis: int  # -2 or -1
    group: int
    shape: tuple[int, ...]  # (..., tokens, dim)


def affine_quantize(
    x: Tensor, bits: int, *, axis: int, group: int, meta: torch.dtype | None = None, form: str = "auto"
) -> Packed:
    """`x` (..., tokens, dim) rounded to 2^bits levels in groups of `group` along `axis`, half to even, and packed.

    A constant group has scale 0 and codes 0 and comes back exactly, if `meta` holds its value.

    Args:
        bits: 1, 2, 3 (stored as 4), 4 or 8.
        axis: -2 groups tokens inside a channel, -1 channels inside a token.
        group: divides the size of `axis`.
        meta: dtype of scale and zero, rounded outwards so that the error stays within scale / 2; default: x's.
        form: "reference" (group by group), "torch", or "triton" (one kernel; each group fills whole words).
    Raises:
        ValueError: other bits or axes, a group that does not divide, NaN or infinity, a scale beyond `meta`.
    """
    op = "affine_quantize"
    check.one_of(op, map(str, BITS), bits=str(bits))
    check.one_of(op, map(str, AXES), axis=str(axis))
    check.shapes(op, x=(x, "... tokens dim"))
    check.divides(op, group=group, **{"tokens" if axis == -2 else "dim": x.shape[axis]})
    meta, whole = meta or x.dtype, group * core.container(bits) % 32 == 0
    form = backend.choose(op, form, x, kernel=whole and x.ndim == 4)
    if form == "triton":
        return Packed(*_kernel(x, bits, axis, group, meta), bits, axis, group, tuple(x.shape))
    rows = x.transpose(-1, -2) if axis == -2 else x
    q = (_by_group if form == "reference" else _at_once)(rows, bits, group, meta)
    turned = (y.transpose(-1, -2).contiguous() if axis == -2 else y for y in (q.scale, q.zero))
    return Packed(pack(core_codes(q, axis), bits, axis), *turned, bits, axis, group, tuple(x.shape))


def _at_once(rows: Tensor, bits: int, group: int, meta: torch.dtype) -> core.QTensor:
    return core.quantize(rows, bits, group=group, symmetric=False, zero="float", meta=meta)


def _by_group(rows: Tensor, bits: int, group: int, meta: torch.dtype) -> core.QTensor:
    """The definition: one group after the other."""
    made = [_at_once(part, bits, group, meta) for row in rows.flatten(0, -2) for part in row.split(group)]
    lead = rows.shape[:-1]
    codes, scale, zero = (torch.stack([getattr(q, name) for q in made]) for name in ("codes", "scale", "zero"))
    return core.QTensor(
        codes.view(rows.shape), scale.view(*lead, -1), zero.view(*lead, -1), bits, group, tuple(rows.shape), False
    )


def core_codes(q: core.QTensor, axis: int) -> Tensor:
    """The codes of a core tensor, laid out as (..., tokens, dim)."""
    return q.codes.transpose(-1, -2) if axis == -2 else q.codes


def _kernel(x: Tensor, bits: int, axis: int, group: int, meta: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    from memlens_kernels.packed import quantize_pack

    check.finite("affine_quantize", x=x)
    codes, scale, zero = quantize_pack(x, bits=core.container(bits), levels=2**bits - 1, axis=axis, group=group, meta=meta)
    if not bool(scale.isfinite().all() & zero.isfinite().all()):
        check.fail("affine_quantize", f"a scale or zero beyond {meta}", "numbers that fit", "use meta=torch.float32")
    return codes, scale, zero


def dequantize(p: Packed, dtype: torch.dtype | None = None) -> Tensor:
    """The values that the codes stand for, (..., tokens, dim), in `dtype` (default: that of the scales)."""
    codes = unpack(p.codes, p.bits, p.axis, p.shape[p.axis])
    wide = torch.float32 if p.scale.dtype != torch.float64 else torch.float64
    values = codes.to(wide).unflatten(p.axis, (-1, p.group))
    scale, zero = (y.to(wide).unsqueeze(p.axis) for y in (p.scale, p.zero))
    return (values * scale + zero).flatten(p.axis - 1, p.axis).to(dtype or p.scale.dtype)


def pack(codes: Tensor, bits: int, axis: int = -1) -> Tensor:
    """Codes as int32 words along `axis` (-1 or -2), 32 / container(bits) a word, the first in the lowest bits.

    >>> pack(torch.tensor([[1, 2, 3, 0, 3]]), 2, -1)
    tensor([[825]], dtype=torch.int32)

    Raises:
        ValueError: a code that does not fit, an axis other than -1 or -2.
    """
    check.one_of("pack", map(str, AXES), axis=str(axis))
    rows = codes.transpose(-1, -2) if axis == -2 else codes
    octets = core.pack(rows, bits)
    octets = torch.nn.functional.pad(octets, (0, -octets.shape[-1] % 4)).contiguous()
    words = octets.view(torch.int32)
    return words.transpose(-1, -2).contiguous() if axis == -2 else words


def unpack(words: Tensor, bits: int, axis: int, length: int) -> Tensor:
    """The first `length` codes along `axis` of int32 words, uint8; the inverse of `pack`."""
    check.one_of("unpack", map(str, AXES), axis=str(axis))
    rows = words.transpose(-1, -2).contiguous() if axis == -2 else words.contiguous()
    octets = rows.flatten().view(torch.uint8)  # flat: the stride of an axis of one is anything
    codes = core.unpack(octets.view(*rows.shape[:-1], 4 * rows.shape[-1]), bits, length)
    return codes.transpose(-1, -2) if axis == -2 else codes


# --- parts of a packed tensor, without touching the rest -----------------------------------------------------------


def unit(p: Packed) -> int:
    """Tokens after which a group and a word begin together: where `span` may cut and `join` may append."""
    return lcm(p.group, 32 // core.container(p.bits)) if p.axis == -2 else 1


def span(p: Packed, start: int, stop: int) -> Packed:
    """Tokens [start, stop) as views.

    Raises:
        ValueError: a cut inside a group or a word.
    """
    check.within("span", 0, p.shape[-2], start=start, stop=stop)
    check.divides("span", unit=unit(p), start=start)
    check.divides("span", unit=unit(p), stop=stop)
    per = (32 // core.container(p.bits), p.group) if p.axis == -2 else (1, 1)
    codes, scale, zero = (
        y[..., start // n : -(-stop // n), :]
        for y, n in zip((p.codes, p.scale, p.zero), (per[0], per[1], per[1]), strict=True)
    )
    return Packed(codes, scale, zero, p.bits, p.axis, p.group, (*p.shape[:-2], stop - start, p.shape[-1]))


def join(p: Packed | None, q: Packed) -> Packed:
    """The tokens of q after those of p, with one grouping.

    Raises:
        ValueError: p ends inside a word or a group.
    """
    if p is None:
        return q
    check.divides("join", unit=unit(p), tokens=p.shape[-2])
    parts = (torch.cat(pair, -2) for pair in zip(p[:3], q[:3], strict=True))
    return Packed(*parts, *p[3:6], (*p.shape[:-2], p.shape[-2] + q.shape[-2], p.shape[-1]))


def take_rows(p: Packed, idx: Tensor) -> Packed:
    """The tokens idx (..., n) of a per-token tensor, bit for bit.

    Raises:
        ValueError: a per-channel tensor, whose tokens share scales.
    """
    if p.axis != -1:
        check.fail("take_rows", "groups of tokens (axis=-2)", "a per-token tensor (axis=-1)", "use read_at")
    parts = (y.gather(-2, idx[..., None].expand(*idx.shape, y.shape[-1])) for y in p[:3])
    return Packed(*parts, *p[3:6], (*p.shape[:-2], idx.shape[-1], p.shape[-1]))


def read_at(p: Packed, idx: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The values of tokens idx (..., n): (..., n, dim), without dequantizing the others."""
    if p.axis == -1:
        return dequantize(take_rows(p, idx), dtype)
    each, size = 32 // core.container(p.bits), core.container(p.bits)
    at = [(idx // n)[..., None].expand(*idx.shape, p.shape[-1]) for n in (each, p.group, p.group)]
    words, scale, zero = (y.gather(-2, place) for y, place in zip(p[:3], at, strict=True))
    codes = (words >> ((idx % each) * size)[..., None].to(torch.int32)) & (2**size - 1)
    return (codes.float() * scale.float() + zero.float()).to(dtype or p.scale.dtype)


# --- sizes ---------------------------------------------------------------------------------------------------------


def bits_per_element(bits: int, group: int, meta_bits: int = 32) -> float:
    """bits + meta_bits / group: what one element takes, with `meta_bits` of scale and zero for each group.

    >>> bits_per_element(2, 32)
    3.0
    """
    check.at_least("bits_per_element", 1, bits=bits, group=group)
    return bits + meta_bits / group


def packed_bytes(shape: tuple[int, ...], bits: int, *, axis: int, group: int, meta_size: int = 2) -> tuple[int, int]:
    """Bytes of the codes, and of scales and zeros of `meta_size` bytes, of a packed tensor (..., tokens, dim).

    >>> packed_bytes((1, 3, 128, 64), 2, axis=-2, group=32)
    (6144, 3072)
    """
    along, across = (shape[-2], shape[-1]) if axis == -2 else (shape[-1], shape[-2])
    rows = across * prod(shape[:-2])
    return 4 * rows * -(-along * core.container(bits) // 32), 2 * meta_size * rows * (along // group)


def cache_bytes(shape: tuple[int, int, int, int], layout: Storage, itemsize: int = 4) -> int:
    """Bytes that keys and values of one layer, each (B, Hkv, L, D), take in a storage format once L tokens were stored.

    Args:
        layout: a format of `memlens.kv.storage`, e.g. `kivi(bits=4)`.
        itemsize: bytes of an uncompressed element.
    """
    return sum(layout.size(shape, itemsize).values())
