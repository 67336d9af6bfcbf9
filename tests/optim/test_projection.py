"""Subspaces: orthonormal, the best of their rank, signed the same everywhere, and on the side that is short."""

import pytest
import torch

from memlens.optim import (
    Subspace,
    add_unprojected_,
    energy_rank,
    gauss_subspace,
    pick_side,
    project,
    svd_subspace,
    unproject,
)

SHAPES = [(7, 12), (12, 7), (9, 9), (1, 5), (5, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_basis_is_orthonormal_and_short(shape, generator, assert_close):
    sub = svd_subspace(torch.randn(shape, generator=generator), 3)
    assert sub.side == pick_side(*shape) == ("right" if shape[0] >= shape[1] else "left")
    rank = min(3, *shape)
    assert sub.basis.shape == (min(shape), rank)
    assert_close(sub.basis.T @ sub.basis, torch.eye(rank))


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("rank", [1, 4, 50])
def test_the_projection_keeps_the_leading_energy(shape, rank, generator, assert_close):
    g = torch.randn(shape, generator=generator)
    sub = svd_subspace(g, rank)
    singular = torch.linalg.svdvals(g)  # Eckart-Young: what is lost is the tail
    assert_close((g - unproject(project(g, sub), sub)).norm(), singular[rank:].norm())
    once = unproject(project(g, sub), sub)
    assert_close(unproject(project(once, sub), sub), once)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adding_in_place_is_adding_what_comes_back(shape, dtype, generator):
    sub = svd_subspace(torch.randn(shape, generator=generator), 3)
    low, w = project(torch.randn(shape, generator=generator), sub), torch.randn(shape, generator=generator).to(dtype)
    want = w.float() - 0.5 * unproject(low, sub)
    address = w.data_ptr()
    assert add_unprojected_(w, low, sub, -0.5).data_ptr() == address
    torch.testing.assert_close(w.float(), want.to(dtype).float(), rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_side_can_be_chosen(side, generator, assert_close):
    g = torch.randn(5, 8, generator=generator)
    sub = svd_subspace(g, 2, side)
    assert sub.basis.shape == ((5, 2) if side == "left" else (8, 2))
    assert project(g, sub).shape == ((2, 8) if side == "left" else (5, 2))


def test_signs_do_not_depend_on_the_gradients_sign(generator, assert_close):
    g = torch.randn(8, 6, generator=generator)
    for sub in (svd_subspace(g, 4), svd_subspace(-g, 4)):
        assert (sub.basis.gather(0, sub.basis.abs().argmax(0, keepdim=True)) > 0).all()
    assert_close(svd_subspace(g, 4).basis, svd_subspace(-g, 4).basis)


def test_the_basis_holds_no_more_memory_than_its_size(generator):
    for shape in ((64, 96), (96, 64)):
        basis = svd_subspace(torch.randn(shape, generator=generator), 2).basis
        assert basis.untyped_storage().nbytes() == 64 * 2 * 4


def test_half_precision_gradients_go_through_a_float32_svd(generator):
    g = torch.randn(12, 8, generator=generator)
    half = svd_subspace(g.bfloat16(), 3)
    assert half.basis.dtype == torch.bfloat16
    torch.testing.assert_close(half.basis.float(), svd_subspace(g.bfloat16().float(), 3).basis, rtol=1e-2, atol=1e-2)
    assert svd_subspace(g.double(), 3).basis.dtype == torch.float64


def test_a_gaussian_subspace_comes_back_from_its_seed_and_keeps_lengths_on_average(generator):
    first, again = gauss_subspace((300, 40), 20, seed=5), gauss_subspace((300, 40), 20, seed=5)
    assert torch.equal(first.basis, again.basis)
    assert first.basis.shape == (40, 20)
    assert not torch.equal(first.basis, gauss_subspace((300, 40), 20, seed=6).basis)
    g = torch.randn(300, 40, generator=generator)
    energy = [project(g, gauss_subspace((300, 40), 20, seed=s)).square().sum() / g.square().sum() for s in range(200)]
    assert abs(torch.stack(energy).mean() - 1) < 0.02  # E |P x|^2 = |x|^2 for N(0, 1/r)


@pytest.mark.parametrize("shape", [*SHAPES, (40, 70)])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_the_energy_rank_is_that_of_the_singular_values(shape, share, generator):
    g = torch.randn(shape, generator=generator) @ torch.diag(torch.rand(shape[1], generator=generator) ** 4) * 1e-25
    energy = torch.linalg.svdvals(g.double()).square()
    kept = energy.cumsum(0) / energy.sum()
    rank = energy_rank(g, share)
    assert kept[rank - 1] >= share - 1e-6
    assert rank == 1 or kept[rank - 2] < share + 1e-6


def test_the_energy_rank_by_hand():
    assert energy_rank(torch.eye(10), 0.85) == 9
    assert energy_rank(torch.diag(torch.tensor([3.0, 1.0])), 0.89) == 1  # 9 of 10
    assert energy_rank(torch.diag(torch.tensor([3.0, 1.0])), 0.91) == 2
    assert energy_rank(torch.zeros(3, 4)) == 0


def test_what_is_refused():
    g = torch.randn(4, 6)
    with pytest.raises(ValueError, match="rank=0"):
        svd_subspace(g, 0)
    with pytest.raises(ValueError, match="a matrix"):
        svd_subspace(torch.randn(4), 1)
    with pytest.raises(ValueError, match="sparse"):
        svd_subspace(g.to_sparse(), 1)
    with pytest.raises(ValueError, match=r"g\[1, 2\] is nan"):
        svd_subspace(g.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(torch.nan)), 1)
    with pytest.raises(ValueError, match="did you mean 'left'"):
        svd_subspace(g, 1, "lefft")
    with pytest.raises(ValueError, match="expected"):
        project(g, Subspace(torch.zeros(6, 2), "left"))
    with pytest.raises(ValueError, match="add_unprojected_: right has shape"):
        add_unprojected_(g, torch.zeros(2, 5), Subspace(torch.zeros(4, 2), "left"), 1.0)
    with pytest.raises(ValueError, match="side='auto'"):
        unproject(g, Subspace(torch.zeros(4, 2), "auto"))
    with pytest.raises(ValueError, match="share=1"):
        energy_rank(g, 1.0)
    with pytest.raises(ValueError, match="m=0"):
        pick_side(0, 3)
