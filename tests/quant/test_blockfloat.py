"""Block floating point: by hand, its bound, and what scaling does to it."""

import pytest
import torch

from memlens.quant.blockfloat import bfp, decode, encode


def test_a_block_by_hand():
    blocks = encode(torch.tensor([6.0, -8.0, 0.9, 3.1]), 4, 4)  # e = 3, step 2
    assert blocks.exponent.tolist() == [3]
    assert blocks.mantissa.tolist() == [3, -4, 0, 2]
    assert decode(blocks).tolist() == [6.0, -8.0, 0.0, 4.0]


@pytest.mark.parametrize("power", [-40, -3, 0, 5, 60])
@pytest.mark.parametrize("mantissa", [2, 4, 8])
def test_one_power_of_two_is_exact(power, mantissa):
    x = torch.zeros(2, 8)
    x[0, 3], x[1, 7] = 2.0**power, -(2.0**power)
    assert torch.equal(bfp(x, mantissa, 8), x)


def test_scaling_by_a_power_of_two_scales_the_result(generator):
    x = torch.randn(5, 32, generator=generator)
    assert torch.equal(bfp(x * 2.0**9, 4, 16), bfp(x, 4, 16) * 2.0**9)


@pytest.mark.parametrize("mantissa", [2, 3, 4, 8])
def test_the_error_is_half_a_step_inside_the_clamp(mantissa, generator):
    x = torch.randn(64, 32, generator=generator)
    blocks = encode(x, mantissa, 8)
    step = (blocks.exponent.float() + 2 - mantissa).exp2().repeat_interleave(8, -1)
    inside = (blocks.mantissa > -(2 ** (mantissa - 1))) & (blocks.mantissa < 2 ** (mantissa - 1) - 1)
    error = (decode(blocks) - x).abs()
    assert bool((error <= step / 2)[inside].all())
    assert bool((error <= step).all())
    assert inside.float().mean() > 0.3


def test_zeros_extremes_and_order(generator):
    assert torch.equal(bfp(torch.zeros(3, 8), 4, 8), torch.zeros(3, 8))
    wide = torch.tensor([3e38, 1e-45, -3e38, 0.0])
    assert bool(bfp(wide, 8, 4).isfinite().all())
    assert bool(bfp(torch.full((4,), 1e-40), 8, 4).isfinite().all())
    x, order = torch.randn(4, 8, generator=generator), torch.randperm(8, generator=generator)
    assert torch.equal(bfp(x[:, order], 4, 8), bfp(x, 4, 8)[:, order])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: bfp(torch.ones(2, 8), 4, 3), "n=8 is no multiple of block=3"),
        (lambda: bfp(torch.ones(2, 8), 9, 4), "mantissa=9"),
        (lambda: bfp(torch.full((2, 8), torch.nan), 4, 4), "finite numbers"),
    ],
)
def test_bad_calls_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
