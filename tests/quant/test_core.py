"""The quantizer core: by hand, against the definition, and its bounds."""

import pytest
import torch

from memlens.quant import core
from memlens.quant.core import dequantize, pack, quantize, storage_bits, unpack

KINDS = pytest.mark.parametrize(
    "kind", [{"symmetric": True}, {"symmetric": False, "zero": "int"}, {"symmetric": False, "zero": "float"}], ids=str
)


def test_symmetric_by_hand():
    q = quantize(torch.tensor([[3.5, -7.0, 0.5, 1.5]]), 4)
    assert q.scale.tolist() == [[1.0]]
    assert q.codes.tolist() == [[4, -7, 0, 2]]  # 3.5 and 0.5 and 1.5 go to the even neighbour
    assert q.zero is None


def test_minimum_by_hand():
    q = quantize(torch.tensor([[-1.0, 2.0, 0.4, 0.6]]), 2, symmetric=False, zero="float")
    assert (q.scale.item(), q.zero.item()) == (1.0, -1.0)
    assert q.codes.tolist() == [[0, 3, 1, 2]]
    assert dequantize(q).tolist() == [[-1.0, 2.0, 0.0, 1.0]]


def test_whole_zero_by_hand():
    q = quantize(torch.tensor([[-1.0, 2.0, 0.0, 1.0]]), 2, symmetric=False)
    assert (q.scale.item(), q.zero.item(), q.zero.dtype) == (1.0, 1, torch.int32)
    assert dequantize(q).tolist() == [[-1.0, 2.0, 0.0, 1.0]]


@KINDS
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_group_is_quantized_by_the_definition(kind, bits, generator, assert_close):
    w = torch.randn(3, 5, 24, generator=generator) + 0.3
    got = dequantize(quantize(w, bits, group=8, **kind))
    want = torch.empty_like(w)
    for i in range(3):
        for j in range(5):
            for start in range(0, 24, 8):
                want[i, j, start : start + 8] = by_definition(w[i, j, start : start + 8], bits, **kind)
    assert_close(got, want)


def by_definition(x, bits, symmetric, zero="int"):
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = x.abs().max() / top
        return (x / scale).round().clamp(-top, top) * scale
    top, low, scale = 2**bits - 1, x.min(), (x.max() - x.min()) / (2**bits - 1)
    if zero == "float":
        return ((x - low) / scale).round().clamp(0, top) * scale + low
    offset = -(low / scale).round()
    return (((x / scale).round() + offset).clamp(0, top) - offset) * scale


@pytest.mark.parametrize("meta", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 30.0, -1000.0])
def test_the_error_is_within_half_a_stored_step(meta, offset, generator):
    w = torch.randn(50, 64, generator=generator).double().float() * 0.1 + offset
    q = quantize(w, 4, group=16, symmetric=False, zero="float", meta=meta)
    assert q.scale.dtype == q.zero.dtype == meta
    error = (dequantize(q) - w).abs().unflatten(-1, (-1, 16)).amax(-1)
    assert bool((error <= q.scale.float() / 2 * (1 + 1e-5) + 1e-6 * abs(offset)).all())


@pytest.mark.parametrize("meta", [torch.float32, torch.float16])
def test_what_was_quantized_stays_when_it_is_quantized_again(meta, generator, assert_close):
    once = quantize(torch.randn(40, 32, generator=generator), 2, symmetric=False, zero="float", meta=meta)
    again = quantize(dequantize(once), 2, symmetric=False, zero="float", meta=meta)
    assert torch.equal(again.codes, once.codes)
    assert_close(dequantize(again), dequantize(once), rtol=1e-6, atol=1e-6)


@KINDS
@pytest.mark.parametrize("value", [0.0, 5.0, -0.37])
def test_a_constant_group_is_exact(kind, value, assert_close):
    w = torch.full((2, 8), value)
    q = quantize(w, 3, group=4, **kind)
    assert_close(dequantize(q), w, rtol=1e-7, atol=0.0)
    if kind.get("zero") == "float":
        assert (q.scale == 0).all()
        assert (q.codes == 0).all()
    elif value == 0.0:
        assert (q.scale == 1).all()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("length", [1, 7, 16, 33])
@pytest.mark.parametrize("signed", [False, True])
def test_pack_and_unpack_are_inverse(bits, length, signed, generator):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    codes = torch.randint(low, high, (3, length), generator=generator).to(torch.int8 if signed else torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, -(-length * core.container(bits) // 8))
    assert torch.equal(unpack(packed, bits, length, signed=signed), codes)


def test_storage_bits_counts_codes_scales_and_zeros(generator):
    w = torch.randn(4, 64, generator=generator).half()
    assert storage_bits(quantize(w, 2, group=32, symmetric=False, zero="float")) == 4 * (64 * 2 + 2 * 32)
    assert storage_bits(quantize(w, 3, group=64)) == 4 * (64 * 4 + 16)
    assert storage_bits(quantize(w, 8, symmetric=False, zero="int")) == 4 * (64 * 8 + 16 + 32)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda w: quantize(w, 9), "bits=9"),
        (lambda w: quantize(w, 1), "bits=1"),
        (lambda w: quantize(w, 4, group=5), "n=8 is no multiple of group=5"),
        (lambda w: quantize(w, 4, zero="half"), "zero='half'"),
        (lambda w: quantize(w * torch.inf, 4), "finite numbers"),
        (lambda w: quantize(w.fill_(1e6), 4, meta=torch.float16), "meta=torch.float32"),
        (lambda w: pack(torch.tensor([4]), 2), "codes"),
        (lambda w: unpack(torch.zeros(2, dtype=torch.uint8), 4, 5), "length=5"),
    ],
)
def test_bad_calls_are_refused(call, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        call(torch.ones(2, 8))
