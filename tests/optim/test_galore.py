"""GaLore's step: against its publisher's code, against full rank where the theory says so, and not where it does not."""

import pytest
import torch

from memlens.optim import (
    ProjectedState,
    Subspace,
    adam_direction,
    dyn8,
    galore_step,
    project,
    projected_direction,
    unproject,
)

SHAPES = pytest.mark.parametrize("shape", [(8, 13), (13, 8), (9, 9)])


def gradients(shape, generator, steps=9):
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


@SHAPES
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_step_is_that_of_galore_torch(shape, weight_decay, generator, assert_close, galore_peer):
    start = torch.randn(shape, generator=generator)
    w, ours, state = torch.nn.Parameter(start.clone()), start, None
    group = {"params": [w], "rank": 3, "update_proj_gap": 50, "scale": 0.25, "proj_type": "std"}
    peer = galore_peer([group], lr=0.02, weight_decay=weight_decay, no_deprecation_warning=True)
    for g in gradients(shape, generator):  # one subspace: at a refresh its signs would meet moments of other signs
        w.grad = g.clone()
        peer.step()
        ours, state = galore_step(ours, g, state, 0.02, 3, 50, 0.25, weight_decay=weight_decay)
        assert_close(ours, w.detach())
    assert state.step == 9


@SHAPES
def test_a_refresh_takes_the_current_gradient_and_keeps_the_moments(shape, generator, assert_close):
    state, w, grads = None, torch.zeros(shape), gradients(shape, generator, 4)
    seen = []
    for g in grads:
        w, state = galore_step(w, g, state, 0.1, 2, every=2)
        seen.append(state)
    assert torch.equal(seen[0].sub.basis, seen[1].sub.basis)
    assert torch.equal(seen[2].sub.basis, seen[3].sub.basis)
    assert not torch.equal(seen[1].sub.basis, seen[2].sub.basis)
    # the direction of step 2, by hand: moments of step 1 in the basis of gradient 2
    low = project(grads[2], seen[2].sub)
    assert_close(seen[2].inner.m.codes, 0.9 * seen[1].inner.m.codes + 0.1 * low)


@SHAPES
def test_a_linear_rule_inside_is_full_rank_exactly(shape, generator, assert_close):
    """Momentum commutes with a fixed square orthonormal basis; this is the theory behind the projection."""

    def momentum(low, held):
        held = low if held is None else 0.9 * held + low
        return held, held

    state, full = None, torch.zeros(shape)
    for g in gradients(shape, generator):
        direction, state = projected_direction(g, state, momentum, rank=min(shape), every=100)
        full = 0.9 * full + g
        assert_close(direction, full)


@SHAPES
def test_adam_inside_at_full_rank_is_adam_in_a_rotated_basis_and_not_adam(shape, generator, assert_close):
    state, rotated, upright, w = None, None, None, torch.zeros(shape)
    for g in gradients(shape, generator, 5):
        before = w
        w, state = galore_step(w, g, state, 1.0, min(shape), 100, 1.0)
        turned, rotated = adam_direction(project(g, state.sub), rotated, eps=1e-6, eps_mode="hf")
        assert_close(before - w, unproject(turned, state.sub))
        plain_adam, upright = adam_direction(g, upright, eps=1e-6, eps_mode="hf")
    assert ((before - w) - plain_adam).abs().max() > 0.1


def test_a_basis_column_may_flip_with_its_moments(generator, assert_close):
    w, first, second = (torch.randn(8, 5, generator=generator) for _ in range(3))
    _, state = galore_step(w, first, None, 0.1, 3, 10)
    turn = torch.tensor([1.0, -1.0, 1.0])
    m = state.inner.m
    flipped = ProjectedState(
        Subspace(state.sub.basis * turn, "right"), state.inner._replace(m=m._replace(codes=m.codes * turn)), state.step
    )
    assert_close(galore_step(w, second, flipped, 0.1, 3, 10)[0], galore_step(w, second, state, 0.1, 3, 10)[0])


def test_the_update_lies_in_the_subspace_and_alpha_spares_the_decay(generator, assert_close):
    w, g = torch.randn(6, 10, generator=generator), torch.randn(6, 10, generator=generator)
    small, state = galore_step(w, g, None, 0.1, 2, alpha=0.5)
    assert_close((w - small) - unproject(project(w - small, state.sub), state.sub), torch.zeros(6, 10))
    decayed, _ = galore_step(w, g, None, 0.1, 2, alpha=0.5, weight_decay=0.2)
    assert_close(decayed, small * (1 - 0.1 * 0.2))
    still, _ = galore_step(w, g, None, 0.1, 2, alpha=0.0, weight_decay=0.2)
    assert_close(still, w * (1 - 0.1 * 0.2))


def test_eight_bit_moments_walk_beside_float32(generator):
    ends = []
    for codecs in ((None, None), (dyn8(True), dyn8(False))):
        stream = torch.Generator().manual_seed(3)
        w, state = torch.zeros(40, 60), None
        for _ in range(20):
            g = torch.randn(40, 60, generator=stream) + 0.5
            w, state = galore_step(w, g, state, 0.01, 8, 10, 1.0, *codecs)
        ends.append(w)
    assert state.inner.m.codes.dtype == torch.uint8
    assert (ends[0] - ends[1]).norm() / ends[0].norm() < 0.02


def test_half_precision_weights_and_gradients(generator):
    w, g = (torch.randn(12, 8, generator=generator).bfloat16() for _ in range(2))
    new, state = galore_step(w, g, None, 0.1, 3)
    assert new.dtype == state.sub.basis.dtype == torch.bfloat16
    want, _ = galore_step(w.float(), g.float(), None, 0.1, 3)
    torch.testing.assert_close(new.float(), want, rtol=2e-2, atol=2e-2)


def test_what_is_refused(generator):
    w = torch.randn(6, 4, generator=generator)
    with pytest.raises(ValueError, match="rank=0"):
        galore_step(w, w, None, 0.1, 0)
    with pytest.raises(ValueError, match="every=0"):
        galore_step(w, w, None, 0.1, 2, 0)
    with pytest.raises(ValueError, match="a matrix"):
        galore_step(w[0], w[0], None, 0.1, 2)
    with pytest.raises(ValueError, match="sparse"):
        galore_step(w, w.to_sparse(), None, 0.1, 2)
    with pytest.raises(ValueError, match="one shape"):
        galore_step(w, w.T, None, 0.1, 2)
    _, state = galore_step(w, w, None, 0.1, 2)
    with pytest.raises(ValueError, match="project: basis has shape"):
        galore_step(w.T, w.T, state, 0.1, 2)
