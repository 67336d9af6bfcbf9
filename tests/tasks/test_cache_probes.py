"""The cache probes: zero without loss, growing with it, and questions whose answers the model can find."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memlens.kv.cache import prefill
from memlens.kv.policies import full, h2o, snapkv, streaming
from memlens.tasks.cache_probes import (
    ask_codes,
    code_lookup,
    copy_recall,
    kl_divergence,
    natural_kl,
    sparsity,
    stream_kl,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, intermediate_size=48,
        vocab_size=61, max_position_embeddings=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(12.0)
    return model


def test_kl_by_hand():
    full_, other = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    assert float(kl_divergence(full_, other)) == pytest.approx(0.5 * torch.tensor(4 / 3).log().item())
    assert float(kl_divergence(full_, full_ + 3.0)) == pytest.approx(0.0, abs=1e-6)  # a shift of all logits is nothing


def test_nothing_lost_is_zero_and_less_kept_is_more(model, generator):
    ids = torch.randint(0, 61, (1, 60), generator=generator)
    policies = {"full": full(), "all": h2o(50, 50), "30": streaming(30), "6": streaming(6)}
    kl = natural_kl(model, ids, 50, policies)
    assert kl.dims == ("method", "token")
    assert kl.token.values.tolist() == list(range(50, 60))
    means = [float(kl.sel({"method": name}).mean()) for name in policies]
    assert means[0] < 1e-6
    assert means[1] < 1e-6
    assert 1e-5 < means[2] < means[3]
    streamed = stream_kl(model, ids, {"all": h2o(30, 30), "6": streaming(6)}, chunk=7, start=20)
    assert streamed.sizes["token"] == 40
    assert float(streamed[0].mean()) < 1e-6 < float(streamed[1].mean())


def test_copy_recall_scores_the_span(model, generator):
    passage = torch.randint(0, 61, (1, 40), generator=generator)
    got = copy_recall(model, passage, 10, lead=5, score=8)
    with torch.no_grad():
        logits = model(torch.cat((passage, passage[:, 10:23]), 1)).logits[0, 40 + 4 : 40 + 12]
    want = torch.nn.functional.cross_entropy(logits, passage[0, 15:23], reduction="none")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="start within"):
        copy_recall(model, passage, 30, lead=5, score=8)


def test_sparsity_is_that_of_the_softmax(model, generator):
    filled = prefill(model, torch.randint(0, 61, (1, 30), generator=generator), keep_queries=True)
    got = sparsity(filled, below=0.1, top=0.2)
    q, k = filled.queries[1], filled.cache.layers[1].keys.repeat_interleave(2, 1)
    seen = torch.ones(30, 30, dtype=torch.bool).tril()
    p = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    low = ((p < 0.1 * p.amax(-1, keepdim=True)) & seen).sum() / (4 * seen.sum())
    assert float(got.quiet[1]) == pytest.approx(float(low), abs=2e-3)
    assert float(got.top_share[1]) == pytest.approx(float(p.sum(-2).topk(6).values.sum() / 120), rel=1e-4)


def test_probes_refuse_what_they_cannot_score(model):
    ids = torch.zeros(1, 10, dtype=torch.int64)
    with pytest.raises(ValueError, match="prompt within"):
        natural_kl(model, ids, 10, {"full": full()})
    with pytest.raises(ValueError, match="policies >= 1"):
        natural_kl(model, ids, 5, {})


@pytest.mark.model
def test_code_lookup_asks_for_lines_of_its_context(smollm2):
    _, tokenizer = smollm2
    one, two = (code_lookup(tokenizer, items=6, questions=4, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    lines = tokenizer.decode(one.context[0]).strip().split("\n")
    assert len({line.split()[3] for line in lines}) == 6
    for question, digits, line in zip(one.questions, one.digits, one.line.tolist(), strict=True):
        assert tokenizer.decode(question) + tokenizer.decode(digits) + "." == lines[line]
    with pytest.raises(ValueError, match="items within"):
        code_lookup(tokenizer, items=100, generator=torch.Generator())


@pytest.mark.model
def test_the_model_finds_codes_and_a_batch_of_questions_equals_one_by_one(smollm2):
    model, tokenizer = smollm2
    lookup = code_lookup(tokenizer, items=6, questions=3, generator=torch.Generator().manual_seed(3))
    full_ = ask_codes(model, lookup)
    assert float(full_.right.mean()) >= 0.5
    some = ask_codes(model, lookup, lambda length: snapkv(length // 3, window=8))
    for row in range(3):
        single = lookup._replace(**{name: getattr(lookup, name)[row : row + 1] for name in ("questions", "digits", "line")})
        alone = ask_codes(model, single, lambda length: snapkv(length // 3, window=8))
        torch.testing.assert_close(
            torch.tensor(alone.nll.values[0]), torch.tensor(some.nll.values[row]), rtol=1e-3, atol=1e-3
        )
    late = ask_codes(model, lookup, lambda length: streaming(6), question_seen=False)
    assert float(late.nll.mean()) > float(full_.nll.mean()) + 0.5  # the lines are gone
    assert int(some.held) < int(full_.held)
