"""Adam's direction against torch.optim and a case by hand; the limiter; the reset."""

import math
from itertools import pairwise

import pytest
import torch

from memlens.optim import Moments, adam_direction, bias_correction, norm_growth_limit, reset_moments


def stream(generator, steps=7, shape=(5, 3)):
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


@pytest.mark.parametrize("betas, eps", [((0.9, 0.999), 1e-8), ((0.8, 0.5), 1e-2), ((0.0, 0.0), 1e-8)])
def test_the_direction_is_that_of_torch_adam(betas, eps, generator, assert_close):
    w = torch.zeros(5, 3, requires_grad=True)
    peer, st, ours = torch.optim.Adam([w], lr=0.1, betas=betas, eps=eps), None, torch.zeros(5, 3)
    for g in stream(generator):
        w.grad = g
        peer.step()
        direction, st = adam_direction(g, st, betas, eps)
        ours = ours - 0.1 * direction
        assert_close(ours, w.detach())
    assert_close(st.m, peer.state[w]["exp_avg"])
    assert_close(st.v, peer.state[w]["exp_avg_sq"])
    assert st.step == 7


def test_the_two_places_of_eps_by_hand():
    g = torch.tensor([0.01])
    direction, st = adam_direction(g, None, (0.9, 0.99), 0.1, "torch")
    assert direction.item() == pytest.approx(0.01 / (0.01 + 0.1))  # bias-corrected moments at step 1 are g and g^2
    direction, _ = adam_direction(g, None, (0.9, 0.99), 0.1, "hf")
    assert direction.item() == pytest.approx((math.sqrt(0.01) / 0.1) * 0.001 / (0.001 + 0.1))
    assert st.m.item() == pytest.approx(0.001)
    assert st.v.item() == pytest.approx(1e-6)


def test_the_state_is_left_alone_and_half_precision_keeps_wide_moments(generator):
    first, second = stream(generator, 2)
    _, st = adam_direction(first.bfloat16(), None)
    assert st.m.dtype == torch.float32
    before = [t.clone() for t in st[:2]]
    adam_direction(second, st)
    assert all(torch.equal(a, b) for a, b in zip(before, st[:2], strict=True))


def test_an_early_step_has_unit_size_whatever_the_gradient(generator, assert_close):
    for scale in (1e-3, 1e3):
        direction, _ = adam_direction(torch.full((4,), scale), None, eps=0.0)
        assert_close(direction, torch.ones(4))
    assert bias_correction(1, (0.9, 0.999)) == pytest.approx(math.sqrt(0.001) / 0.1)
    assert bias_correction(100_000, (0.9, 0.999)) == pytest.approx(1)


def test_the_limiter_lets_a_norm_grow_by_gamma_and_no_more(generator, assert_close):
    norm, norms = None, []
    for g in stream(generator, 12):
        u, norm = norm_growth_limit(g * 2.0 ** len(norms), norm, gamma=1.1)
        assert norm == pytest.approx(u.norm().item(), rel=1e-5)
        norms.append(norm)
    assert all(b <= 1.1 * a * (1 + 1e-6) for a, b in pairwise(norms))
    u, norm = norm_growth_limit(torch.ones(4), 3.0)
    assert_close(u, torch.ones(4))
    assert norm_growth_limit(torch.ones(4), 0.0)[1] == 2.0  # a silent step does not stop the parameter for good


def test_a_reset_starts_over(generator):
    first, second = stream(generator, 2)
    _, st = adam_direction(first, None)
    again = adam_direction(second, reset_moments(st))[0]
    torch.testing.assert_close(again, adam_direction(second, None)[0])


def test_what_is_refused():
    g = torch.ones(3)
    with pytest.raises(ValueError, match="betas"):
        adam_direction(g, None, (0.9, 1.0))
    with pytest.raises(ValueError, match="eps=-1"):
        adam_direction(g, None, eps=-1)
    with pytest.raises(ValueError, match="eps_mode='keras'"):
        adam_direction(g, None, eps_mode="keras")
    with pytest.raises(ValueError, match="one shape"):
        adam_direction(g, Moments(torch.ones(4), torch.ones(4), 1))
    with pytest.raises(ValueError, match="dense floating point"):
        adam_direction(g.long(), None)
    with pytest.raises(ValueError, match="gamma"):
        norm_growth_limit(g, 1.0, gamma=0.0)
    with pytest.raises(ValueError, match="step=0"):
        bias_correction(0, (0.9, 0.999))
