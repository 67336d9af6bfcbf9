"""The router's formulas against transformers' router, a dense computation, and their limits."""

import pytest
import torch
from torch.nn import functional as F

from memlens.routing.gate import Gate, load_balance, mix_experts, top_experts, topk_gate


def test_ties_go_to_the_lower_expert():
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]])
    assert top_experts(scores, 4).tolist() == [[1, 2, 4, 3]]


def test_the_gate_is_the_router_of_mixtral(generator, assert_close):
    transformers = pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    config = transformers.MixtralConfig(hidden_size=12, num_local_experts=6, num_experts_per_tok=3)
    router = MixtralTopKRouter(config)
    torch.nn.init.normal_(router.weight, generator=generator)
    logits, weight, index = router(torch.randn(20, 12, generator=generator))
    got = topk_gate(logits, 3)
    assert torch.equal(got.index, index)
    assert_close(got.weight, weight)


def test_raw_weights_are_the_softmax_and_carry_a_gradient_at_k_one(generator, assert_close):
    logits = torch.randn(5, 4, generator=generator, requires_grad=True)
    raw, renormalized = topk_gate(logits, 1, renormalize=False), topk_gate(logits, 1)
    assert_close(raw.weight, logits.softmax(-1).amax(-1, keepdim=True))
    assert_close(renormalized.weight, torch.ones(5, 1))
    assert torch.autograd.grad(raw.weight.sum(), logits)[0].abs().max() > 0.01
    assert torch.autograd.grad(renormalized.weight.sum(), logits)[0].abs().max() < 1e-6


def test_load_balance_is_one_when_even_and_E_when_collapsed(assert_close):
    even = torch.full((8, 4), 0.25)
    assert_close(load_balance(even, torch.arange(8)[:, None] % 4), torch.tensor(1.0))
    one = F.one_hot(torch.zeros(8, dtype=torch.long), 4).float()
    assert_close(load_balance(one, torch.zeros(8, 1, dtype=torch.long)), torch.tensor(4.0))


def test_load_balance_pushes_the_crowded_expert_down():
    logits = torch.tensor([[2.0, 0.0, -1.0]]).repeat(6, 1).requires_grad_()
    load_balance(logits.softmax(-1), top_experts(logits, 1)).backward()
    assert (logits.grad[:, 0] > 0).all()  # a descent step lowers it
    assert (logits.grad[:, 1:] < 0).all()


def dense_mixture(x, gate, w_gate, w_up, w_down):
    every = torch.einsum(
        "edh,teh->ted", w_down, F.silu(torch.einsum("ehd,td->teh", w_gate, x)) * torch.einsum("ehd,td->teh", w_up, x)
    )
    return (gate.weight[..., None] * every.gather(1, gate.index[..., None].expand(-1, -1, x.shape[1]))).sum(1)


@pytest.mark.parametrize("tokens", [0, 1, 13])
def test_mix_experts_is_the_weighted_sum_and_so_are_its_gradients(tokens, generator, assert_close):
    shapes = [(tokens, 5), (tokens, 4), (4, 6, 5), (4, 6, 5), (4, 5, 6)]
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    x, logits, *weights = leaves
    want = dense_mixture(x, topk_gate(logits, 2), *weights)
    got = mix_experts(x, topk_gate(logits, 2), *weights)
    assert_close(got, want)
    probe = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    assert_close(torch.autograd.grad(got, leaves, probe), torch.autograd.grad(want, leaves, probe))


def test_refusals(generator):
    x, w = torch.randn(3, 4), torch.randn(2, 5, 4)
    with pytest.raises(ValueError, match="k=5"):
        topk_gate(x, 5)
    with pytest.raises(ValueError, match="NaN"):
        topk_gate(x * float("nan"), 1)
    with pytest.raises(ValueError, match="leading axes"):
        load_balance(x, torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="index=4"):
        load_balance(x, torch.full((3, 1), 4))
    with pytest.raises(ValueError, match="mix_experts: index=2"):
        mix_experts(x, Gate(torch.ones(3, 1), torch.full((3, 1), 2)), w, w, w.transpose(1, 2))
