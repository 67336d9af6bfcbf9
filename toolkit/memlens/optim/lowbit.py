"""How an optimizer state is stored: codecs, and an Adam step that keeps its moments encoded.

`dyn8` is the 8-bit dynamic tree map: blocks of 256 consecutive elements share their absmax, each element is the nearest
of 256 values whose spacing shrinks with the magnitude over seven decades. `plain` just casts.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from memlens import backend, check
from memlens.optim.moments import Moments, adam_direction, bias_correction, check_adam

__all__ = ["Codec", "CodedMoments", "Packed", "coded_adam_step", "coded_direction", "dyn8", "dyn8_map", "plain"]


class Packed(NamedTuple):
    codes: Tensor  # what stands for the elements, in their order
    scale: Tensor  # one number per block, float32; empty where the codec needs none
    shape: tuple[int, ...]  # of what was encoded


class Codec(Protocol):
    def encode(self, x: Tensor, *, form: str = "torch") -> Packed: ...
    def decode(self, packed: Packed) -> Tensor: ...
    def nbytes(self, packed: Packed) -> int: ...
    def size(self, numel: int) -> int: ...


class CodedMoments(NamedTuple):
    m: Packed
    v: Packed
    step: int  # updates seen


@lru_cache(maxsize=2)
def dyn8_map(signed: bool) -> Tensor:
    """The 256 values in rising order, float32: midpoints of an even split of [0.1, 1], times 10^(i-6), and 0 and 1.

    For i = 0..6 the split has 2^i parts for each sign (signed) or 2^(i+1) parts (unsigned). There is a 1 and no -1.

    >>> dyn8_map(True)[[0, 127, 255]]
    tensor([-0.9930,  0.0000,  1.0000])

    Source: Dettmers et al., arXiv:2110.02861, dynamic tree quantization as in bitsandbytes.
    """
    decades = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i + (not signed)) + 1, dtype=torch.float64)
        decades.append((edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - 6))
    positive = torch.cat(decades)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return torch.cat([*([-positive] if signed else []), positive, ends]).sort().values.float()


class _Tables(NamedTuple):
    values: Tensor  # (256,) the map
    borders: Tensor  # (256,) borders[i] is the largest float32 that still belongs to code i; the last is infinity
    first: Tensor  # (65536,) uint8: the code of the lowest float32 with these 16 top bits


@lru_cache(maxsize=16)
def _tables(signed: bool, device: torch.device) -> _Tables:
    """Lookup tables. Two neighbouring borders never share their 16 top bits, so one comparison mends the first guess."""
    values = dyn8_map(signed)
    middle = (values[1:].double() + values[:-1].double()) / 2
    rounded = middle.float()
    # round down, so that x <= border says the same as x <= exact middle
    rounded = torch.where(rounded.double() > middle, torch.nextafter(rounded, torch.tensor(-torch.inf)), rounded)
    top = torch.arange(65536, dtype=torch.int32) << 16
    lowest = torch.where(top < 0, top | 0xFFFF, top).view(torch.float32)
    first = torch.bucketize(lowest.nan_to_num(0.0), rounded).to(torch.uint8)
    borders = torch.cat([rounded, torch.tensor([torch.inf])])
    return _Tables(values.to(device), borders.to(device), first.to(device))


def _nearest(y: Tensor, signed: bool, form: str) -> Tensor:
    """Code of the nearest map value, the lower one on a tie; y float32 in [-1, 1]. "reference" measures every distance."""
    values, borders, first = _tables(signed, y.device)
    if form == "reference":
        return (y.double()[..., None] - values.double()).abs().argmin(-1).to(torch.uint8)
    bits = y.contiguous().view(torch.int32).flatten()
    guess = first.index_select(0, (bits >> 16) & 0xFFFF)
    above = y.flatten() > borders.index_select(0, guess.int())
    return (guess + above).view(y.shape)


class Dyn8(NamedTuple):
    """The codec that `dyn8` makes."""

    signed: bool
    block: int = 256

    def encode(self, x: Tensor, *, form: str = "torch") -> Packed:
        """Codes (numel,) uint8 and block maxima (ceil(numel / block),) float32.

        Raises:
            ValueError: NaN or infinity, or a negative element where the map is unsigned.
        """
        check.one_of("dyn8.encode", ("reference", "torch"), form=form)
        flat = x.detach().flatten().float()
        blocks = F.pad(flat, (0, -flat.numel() % self.block)).view(-1, self.block)
        low, high = blocks.aminmax(dim=1) if blocks.numel() else (blocks.new_zeros(0),) * 2
        scale = torch.maximum(high, -low)
        if not bool(scale.isfinite().all()):
            check.finite("dyn8.encode", x=x)
        if not self.signed and bool((low < 0).any()):
            check.fail("dyn8.encode", f"an element {low.min().item():.3g}", "none below 0", "use dyn8(signed=True)")
        y = blocks / scale.where(scale > 0, 1.0)[:, None]
        codes = _nearest(y, self.signed, form).flatten()
        # a slice would keep the padding in memory
        return Packed(codes if codes.numel() == flat.numel() else codes[: flat.numel()].clone(), scale, tuple(x.shape))

    def decode(self, packed: Packed) -> Tensor:
        """The stored values, float32, in the shape that was encoded."""
        codes, scale, shape = packed
        flat = _tables(self.signed, codes.device).values.index_select(0, codes.int())
        padded = F.pad(flat, (0, -flat.numel() % self.block)).view(-1, self.block) * scale[:, None]
        return padded.flatten()[: flat.numel()].view(shape)

    def nbytes(self, packed: Packed) -> int:
        """Bytes held by an encoded tensor."""
        return packed.codes.nbytes + packed.scale.nbytes

    def size(self, numel: int) -> int:
        """Bytes that `numel` elements will take: one each, and four per block."""
        return numel + 4 * -(-numel // self.block)


class Plain(NamedTuple):
    """The codec that `plain` makes."""

    dtype: torch.dtype

    def encode(self, x: Tensor, *, form: str = "torch") -> Packed:
        """The tensor in the codec's dtype, as memory of its own."""
        return Packed(x.detach().to(self.dtype, copy=True), torch.empty(0, device=x.device), tuple(x.shape))

    def decode(self, packed: Packed) -> Tensor:
        """The stored values, float32 at least."""
        return packed.codes.to(torch.promote_types(self.dtype, torch.float32))

    def nbytes(self, packed: Packed) -> int:
        """Bytes held by an encoded tensor."""
        return packed.codes.nbytes

    def size(self, numel: int) -> int:
        """Bytes that `numel` elements will take."""
        return numel * self.dtype.itemsize


def dyn8(signed: bool, block: int = 256) -> Dyn8:
    """Eight bits per element: absmax per block of consecutive elements, then the nearest of `dyn8_map(signed)`.

    What is far below the largest of its block becomes 0: below 2.8e-7 of it (signed), 1.6e-7 (unsigned). A second moment
    that became 0 while the first did not makes the next Adam direction up to 1 / sqrt(1 - b2) times too long.

    Raises:
        ValueError: a block below 1.
    """
    check.at_least("dyn8", 1, block=block)
    return Dyn8(bool(signed), block)


def plain(dtype: torch.dtype = torch.float32) -> Plain:
    """No code at all: the values in `dtype`.

    Raises:
        ValueError: a dtype that is not floating point.
    """
    if not dtype.is_floating_point:
        check.fail("plain", f"dtype={dtype}", "a floating-point dtype")
    return Plain(dtype)


def coded_direction(
    g: Tensor, st: CodedMoments | None, m_codec: Codec, v_codec: Codec, betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8, eps_mode: str = "torch", *, form: str = "auto",
) -> tuple[Tensor, CodedMoments]:  # fmt: skip
    """`adam_direction` with moments that are decoded, used at full precision for this step, and encoded again.

    Args:
        g: any shape, floating point.
        st: None before the first step.
        form: "reference" searches all 256 values, "torch" a table; "triton" (both codecs dyn8 of block 256) decodes,
            updates and encodes in one kernel, with no float32 moment in memory.
    Raises:
        ValueError: as `adam_direction` and the codecs; RuntimeError: "triton" where it cannot run.
    """
    kernel = m_codec == Dyn8(True, 256) and v_codec == Dyn8(False, 256)
    form = backend.choose("coded_direction", form, g, kernel=kernel)
    if form == "triton":
        return _kernel_direction(g, st, betas, eps, eps_mode)
    moments = st and Moments(m_codec.decode(st.m), v_codec.decode(st.v), st.step)
    direction, (m, v, step) = adam_direction(g, moments, betas, eps, eps_mode)
    return direction, CodedMoments(m_codec.encode(m, form=form), v_codec.encode(v, form=form), step)


def _kernel_direction(g: Tensor, st: CodedMoments | None, betas, eps: float, eps_mode: str) -> tuple[Tensor, CodedMoments]:
    from memlens_kernels.adam8 import adam8

    step = (0 if st is None else st.step) + 1
    floor = check_adam("coded_direction", g, st and st.m.shape, st and st.v.shape, betas, eps, eps_mode, step)
    m, v = st[:2] if st else (_nothing(g), _nothing(g))
    tables = [_tables(signed, g.device)[:2] for signed in (True, False)]
    correction = bias_correction(step, betas)
    direction, *new = adam8(g, m[:2], v[:2], *tables, betas=betas, correction=correction, floor=floor)
    if not bool(new[1].isfinite().all()):
        check.finite("coded_direction", g=g)
    return direction, CodedMoments(Packed(*new[:2], m.shape), Packed(*new[2:], v.shape), step)


def _nothing(g: Tensor) -> Packed:
    """Zeros encoded by dyn8: any code at scale 0."""
    codes = torch.zeros(g.numel(), dtype=torch.uint8, device=g.device)
    return Packed(codes, torch.zeros(-(-g.numel() // 256), device=g.device), tuple(g.shape))


def coded_adam_step(
    p: Tensor, g: Tensor, st: CodedMoments | None, lr: float, m_codec: Codec, v_codec: Codec,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0, *, form: str = "auto",
) -> tuple[Tensor, CodedMoments]:  # fmt: skip
    """One AdamW step on `p` with encoded moments: p' = (1 - lr decay) p - lr direction, decay decoupled.

    Args:
        p, g: one shape.
        lr, weight_decay: per step.
    Returns:
        the new parameter in p's dtype, and the new state; nothing is changed in place.
    Raises:
        ValueError: shapes that differ, and as `coded_direction`.
    """
    if p.shape != g.shape:
        check.fail("coded_adam_step", f"p {tuple(p.shape)}, g {tuple(g.shape)}", "one shape")
    direction, st = coded_direction(g, st, m_codec, v_codec, betas, eps, form=form)
    return (p * (1 - lr * weight_decay) - lr * direction).to(p.dtype), st
