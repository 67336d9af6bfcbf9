"""Merging partial attentions: an algebra (commutative, associative, with a unit) and its gradient."""

import pytest
import torch

from memlens.attention.merge import merge, merge_many


@pytest.fixture
def parts(generator):
    return [(torch.randn(2, 3, 5, 4, generator=generator), 3 * torch.randn(2, 3, 5, generator=generator)) for _ in range(3)]


def test_two_keys_by_hand():
    # scores 0 and log 3: shares 1/4 and 3/4, denominator 4
    out, lse = merge(torch.tensor([[8.0]]), torch.tensor([0.0]), torch.tensor([[4.0]]), torch.tensor([3.0]).log())
    torch.testing.assert_close(out, torch.tensor([[5.0]]))
    torch.testing.assert_close(lse, torch.tensor([4.0]).log())


def test_commutes_and_associates(parts, assert_close):
    a, b, c = parts
    assert_close(tuple(merge(*a, *b)), tuple(merge(*b, *a)))
    assert_close(tuple(merge(*merge(*a, *b), *c)), tuple(merge(*a, *merge(*b, *c))))
    assert_close(tuple(merge_many(parts)), tuple(merge(*merge(*a, *b), *c)))


def test_an_empty_part_is_the_unit(parts, assert_close):
    out, lse = parts[0]
    nothing = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    assert_close(tuple(merge(out, lse, *nothing)), (out, lse))
    both = merge(*nothing, *nothing)
    assert (both.out == 0).all()
    assert (both.lse == -torch.inf).all()


def test_gradient_through_out_and_lse(generator):
    leaves = [torch.randn(3, 2, generator=generator, dtype=torch.float64), torch.randn(3, generator=generator).double()] * 2
    leaves = [x.clone().requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(merge, leaves)


def test_no_nan_in_the_gradient_of_an_empty_row():
    lse_a, lse_b = torch.tensor([-torch.inf, 0.5], requires_grad=True), torch.tensor([-torch.inf, -torch.inf])
    out_a, out_b = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3)
    out, lse = merge(out_a, lse_a, out_b, lse_b)
    grads = torch.autograd.grad(out.sum() + lse[1], (out_a, lse_a))
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][0] == 0).all()


def test_large_scores_do_not_overflow(assert_close):
    out = torch.tensor([[1.0]]), torch.tensor([1e4]), torch.tensor([[3.0]]), torch.tensor([1e4])
    assert_close(tuple(merge(*out)), (torch.tensor([[2.0]]), torch.tensor([1e4 + 0.6931472])))


def test_the_dtype_of_out_is_kept_and_lse_is_wide(parts):
    out, lse = merge(parts[0][0].half(), parts[0][1], parts[1][0].half(), parts[1][1])
    assert out.dtype == torch.float16
    assert lse.dtype == torch.float32


def test_refusals(parts):
    (out, lse), _, _ = parts
    with pytest.raises(ValueError, match=r"no parts"):
        merge_many([])
    with pytest.raises(ValueError, match=r"lse has shape .2, 3, 4.; expected .* length=5"):
        merge(out, lse, out, lse[:, :, :1].expand(2, 3, 4))
    with pytest.raises(ValueError, match=r"outs of one shape"):
        merge(out, lse, out[..., :2], lse)
