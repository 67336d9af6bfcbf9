"""The cache on a real model: equal to dense attention under the same mask at every step, and the bytes it says."""

import pytest
import torch

from memlens.data import text
from memlens.kv.cache import PolicyCache, prefill
from memlens.kv.policies import h2o, snapkv, streaming

pytestmark = pytest.mark.model
PROMPT, STEPS, BUDGET = 72, 5, 24


@pytest.fixture(scope="module")
def ids(smollm2):
    return text("areopagitica", start=2000, length=PROMPT + STEPS, tokenizer=smollm2[1])


@pytest.mark.parametrize("policy", [h2o(12, 12), snapkv(BUDGET, window=8), streaming(BUDGET)], ids=lambda p: p.name)
def test_an_evicted_cache_is_dense_attention_under_the_same_mask(policy, smollm2, ids, dense):
    model, _ = smollm2
    parts = [ids[:, :PROMPT], *ids[:, PROMPT:].split(1, 1)]
    got, want = dense(model, PolicyCache(model.config, policy), parts)
    # 1e-5 of the probabilities: the logits reach 30, where float32 itself is coarser than that
    torch.testing.assert_close(got.softmax(-1), want.softmax(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-4)
    with torch.no_grad():
        plain = model(ids).logits
    assert float((want - plain)[:, PROMPT:].abs().max()) > 0.1


def test_a_full_budget_changes_nothing(smollm2, ids):
    model, _ = smollm2
    with torch.no_grad():
        want = model(ids[:, :PROMPT]).logits[:, -1]
    for policy in (h2o(PROMPT, 0), snapkv(PROMPT, window=8)):
        torch.testing.assert_close(prefill(model, ids[:, :PROMPT], policy).logits, want, rtol=1e-5, atol=1e-4)


def test_the_bytes_of_a_real_cache(smollm2, ids):
    model, _ = smollm2
    _, cache, _ = prefill(model, ids[:, :PROMPT], h2o(12, 12))
    assert cache.nbytes() == {
        "payload": 30 * 3 * 24 * 2 * 64 * 4,
        "positions": 30 * 3 * 24 * 4,
        "scores": 30 * 3 * 24 * 4,
        "memory": 0,
    }


def test_generate_is_the_manual_loop(smollm2, ids):
    from memlens.kv.cache import continue_with

    model, _ = smollm2
    cache = PolicyCache(model.config, h2o(12, 12))
    with cache.on(model):
        made = model.generate(
            ids, past_key_values=cache, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )
    logits, loop, _ = prefill(model, ids, h2o(12, 12))
    for token in made[0, ids.shape[1] :]:
        assert int(logits[0].argmax()) == int(token)
        logits = continue_with(model, loop, token.view(1, 1))[:, -1]
