"""Codecs: the map as published, the fast search against measuring every distance, errors bounded, steps near Adam's."""

import pytest
import torch

from memlens.optim import Packed, coded_adam_step, coded_direction, dyn8, dyn8_map, plain
from memlens.optim.lowbit import _nearest

BOTH = pytest.mark.parametrize("signed", [True, False])


def wild(n, generator, signed=True):
    """Numbers over nine decades, with zeros."""
    x = torch.randn(n, generator=generator) * 10 ** (torch.rand(n, generator=generator) * -9)
    x[::7] = 0
    return x if signed else x.abs()


@BOTH
def test_the_map_by_hand(signed):
    values = dyn8_map(signed)
    assert len(values) == len(values.unique()) == 256
    assert (values.diff() > 0).all()
    assert values[-1] == 1
    assert (values == 0).sum() == 1
    assert (values.min() < 0) == signed
    smallest = 0.55e-6 if signed else 0.325e-6  # i = 0: one midpoint of [0.1, 1], or the first of two
    assert values[values > 0].min().item() == pytest.approx(smallest)
    assert values[-2].item() == pytest.approx(1 - 0.45 / (64 if signed else 128))
    if signed:
        assert torch.equal(values[:127], -values[128:255].flip(0))  # there is a 1 and no -1


@BOTH
def test_the_fast_search_is_the_nearest_value(signed, generator):
    values = dyn8_map(signed)
    middle = ((values[1:].double() + values[:-1].double()) / 2).float()
    up, down = torch.tensor(2.0), torch.tensor(-2.0)
    edges = torch.cat([values, middle, torch.nextafter(middle, up), torch.nextafter(middle, down), torch.tensor([-0.0])])
    y = torch.cat([edges, wild(20_000, generator, signed).clamp(-1, 1)])
    assert torch.equal(_nearest(y, signed, "torch"), _nearest(y, signed, "reference"))


@BOTH
@pytest.mark.parametrize("shape", [(1,), (0,), (255,), (3, 257), (4, 4, 64)])
def test_forms_agree_and_errors_stay_within_half_a_gap(signed, shape, generator, assert_close):
    x = wild(torch.Size(shape).numel(), generator, signed).view(shape)
    codec = dyn8(signed)
    packed = codec.encode(x)
    assert torch.equal(packed.codes, codec.encode(x, form="reference").codes)
    back = codec.decode(packed)
    assert back.shape == x.shape
    scale = packed.scale.repeat_interleave(256)[: x.numel()].view(shape)
    gap = 0.9 / (64 if signed else 128)
    assert ((back - x).abs() <= scale * gap / 2 * 1.01 + 1e-12).all()
    assert ((back == 0) | (back.sign() == x.sign())).all()
    assert codec.nbytes(packed) == codec.size(x.numel()) == x.numel() + 4 * -(-x.numel() // 256)


def test_powers_of_ten_by_hand(assert_close):
    """10^-k of the maximum is nearest to its decade's last midpoint, 1 - 0.45 / 2^i of it; a linear code would give 0."""
    x = torch.tensor([3.0, 3e-3, -3e-4, 3e-5])
    back = dyn8(True).decode(dyn8(True).encode(x))
    assert_close(
        back / 3, torch.tensor([1.0, (1 - 0.45 / 8) * 1e-3, -(1 - 0.45 / 4) * 1e-4, (1 - 0.45 / 2) * 1e-5]), atol=0.0
    )


@BOTH
def test_decoding_an_encoding_is_stable(signed, generator):
    codec = dyn8(signed)
    x = wild(1000, generator, signed)
    x[::256] = 10.0  # the maximum of a block is its own code, so the scale stays
    packed = codec.encode(x)
    again = codec.encode(codec.decode(packed))
    assert torch.equal(packed.codes, again.codes)
    assert torch.equal(packed.scale, again.scale)


def test_plain_casts_into_memory_of_its_own(generator):
    x = torch.randn(7, 3, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        packed = plain(dtype).encode(x)
        assert packed.codes.data_ptr() != x.data_ptr()
        assert plain(dtype).decode(packed).dtype == torch.float32
        torch.testing.assert_close(plain(dtype).decode(packed), x.to(dtype).float(), rtol=0, atol=0)
        assert plain(dtype).nbytes(packed) == plain(dtype).size(21) == 21 * dtype.itemsize


def test_a_coded_step_without_loss_is_adamw(generator, assert_close):
    w = torch.randn(9, 40, generator=generator, requires_grad=True)
    peer, p, st = torch.optim.AdamW([w], lr=0.01, weight_decay=0.1), w.detach().clone(), None
    for _ in range(5):
        w.grad = torch.randn(9, 40, generator=generator)
        peer.step()
        p, st = coded_adam_step(p, w.grad, st, 0.01, plain(), plain(), weight_decay=0.1)
    assert_close(p, w.detach())


def test_eight_bits_walk_beside_full_precision(generator):
    full, low, exact, coded = torch.zeros(40, 50), torch.zeros(40, 50), None, None
    for _ in range(30):
        g = torch.randn(40, 50, generator=generator) + 0.5
        full, exact = coded_adam_step(full, g, exact, 0.01, plain(), plain())
        low, coded = coded_adam_step(low, g, coded, 0.01, dyn8(True), dyn8(False))
    assert ((low - full).norm() / full.norm()) < 0.02  # half a gap of the map is 0.7 % of a block's largest
    assert coded.m.codes.dtype == torch.uint8


@pytest.mark.parametrize("numel", [1, 257, 1000])
def test_the_reference_and_torch_forms_of_a_direction_agree(numel, generator, assert_close):
    states = dict.fromkeys(("reference", "torch"))
    for _ in range(3):
        g = torch.randn(numel, generator=generator)
        for form in states:
            direction, states[form] = coded_direction(g, states[form], dyn8(True), dyn8(False), form=form)
    assert torch.equal(states["reference"].m.codes, states["torch"].m.codes)
    assert torch.equal(states["reference"].v.scale, states["torch"].v.scale)
    assert direction.shape == g.shape


def test_what_is_refused():
    x = torch.tensor([1.0, -2.0])
    with pytest.raises(ValueError, match="signed=True"):
        dyn8(False).encode(x)
    with pytest.raises(ValueError, match=r"x\[1\] is inf"):
        dyn8(True).encode(torch.tensor([1.0, torch.inf]))
    with pytest.raises(ValueError, match="block=0"):
        dyn8(True, block=0)
    with pytest.raises(ValueError, match="floating-point"):
        plain(torch.int8)
    with pytest.raises(ValueError, match="one shape"):
        coded_adam_step(x, torch.ones(3), None, 0.1, plain(), plain())
    with pytest.raises(ValueError, match="the kernel of coded_direction does not take this call"):
        coded_direction(x, None, plain(), plain(), form="triton")
    assert isinstance(dyn8(True).encode(x), Packed)
