"""What the attention tests share: random inputs, and outputs with the gradient of every input through out and lse."""

import pytest
import torch


@pytest.fixture
def qkv(generator):
    """`qkv(B, H, Hkv, Tq, Tk, D)`: random q, k, v; Dv defaults to D."""

    def make(batch, heads, kv_heads, q_len, k_len, dim, value_dim=None, *, dtype=torch.float32):
        shapes = (heads, q_len, dim), (kv_heads, k_len, dim), (kv_heads, k_len, value_dim or dim)
        return [torch.randn(batch, *shape, generator=generator).to(dtype) for shape in shapes]

    return make


@pytest.fixture
def through():
    """`through(fn, *inputs)`: (out, lse, gradient of each input) for fixed random gradients of out and lse."""

    def run(fn, *inputs):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out, lse = fn(*leaves)
        seeded = torch.Generator().manual_seed(1)
        dout, dlse = (torch.randn(x.shape, generator=seeded).to(x.dtype) for x in (out, lse))
        total = (out * dout).sum() + (lse.masked_fill(lse == -torch.inf, 0.0) * dlse).sum()
        return (out, lse, *torch.autograd.grad(total, leaves))

    return run
