"""The cache on a real model: equal to dense attention under the same mask at every step, and the bytes it says."""

from functools import cache as cached

import pytest
import torch
from kv_presets import DRAWN, MERGING, ONCE, PRESETS

from memlens.data import text
from memlens.kv.cache import PolicyCache, compress, continue_with, prefill
from memlens.kv.merge import log_counts
from memlens.kv.policies import h2o, locret, snapkv
from memlens.models.hooks import use_attention
from memlens.tasks.locret_studies import load_heads

pytestmark = pytest.mark.model
PROMPT, STEPS, BUDGET = 72, 5, 24


@pytest.fixture(scope="module")
def ids(smollm2):
    return text("areopagitica", start=2000, length=PROMPT + STEPS, tokenizer=smollm2[1])


@pytest.mark.parametrize("policy", [h2o(12, 12), snapkv(BUDGET, window=8)], ids=lambda p: p.name)
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


# --- every policy, on one prompt that is read once -----------------------------------------------------------------

LENGTHS = (40, 33, 30, 27)  # of a padded batch; all hold more than the budget


@pytest.fixture(scope="module")
def filled(smollm2, ids):
    return prefill(smollm2[0], ids[:, :PROMPT], keep_queries=True)


@pytest.fixture(scope="module")
def batch(smollm2):
    """Four prompts read alone, and the same four in a batch with padding on the left: (rows, ids, mask, singles, together)."""
    model, tokenizer = smollm2
    rows = [text("hamlet", start=100 * n, length=n, tokenizer=tokenizer) for n in LENGTHS]
    ids = torch.cat([torch.nn.functional.pad(row, (LENGTHS[0] - row.shape[1], 0)) for row in rows])
    mask = torch.tensor([[0] * (LENGTHS[0] - n) + [1] * n for n in LENGTHS])
    alone = [prefill(model, row, keep_queries=True) for row in rows]
    return rows, ids, mask, alone, prefill(model, ids, mask=mask, keep_queries=True)


@cached
def heads_of(model):
    return load_heads(model)


def preset(name, model, budget=BUDGET):
    if name == "locret":  # with the heads that were trained for this model
        return locret(heads_of(model), budget, stabilizers=2)
    return PRESETS[name](budget)


def held_by(policy, model, filled, ids, mask=None):
    """As `compress`, or by a prefill of its own where the policy needs the logits."""
    return prefill(model, ids, policy, mask=mask).cache if policy.hears else compress(filled, policy)


@pytest.mark.parametrize("name", sorted(set(PRESETS) - MERGING))
def test_every_policy_is_dense_attention_under_its_mask(name, smollm2, ids, filled, dense):
    model, policy = smollm2[0], preset(name, smollm2[0])._replace(rolling=False)
    cache = held_by(policy, model, filled, ids[:, :PROMPT])
    assert cache.held == [BUDGET] * 30
    got, want = dense(model, cache, [ids[:, :PROMPT], *ids[:, PROMPT : PROMPT + 2].split(1, 1)])
    want = want[:, PROMPT:]
    torch.testing.assert_close(got.softmax(-1), want.softmax(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("name", sorted(MERGING))
def test_every_merging_policy_is_dense_attention_over_its_merged_keys(name, smollm2, ids, filled):
    model, policy = smollm2[0], preset(name, smollm2[0])
    cache, lost = compress(filled, policy), compress(filled, policy._replace(merge=None))
    assert float((cache.layers[3].values - lost.layers[3].values).abs().max()) > 1e-3
    for at in range(PROMPT, PROMPT + 2):
        before = cache.fork()

        def over_held(layer, q, k, v, offset, held=before):
            k, v = torch.cat((held.layers[layer].keys, k), 2), torch.cat((held.layers[layer].values, v), 2)
            bias = log_counts(held.state[layer].stream, 1, q.shape[1])
            score = q @ k.repeat_interleave(3, 1).transpose(-1, -2) * q.shape[-1] ** -0.5
            return (score if bias is None else score + bias).softmax(-1) @ v.repeat_interleave(3, 1)

        got = continue_with(model, cache, ids[:, at : at + 1])
        with use_attention(model, over_held), torch.no_grad():
            want = model(ids[:, at : at + 1], position_ids=torch.tensor([[at]]), use_cache=False).logits
        torch.testing.assert_close(got.softmax(-1), want.softmax(-1), rtol=0, atol=1e-5)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("name", sorted(set(PRESETS) - DRAWN))
def test_a_padded_batch_of_four_is_four_singles(name, smollm2, batch):
    model, (rows, ids, mask, alone, together) = smollm2[0], batch
    policy, step = preset(name, model), torch.tensor([[9], [28], [260], [1000]])
    cache = held_by(policy, model, together, ids, mask)
    got = continue_with(model, cache, step, mask=torch.cat((mask, torch.ones_like(step)), 1))
    for row, one in enumerate(rows):
        single = held_by(policy, model, alone[row], one)
        want = continue_with(model, single, step[row : row + 1])
        assert single.held == cache.held == [BUDGET + (name in ONCE)] * 30
        # the same sums in another order, and a pick between two scores that are equal but for it
        torch.testing.assert_close(got[row : row + 1].softmax(-1), want.softmax(-1), rtol=0, atol=1e-4)
        assert int(got[row, -1].argmax()) == int(want[0, -1].argmax())
