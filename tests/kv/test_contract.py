"""What every policy promises inside a model: exact when it keeps all, exact budgets, repeatable, equal to dense masking."""

import pytest
import torch
from kv_presets import DRAWN, MERGING, MODELS, ONCE, PRESETS, ROLLING, full, prompt, tiny

from memlens.kv.cache import PolicyCache, compress, continue_with, prefill, stream_eval

LENGTH, BUDGET = 23, 9


def plain(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("name", PRESETS)
def test_a_full_budget_changes_nothing(name, model, assert_close):
    ids = prompt(LENGTH + 6, rows=2)
    logits, cache, _ = prefill(model, ids[:, :LENGTH], PRESETS[name](LENGTH + 6))
    rest = [continue_with(model, cache, ids[:, i : i + 1]) for i in range(LENGTH, LENGTH + 6)]
    assert_close(torch.cat((logits[:, None], *rest), 1), plain(model, ids)[:, LENGTH - 1 :])
    assert cache.held == [LENGTH + 6] * 3


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("chunk", [None, 4])
def test_the_budget_is_exact_after_every_step(name, chunk, llama):
    ids = prompt(LENGTH + 4)
    _, cache, _ = prefill(llama, ids[:, :LENGTH], PRESETS[name](BUDGET), chunk)
    assert cache.held == [BUDGET] * 3
    for i in range(LENGTH, LENGTH + 4):
        continue_with(llama, cache, ids[:, i : i + 1])
        grown = BUDGET + (i + 1 - LENGTH if name in ONCE else 0)
        assert cache.held == [grown] * 3
        assert cache.get_seq_length() == i + 1
        for layer in range(3):
            kept = cache.positions(layer)
            assert kept.shape == (1, 2, grown)
            assert bool((kept.diff(dim=-1) > 0).all())
            assert int(kept.max()) <= i


@pytest.mark.parametrize("name", PRESETS)
def test_protected_tokens_are_never_lost(name, llama):
    policy = PRESETS[name](BUDGET)
    _, cache, _ = prefill(llama, prompt(LENGTH), policy)
    wanted = {*range(policy.first), *range(LENGTH - policy.recent(BUDGET), LENGTH)}
    for layer in range(3):
        for head in cache.positions(layer)[0]:
            assert wanted <= set(head.tolist())


@pytest.mark.parametrize("name", sorted(set(PRESETS) - ROLLING))
def test_an_evicted_cache_is_dense_attention_under_the_same_mask(name, model, dense, assert_close):
    ids = prompt(LENGTH + 5, rows=2)
    parts = [ids[:, :LENGTH], *ids[:, LENGTH:].split(1, 1)]
    policy = PRESETS[name](BUDGET)._replace(merge=None)  # what a merge changes: tests/kv/test_merge.py
    got, want = dense(model, PolicyCache(model.config, policy), parts)
    assert_close(got, want)
    assert float((want - plain(model, ids))[:, LENGTH:].abs().max()) > 1e-3  # the mask did take something away


@pytest.mark.parametrize("name", sorted(MERGING))
def test_merging_changes_what_is_held_and_not_which_tokens(name, llama):
    ids, policy = prompt(LENGTH), PRESETS[name](BUDGET)
    merged, evicted = (prefill(llama, ids, p).cache for p in (policy, policy._replace(merge=None)))
    assert merged.held == evicted.held == [BUDGET] * 3
    assert torch.equal(merged.positions(0), evicted.positions(0))
    assert float((merged.layers[0].values - evicted.layers[0].values).abs().max()) > 1e-3
    moved = float((merged.layers[0].keys - evicted.layers[0].keys).abs().max())
    assert moved == 0 if policy.merge.keys == "none" else moved > 1e-3


@pytest.mark.parametrize("name", PRESETS)
def test_a_run_repeats(name, llama):
    ids = prompt(LENGTH)
    one, two = (stream_eval(llama, ids, PRESETS[name](BUDGET), 3) for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize("name", PRESETS)
def test_chunks_equal_one_forward_while_nothing_is_evicted(name, llama, assert_close):
    ids = prompt(LENGTH)
    logits, whole, _ = prefill(llama, ids, PRESETS[name](LENGTH + 1))
    again, parts, _ = prefill(llama, ids, PRESETS[name](LENGTH + 1), chunk=5)
    assert_close(again, logits)
    for one, two in zip(whole.state, parts.state, strict=True):
        if name not in DRAWN:  # draws come block by block
            assert_close(two.stream.score, one.stream.score)
        assert torch.equal(two.stream.pos, one.stream.pos)


@pytest.mark.parametrize("name", sorted(ONCE))
def test_a_prompt_in_chunks_is_compressed_like_one_forward(name, llama, assert_close):
    ids = prompt(LENGTH)
    _, whole, _ = prefill(llama, ids, PRESETS[name](BUDGET))
    _, parts, _ = prefill(llama, ids, PRESETS[name](BUDGET), chunk=4)
    for layer in range(3):
        assert torch.equal(whole.positions(layer), parts.positions(layer))
        assert_close(parts.layers[layer].keys, whole.layers[layer].keys)


@pytest.mark.parametrize("name", PRESETS)
def test_compress_equals_prefill_under_the_policy(name, model, assert_close):
    ids = prompt(LENGTH, rows=2)
    direct = prefill(model, ids, PRESETS[name](BUDGET)).cache
    if direct.policy.hears:
        with pytest.raises(ValueError, match="needs the logits"):
            compress(prefill(model, ids, keep_queries=True), direct.policy)
        pytest.skip("refused: this policy needs the logits, which a prefill without it has not kept")
    late = compress(prefill(model, ids, keep_queries=True), PRESETS[name](BUDGET))
    assert late.held == direct.held
    for layer in range(3):
        assert torch.equal(late.positions(layer), direct.positions(layer))
    assert_close(continue_with(model, late, prompt(3, 2)), continue_with(model, direct, prompt(3, 2)))


@pytest.mark.parametrize("name", PRESETS)
def test_a_padded_batch_equals_its_rows_alone(name, model, assert_close):
    lengths = (LENGTH, LENGTH - 5, LENGTH - 11, LENGTH - 15)  # the last holds fewer tokens than the budget
    rows = [prompt(n, seed=n) for n in lengths]
    ids = torch.cat([torch.nn.functional.pad(row, (LENGTH - row.shape[1], 0)) for row in rows])
    mask = torch.tensor([[0] * (LENGTH - n) + [1] * n for n in lengths])
    steps = prompt(4, rows=4)
    logits, cache, _ = prefill(model, ids, PRESETS[name](BUDGET), mask=mask)
    got = [logits[:, None]]
    for i in range(4):
        mask = torch.cat((mask, torch.ones(4, 1, dtype=mask.dtype)), 1)
        got.append(continue_with(model, cache, steps[:, i : i + 1], mask=mask))
    for row, alone in enumerate(rows):
        if name in DRAWN:
            continue  # each row of a batch has draws of its own
        logits, single, _ = prefill(model, alone, PRESETS[name](BUDGET))
        want = [logits[:, None]] + [continue_with(model, single, steps[row : row + 1, i : i + 1]) for i in range(4)]
        assert_close(torch.cat(got, 1)[row : row + 1], torch.cat(want, 1), rtol=1e-4, atol=1e-4)
    real = (cache.positions(0) >= 0).sum(-1)
    growth = 4 if name in ONCE else 0
    assert real[0].tolist() == [BUDGET + growth] * 2


@pytest.mark.parametrize("name", PRESETS)
def test_generate_is_the_manual_loop(name, model):
    ids = prompt(LENGTH)
    cache = PolicyCache(model.config, PRESETS[name](BUDGET))
    with cache.on(model):
        made = model.generate(
            ids, past_key_values=cache, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids)
        )
    logits, cache, _ = prefill(model, ids, PRESETS[name](BUDGET))
    loop = [logits.argmax(-1)]
    while len(loop) < 8:
        loop.append(continue_with(model, cache, loop[-1][:, None])[:, -1].argmax(-1))
    assert made[0, LENGTH:].tolist() == [int(token) for token in loop]


def test_generate_serves_a_padded_batch():
    model, lengths = tiny(), (LENGTH, LENGTH - 6)
    rows = [prompt(n, seed=n) for n in lengths]
    ids = torch.cat([torch.nn.functional.pad(row, (LENGTH - row.shape[1], 0)) for row in rows])
    mask = torch.tensor([[0] * (LENGTH - n) + [1] * n for n in lengths])
    options = {"max_new_tokens": 6, "do_sample": False}
    cache = PolicyCache(model.config, PRESETS["h2o"](BUDGET))
    with cache.on(model):
        made = model.generate(ids, past_key_values=cache, attention_mask=mask, **options)
    for row, alone in enumerate(rows):
        cache = PolicyCache(model.config, PRESETS["h2o"](BUDGET))
        with cache.on(model):
            want = model.generate(alone, past_key_values=cache, attention_mask=torch.ones_like(alone), **options)
        assert made[row, LENGTH:].tolist() == want[0, alone.shape[1] :].tolist()


@pytest.mark.parametrize("bad", [0, 1, -3])
@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"tova", "h2o", "h2o_heavy", "h2o_rolling"}))
def test_budgets_that_cannot_hold_the_protected_tokens_are_refused(name, bad, llama):
    with pytest.raises(ValueError, match="expected"):
        prefill(llama, prompt(5), PRESETS[name](bad))


@pytest.mark.parametrize("name", PRESETS)
def test_budget_zero_is_refused(name, llama):
    with pytest.raises(ValueError, match="expected"):
        prefill(llama, prompt(5), PRESETS[name](0))


@pytest.mark.parametrize("name", MODELS)
def test_layers_may_have_budgets_of_their_own(name):
    model = tiny(name)
    policy = PRESETS["h2o"](BUDGET)._replace(budget=(12, 8, 6))
    _, cache, _ = prefill(model, prompt(LENGTH), policy)
    continue_with(model, cache, prompt(1))
    assert cache.held == [12, 8, 6]
    with pytest.raises(ValueError, match="2 budgets for 3 layers"):
        prefill(model, prompt(5), policy._replace(budget=(12, 8)))


def test_full_keeps_everything(llama, assert_close):
    ids = prompt(LENGTH)
    logits, cache, _ = prefill(llama, ids, full(), chunk=7)
    assert_close(logits, plain(llama, ids)[:, -1])
    assert cache.held == [LENGTH] * 3
