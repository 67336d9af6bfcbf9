"""The attention kernels in the interpreter, against the reference; outputs start as NaN, sizes fit no tile."""

from functools import partial

import pytest
import torch

from memlens.attention.exact import KERNEL_DIM, attend
from memlens.attention.sparse import block_attend, spread

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("interpreted")
SHAPES = {  # batch, heads, kv heads, q_len, k_len, dim, value_dim
    "one": (2, 2, 2, 1, 1, 40, 40),
    "odd": (1, 4, 2, 63, 63, 64, 64),
    "chunk": (1, 2, 1, 33, 130, 40, 24),
    "more queries": (1, 2, 2, 70, 23, 16, 16),
    "decode": (2, 4, 1, 1, 130, 128, 128),
}
CALLS = {
    "causal": {},
    "full": {"causal": False},
    "behind": {"q_offset": -3},
    "far": {"q_offset": 1000},
    "scaled": {"scale": 0.3},
}


def inputs(shape, generator, dtype=torch.float32):
    batch, heads, kv_heads, q_len, k_len, dim, value_dim = shape
    sizes = (heads, q_len, dim), (kv_heads, k_len, dim), (kv_heads, k_len, value_dim)
    return [torch.randn(batch, *size, generator=generator).to(dtype) for size in sizes]


def through(fn, *tensors, lse_too=True):
    """(out, lse, dq, dk, dv) for fixed random gradients of out and, with `lse_too`, lse."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    out, lse = fn(*leaves, return_lse=True) if fn.func is attend else fn(*leaves)
    seeded = torch.Generator().manual_seed(1)
    dout, dlse = (torch.randn(x.shape, generator=seeded).to(x.dtype) for x in (out, lse))
    total = (out * dout).sum()
    if lse_too:
        total = total + (lse.masked_fill(lse == -torch.inf, 0.0) * dlse).sum()
    return (out, lse, *torch.autograd.grad(total, leaves))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("call", CALLS)
def test_kernel_is_the_reference(shape, call, generator, assert_close):
    tensors = inputs(SHAPES[shape], generator)
    want, got = (through(partial(attend, form=form, **CALLS[call]), *tensors) for form in ("reference", "triton"))
    assert_close(got, want, atol=2e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["all pairs", "keys", "heads"])
def test_a_mask_with_empty_rows(causal, kind, generator, assert_close):
    sizes = {"all pairs": (2, 4, 35, 70), "keys": (2, 1, 1, 70), "heads": (1, 4, 35, 1)}
    mask = torch.rand(sizes[kind], generator=generator) < 0.4
    if kind == "all pairs":
        mask[:, 1, 5:9] = False
    tensors = inputs((2, 4, 2, 35, 70, 24, 24), generator)
    want, got = (
        through(partial(attend, causal=causal, mask=mask, form=form), *tensors) for form in ("reference", "triton")
    )
    assert_close(got, want, atol=2e-5)


def test_without_a_gradient_of_lse_and_with_strides(generator, assert_close):
    tensors = inputs((2, 4, 2, 40, 40, 32, 32), generator)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    want = through(partial(attend, form="reference"), *tensors, lse_too=False)
    assert_close(through(partial(attend, form="triton"), *turned, lse_too=False), want, atol=2e-5)


def test_half_precision_is_no_worse_than_torch(generator):
    tensors = inputs((1, 4, 2, 100, 100, 64, 64), generator, torch.float16)
    truth = through(partial(attend, form="reference"), *(x.double() for x in tensors))
    kernel, torch_form = (through(partial(attend, form=form), *tensors) for form in ("triton", "torch"))
    assert kernel[0].dtype == torch.float16
    assert kernel[1].dtype == torch.float32
    for got, peer, exact in zip(kernel, torch_form, truth, strict=True):
        assert (got - exact).abs().mean() <= 1.5 * (peer - exact).abs().mean() + 1e-6


@pytest.mark.parametrize("shared, causal", [((1, 1), True), ((2, 4), True), ((1, 4), False), ((2, 1), False)])
def test_listed_blocks_are_the_masked_reference(shared, causal, generator, assert_close):
    tensors = inputs((2, 4, 2, 60, 80, 24, 16), generator)
    blocks = torch.rand(*shared, 2, 2, generator=generator) < 0.5
    blocks[..., 0, 1, :] = False
    mask = spread(blocks, 32, 48, 60, 80)
    got = through(partial(block_attend, block_mask=blocks, block_q=32, block_k=48, causal=causal, form="triton"), *tensors)
    assert_close(got, through(partial(attend, causal=causal, mask=mask, form="reference"), *tensors), atol=2e-5)


def test_no_block_at_all(generator):
    tensors = inputs((1, 2, 2, 32, 32, 16, 16), generator)
    blocks = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    out, lse, *grads = through(partial(block_attend, block_mask=blocks, block_q=16, block_k=16, form="triton"), *tensors)
    assert (lse == -torch.inf).all()
    assert all((x == 0).all() for x in (out, *grads))


def test_a_skipped_block_is_not_read(generator):
    q, k, v = inputs((1, 1, 1, 32, 64, 16, 16), generator)
    k[:, :, 16:32], v[:, :, 16:32] = torch.nan, torch.nan
    blocks = torch.tensor([[True, False, True, True], [True, False, True, True]])[None, None]
    out, _ = block_attend(q, k, v, blocks, block_q=16, block_k=16, causal=False, form="triton")
    assert out.isfinite().all()


def test_refusals(generator):
    q, k, v = inputs((1, 1, 1, 8, 8, 512, 512), generator)
    with pytest.raises(ValueError, match=rf"dim 512 with form='triton'; expected at most {KERNEL_DIM}; use form='torch'"):
        attend(q, k, v, form="triton")
    q, k, v = inputs((1, 1, 1, 8, 8, 16, 16), generator)
    with pytest.raises(ValueError, match=r"block_q=8, block_k=16 with form='triton'; expected multiples of 16"):
        block_attend(q, k, v, torch.ones(1, 1, 1, 1, dtype=torch.bool), block_q=8, block_k=16, form="triton")
    with pytest.raises(RuntimeError, match=r"not torch.float64; cast the inputs"):
        attend(q.double(), k.double(), v.double(), form="triton")
