"""The experiments on adapters, on a small random model: masked means the base's prompt, training learns, the toy obeys."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memlens.kv.cache import prefill
from memlens.optim.peft import Adapter, Pair
from memlens.tasks import edge_studies as studies


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=48, vocab_size=61)).eval()


@pytest.fixture
def data(generator):
    ids = torch.randint(1, 61, (4, 10), generator=generator)
    return [studies.Batch(ids, torch.tensor([5, 6, 5, 6]), torch.tensor([10, 9, 8, 10]))]


def loud(model):
    adapter = studies.start(model)
    return Adapter({n: Pair(p.a.detach(), torch.ones_like(p.b) * 0.1) for n, p in adapter.pairs.items()}, adapter.scale)


def test_training_lowers_the_loss_and_leaves_the_model_alone(model, data):
    before = [p.clone() for p in model.parameters()]
    for masked in (True, False):
        losses = studies.train_steps(model, studies.start(model), data * 60, masked=masked)
        assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_only_the_answers_tokens_count(data):
    batch = data[0]
    logits = torch.zeros(4, 9, 61)
    nll, _ = studies.answer_nll(logits, batch)
    assert float(nll) == pytest.approx(torch.tensor(61.0).log().item())
    spoiled = logits.clone()
    spoiled[0, :4], spoiled[2, 7:] = 50 * torch.randn(4, 61), 9.0 * torch.randn(2, 61)  # inside the prompt, after the end
    assert float(studies.answer_nll(spoiled, batch)[0]) == pytest.approx(float(nll))
    spoiled[0, 4, batch.ids[0, 5]] = 99.0  # the last prompt token predicts the answer's first
    assert float(studies.answer_nll(spoiled, batch)[0]) < float(nll) - 0.1


def test_a_masked_prompt_is_the_bases_and_an_adapted_one_is_not(model, data):
    adapter = loud(model)
    assert studies.prompt_difference(model, adapter, data[0].ids[:1]) == 0
    assert studies.score(model, adapter, data, prompt="base") != studies.score(model, adapter, data, prompt="adapter")


def test_a_switch_reads_one_token_and_gives_what_one_pass_gives(model, data, assert_close):
    from memlens.optim.peft import lora, response_mask

    ids, adapter = data[0].ids[:1], loud(model)
    cache = prefill(model, ids[:, :-1]).cache
    got = studies.switch(model, adapter, cache, ids[:, -1:])
    assert studies.tokens_read(model, lambda: studies.switch(model, adapter, cache, ids[:, -1:])) == 1
    with torch.no_grad(), lora(model, adapter, mask=response_mask(torch.tensor([10]), 10)):
        assert_close(got, model(ids).logits[:, -1], atol=1e-4)


@pytest.mark.parametrize("budget", [1500, 3000])
def test_the_barrier_pulls_lengths_under_the_budget(budget, generator):
    lengths, before, after = studies.length_policy(budget, generator=generator)
    assert float(lengths @ before) > 1.2 * budget
    assert float(after[lengths > 1.2 * budget].sum()) < 0.05
    assert float(after.sum()) == pytest.approx(1)
