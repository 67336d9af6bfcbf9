"""The tiny mixtures: what they compute, what is shipped, and that the shipped traces are theirs."""

import pytest
import torch
from torch.nn import functional as F

from memlens import data
from memlens.models.tiny import lm_loss
from memlens.models.tiny_moe import SHIPPED, VARIANTS, MoE, Vocabulary, balanced_loss, build, read_vocabulary, tiny_moe
from memlens.routing import record, shipped
from memlens.routing.gate import load_balance


def test_all_experts_with_equal_weight_are_one_dense_feed_forward(generator, assert_close):
    moe, x = MoE(8, experts=4, top_k=4, hidden=6), torch.randn(2, 5, 8, generator=generator)
    torch.nn.init.zeros_(moe.router.weight)
    dense = moe.down(F.silu(moe.gate(x)) * moe.up(x)) / 4
    assert_close(moe(x), dense)


def test_a_shared_expert_is_added_to_every_token(generator, assert_close):
    moe, x = MoE(8, experts=4, top_k=1, hidden=6, shared=1), torch.randn(2, 5, 8, generator=generator)
    with_shared = moe(x)
    shared, moe.shared = moe.shared, None
    assert_close(with_shared - moe(x), shared(x))


def test_the_router_learns_from_the_task_with_one_expert_too(generator):
    for variant in ("base", "share1"):
        model, ids = build(variant, generator=generator), torch.randint(4096, (1, 9), generator=generator)
        lm_loss(model(ids[:, :-1]), ids[:, 1:]).backward()
        assert all(block.ffn.router.weight.grad.abs().max() > 0 for block in model.blocks)


def test_the_loss_adds_the_balance_of_every_layer(generator, assert_close):
    model, ids = build("base", generator=generator), torch.randint(4096, (1, 9), generator=generator)
    plain, pressed = (balanced_loss(weight)(model, ids[:, :-1], ids[:, 1:]) for weight in (0.0, 0.5))
    balance = sum(load_balance(block.ffn.routed[0], block.ffn.routed[1].index) for block in model.blocks)
    assert_close(pressed - plain, 0.5 * balance)


def test_variants_change_one_thing():
    count = {name: sum(p.numel() for p in build(name).parameters()) for name in VARIANTS}
    assert count["base"] == count["nolb"] == count["overlb"] == count["share1"] + 6 * 96  # one router row fewer a layer
    assert [block.ffn.__class__.__name__ for block in build("every2").blocks] == ["SwiGLU", "MoE"] * 3
    assert torch.equal(*(build("base", generator=torch.Generator().manual_seed(5)).head.weight for _ in range(2)))


def test_vocabulary_there_and_back():
    vocab = Vocabulary(torch.tensor([3, 10, 11]))
    assert vocab.encode(torch.tensor([[10, 3], [4, 99]])).tolist() == [[1, 0], [3, 3]]
    assert vocab.decode(torch.tensor([1, 0, 3]), unknown=7).tolist() == [10, 3, 7]
    with pytest.raises(ValueError, match="decode"):
        vocab.decode(torch.tensor([4]))
    with pytest.raises(ValueError, match="4095 increasing"):
        read_vocabulary("1\n2\n")


@pytest.mark.parametrize("variant", SHIPPED)
def test_what_is_shipped(variant):
    model, vocab = tiny_moe(variant)
    trace = shipped(variant)
    assert not model.training
    assert len(vocab.ids) == 4095
    assert all(bool(weight.isfinite().all()) for weight in model.parameters())
    assert (trace.num_experts, trace.top_k) == (VARIANTS[variant].experts, VARIANTS[variant].top_k)
    assert trace.experts.shape[:3] == (32, 256, 6)


def test_refusals():
    with pytest.raises(ValueError, match="did you mean 'overlb'"):
        tiny_moe("overld")
    with pytest.raises(FileNotFoundError, match=r"make\.py every2"):
        tiny_moe("every2")
    with pytest.raises(ValueError, match="shipped"):
        shipped("mixtral")


@pytest.mark.model
@pytest.mark.parametrize("variant", SHIPPED)
def test_the_shipped_trace_is_the_models(variant, smollm2):
    model, vocab = tiny_moe(variant)
    ids = vocab.encode(data.text("tempest", start=1_000, length=256, tokenizer=smollm2[1]))
    trace = record(model, ids, keep=())
    assert (trace.experts[0] == shipped(variant).experts[0]).double().mean() > 0.99
    with torch.no_grad():
        assert lm_loss(model(ids)[:, :-1], ids[:, 1:]) < 5.5  # 8.3 for a guess among 4,096
