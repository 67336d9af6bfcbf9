"""Traces against what transformers reports, and the split of a dense feed-forward against the feed-forward itself."""

import pytest
import torch

from memlens.models.tiny import SwiGLU
from memlens.models.tiny_moe import build
from memlens.routing.oracle import balanced_kmeans, moefy
from memlens.routing.trace import RoutingTrace, check_trace, find_routers, join, record, reroute

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
         "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 64}  # fmt: skip
FAMILIES = {
    "Mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "Olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "Qwen2Moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    },
    "Qwen3Moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
}


def a_trace(generator, batch=2, tokens=9, layers=3, experts=8, k=2, labels=()):
    chosen = torch.rand(batch, tokens, layers, experts, generator=generator).argsort(-1)[..., :k]
    return RoutingTrace(chosen, None, None, experts, k, tuple(range(layers)), labels)


@pytest.mark.parametrize("family", FAMILIES)
def test_record_finds_the_routers_of_transformers(family, generator, assert_close):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(**SMALL, **FAMILIES[family])
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    ids = torch.randint(50, (2, 7), generator=generator)
    trace = record(model, ids)
    want = torch.stack(model(ids, output_router_logits=True).router_logits, 1).view(2, 7, 3, 6)
    assert trace.layers == (0, 1, 2)
    assert (trace.num_experts, trace.top_k) == (6, 2)
    assert_close(trace.logits, want.detach())
    assert torch.equal(trace.experts, want.topk(2).indices)


def test_record_reads_our_own_mixture_and_takes_its_hooks_off(generator, assert_close):
    model = build("base", generator=generator)
    ids = torch.randint(4096, (2, 5), generator=generator)
    before = model(ids)
    trace = record(model, ids, labels=("plays", "code"))
    assert trace.experts.shape == (2, 5, 6, 2)
    routers = torch.stack([block.ffn.router.weight for block in model.blocks])
    assert_close(torch.einsum("btld,led->btle", trace.gate_in, routers), trace.logits)
    assert torch.equal(trace.logits.topk(2).indices, trace.experts)
    assert not any(module._forward_hooks for module in model.modules())
    assert_close(model(ids), before)


def test_layers_without_a_mixture_are_left_out(generator):
    model = build("every2", generator=generator)
    assert list(find_routers(model)) == ["blocks.1.ffn.router", "blocks.3.ffn.router", "blocks.5.ffn.router"]
    assert record(model, torch.zeros(1, 4, dtype=torch.long), keep=()).layers == (1, 3, 5)


def test_hooks_come_off_when_the_forward_fails(generator):
    model = build("base", generator=generator)
    with pytest.raises(IndexError):
        record(model, torch.full((1, 4), 5000))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("split", ["kmeans", "random"])
def test_all_experts_together_are_the_dense_feed_forward(split, generator, assert_close):
    mlp, x = SwiGLU(12, 48), torch.randn(7, 12, generator=generator)
    experts, router = moefy(mlp, 6, 6, split=split, generator=generator)
    assert torch.equal(experts.neurons.flatten().sort().values, torch.arange(48))
    assert_close(experts(x, router(x)[1]), mlp(x).detach(), rtol=0, atol=1e-5)


def test_the_oracle_scores_are_the_energy_and_pick_the_best_experts(generator, assert_close):
    mlp, x = SwiGLU(12, 48), torch.randn(7, 12, generator=generator)
    experts, router = moefy(mlp, 6, 2, split="random", generator=generator)
    hidden = torch.nn.functional.silu(mlp.gate(x)) * mlp.up(x)
    written = hidden[:, None] * mlp.down.weight  # (token, dim, neuron)
    energy = torch.stack([written[..., neurons].square().sum((1, 2)) for neurons in experts.neurons], 1)
    scores, chosen = router(x)
    assert_close(scores, energy.detach())
    assert torch.equal(chosen, energy.topk(2).indices)


def test_record_watches_a_dense_model_through_oracle_routers(generator, assert_close):
    model = build("dense_first", generator=generator)
    _, router = moefy(model.blocks[0].ffn, 8, 3, generator=generator)
    ids = torch.randint(4096, (2, 5), generator=generator)
    trace = record(model, ids, router={"blocks.0.ffn": router})
    scores, chosen = router(trace.gate_in[:, :, 0].flatten(0, 1))
    assert trace.layers == (0,)
    assert_close(trace.logits.flatten(0, 2), scores)
    assert torch.equal(trace.experts.flatten(0, 2), chosen)


def test_balanced_kmeans_finds_separate_groups(generator):
    means = torch.eye(4) * 10
    rows = means.repeat_interleave(5, 0)[torch.randperm(20, generator=generator)] + 0.1 * torch.randn(
        20, 4, generator=generator
    )
    groups = balanced_kmeans(rows, 4, generator=torch.Generator().manual_seed(1))
    kinds = rows.argmax(1)[groups]
    assert (kinds == kinds[:, :1]).all()


def test_rerouting_is_recording_with_the_other_router(generator, assert_close):
    model = build("dense_first", generator=generator)
    one, other = (moefy(model.blocks[0].ffn, 8, k, generator=generator)[1] for k in (3, 2))
    ids = torch.randint(4096, (2, 5), generator=generator)
    trace, want = (record(model, ids, router={"blocks.0.ffn": router}) for router in (one, other))
    got = reroute(trace, [other])
    assert torch.equal(got.experts, want.experts)
    assert_close(got.logits, want.logits)
    assert got.top_k == 2
    with pytest.raises(ValueError, match="reroute: 2 routers"):
        reroute(trace, [one, other])


def test_xarray_and_back(generator):
    trace = a_trace(generator, labels=("a", "b"))._replace(logits=torch.randn(2, 9, 3, 8, generator=generator))
    back = RoutingTrace.from_xarray(trace.to_xarray())
    assert torch.equal(back.experts, trace.experts)
    assert torch.equal(back.logits, trace.logits)
    assert back[2:] == trace[2:]


def test_cut_join_and_label(generator):
    one, two = (a_trace(generator, labels=(name,) * 2) for name in ("a", "b"))
    both = join([one.tokens(4), two.tokens(4)])
    assert both.experts.shape == (4, 5, 3, 2)
    assert both.labels == ("a", "a", "b", "b")
    assert torch.equal(both.experts[2:], two.experts[:, 4:])
    data = both.to_xarray()
    assert data.experts.dims == ("sample", "token", "layer", "choice")
    assert data.dataset.values.tolist() == ["a", "a", "b", "b"]


def test_refusals(generator):
    trace = a_trace(generator)
    with pytest.raises(ValueError, match="num_experts|experts spans"):
        check_trace("t", trace._replace(num_experts=4))
    with pytest.raises(ValueError, match="sample 0, token 0 has an expert twice"):
        check_trace("t", trace._replace(experts=torch.zeros_like(trace.experts)))
    with pytest.raises(ValueError, match="1 labels"):
        check_trace("t", trace._replace(labels=("a",)))
    with pytest.raises(ValueError, match="different"):
        join([trace, trace.tokens(2)])
    with pytest.raises(ValueError, match="no router in SwiGLU"):
        record(SwiGLU(4), torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="keep"):
        record(build("base"), torch.zeros(1, 2, dtype=torch.long), keep=("gates",))
    with pytest.raises(ValueError, match="neurons=48 is no multiple"):
        moefy(SwiGLU(12, 48), 7, 2, generator=generator)
    with pytest.raises(ValueError, match="without gate, up and down"):
        moefy(torch.nn.Linear(3, 3), 2, 1, generator=generator)
    odd = SwiGLU(12, 48)
    odd.act_fn = torch.relu
    with pytest.raises(ValueError, match="another activation"):
        moefy(odd, 4, 1, generator=generator)
