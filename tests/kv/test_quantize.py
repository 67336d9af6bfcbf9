"""Packed keys and values: by hand, the bound, exact packing, and parts that equal the whole."""

import pytest
import torch

from memlens.kv import quantize as qz
from memlens.kv.quantize import affine_quantize, dequantize

AXES = pytest.mark.parametrize("axis", [-1, -2])
ALL_BITS = pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])


def test_six_tokens_by_hand():
    x = torch.tensor([[0.0, 1.0, 3.0, 2.0, 2.0, 2.0]]).T  # one channel, two groups of three tokens
    p = affine_quantize(x, 2, axis=-2, group=3)
    assert p.scale.flatten().tolist() == [1.0, 0.0]
    assert p.zero.flatten().tolist() == [0.0, 2.0]
    assert p.codes.tolist() == [[0 + 1 * 4 + 3 * 16]]
    assert torch.equal(dequantize(p), x)


@ALL_BITS
@AXES
def test_the_error_is_within_half_a_step(bits, axis, generator):
    x = torch.randn(2, 3, 64, 32, generator=generator) * 3
    p = affine_quantize(x, bits, axis=axis, group=16, meta=torch.float16)
    error = (dequantize(p, torch.float32) - x).abs().unflatten(axis, (-1, 16)).amax(axis)
    assert bool((error <= p.scale.float() / 2 * (1 + 1e-5)).all())


@ALL_BITS
@AXES
def test_torch_gives_the_reference(bits, axis, generator):
    x = torch.randn(2, 2, 24, 24, generator=generator)
    one, two = (affine_quantize(x, bits, axis=axis, group=8, form=form) for form in ("torch", "reference"))
    assert all(torch.equal(a, b) for a, b in zip(one[:3], two[:3], strict=True))
    assert one[3:] == two[3:]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@AXES
@pytest.mark.parametrize("length", [1, 16, 31, 65])
def test_packing_is_exact_and_lowest_bits_first(bits, axis, length, generator):
    shape = (2, length, 5) if axis == -2 else (2, 5, length)
    codes = torch.randint(0, 2**bits, shape, generator=generator)
    words = qz.pack(codes, bits, axis)
    each = 32 // bits
    assert words.dtype == torch.int32
    assert words.shape[axis] == -(-length // each)
    assert torch.equal(qz.unpack(words, bits, axis, length).long(), codes)
    first = words.select(axis, 0).long() & (2**bits - 1)
    assert torch.equal(first, codes.select(axis, 0))
    if length > 1:
        assert torch.equal((words.select(axis, 1 // each).long() >> bits) & (2**bits - 1), codes.select(axis, 1))


@AXES
def test_a_constant_group_is_exact(axis):
    x = torch.randn(1, 1, 4, 4).half().repeat_interleave(8, axis)  # each group of 8 along the axis is one number
    p = affine_quantize(x, 4, axis=axis, group=8)
    assert int(p.codes.abs().sum()) == 0
    assert float(p.scale.abs().sum()) == 0.0
    assert torch.equal(dequantize(p), x)


@AXES
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_parts_equal_the_whole(axis, bits, generator):
    x = torch.randn(2, 2, 96, 32, generator=generator)
    p = affine_quantize(x, bits, axis=axis, group=32)
    whole = dequantize(p)
    head, tail = qz.span(p, 0, 32), qz.span(p, 32, 96)
    assert torch.equal(torch.cat((dequantize(head), dequantize(tail)), -2), whole)
    again = qz.join(head, tail)
    assert all(torch.equal(a, b) for a, b in zip(again[:3], p[:3], strict=True))
    assert again.shape == p.shape
    idx = torch.randint(0, 96, (2, 2, 7), generator=generator)
    picked = whole.gather(-2, idx[..., None].expand(-1, -1, -1, 32))
    torch.testing.assert_close(qz.read_at(p, idx), picked)
    if axis == -1:
        assert torch.equal(dequantize(qz.take_rows(p, idx)), picked)


def test_sizes_are_the_formula(generator):
    assert qz.bits_per_element(2, 32) == 3.0
    p = affine_quantize(torch.randn(1, 3, 128, 64, generator=generator), 2, axis=-2, group=32, meta=torch.float16)
    assert sum(y.nbytes for y in p[:3]) * 8 == 128 * 64 * 3 * 3.0


@pytest.mark.parametrize(
    "change, words",
    [
        ({"bits": 5}, "bits='5'"),
        ({"bits": 0}, "bits='0'"),
        ({"group": 7}, "no multiple of group=7"),
        ({"group": 0}, "no multiple of group=0"),
        ({"axis": 0}, "axis='0'"),
        ({"x": torch.full((2, 8, 8), torch.nan)}, "finite numbers"),
        ({"x": torch.full((2, 8, 8), 1e6), "meta": torch.float16}, "meta=torch.float32"),
    ],
)
def test_bad_calls_are_refused(change, words):
    call = {"x": torch.ones(2, 8, 8), "bits": 2, "axis": -1, "group": 4, **change}
    with pytest.raises(ValueError, match=words):
        affine_quantize(call.pop("x"), call.pop("bits"), **call)


def test_parts_that_share_scales_are_not_cut(generator):
    p = affine_quantize(torch.randn(1, 1, 64, 8, generator=generator), 2, axis=-2, group=32)
    with pytest.raises(ValueError, match="start=16"):
        qz.span(p, 16, 64)
    with pytest.raises(ValueError, match="use read_at"):
        qz.take_rows(p, torch.zeros(1, 1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="tokens=8"):
        qz.join(affine_quantize(torch.ones(1, 1, 8, 8), 2, axis=-2, group=8), p)
