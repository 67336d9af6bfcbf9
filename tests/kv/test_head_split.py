"""Two policies side by side: each head as under its own policy, everything a cache does, and bytes freed head by head."""

import pytest
import torch
from kv_presets import PRESETS, full, prompt, tiny

from memlens.data import text
from memlens.kv.budget import achieved
from memlens.kv.cache import HeadSplitCache, compress, continue_with, prefill, stream_eval
from memlens.kv.head_split import by_head, cache_for
from memlens.kv.kivi import kivi
from memlens.kv.ksort import block_floats
from memlens.kv.mikv import mikv, mixed
from memlens.kv.policies import h2o, sirllm, snapkv, streaming
from memlens.kv.retrieval import instinfer
from memlens.kv.think import think

LENGTH, BUDGET = 14, 9
MARKS = torch.tensor([[True, False], [False, False], [True, True]])  # a layer with both, with none, with all
STORES = {
    "plain": None, "kivi": kivi(4, group=4, residual=8), "mikv": mixed(0.5, lo=4, group=4), "ksort": block_floats(4, block=4),
    "think": think(0.3, tail=3, rows=4), "sparf": instinfer(4, 0.5),
}  # fmt: skip
WHOLE = {"sirllm", "locret"}  # ask for the logits, or for all heads at once
AGREEING = {"tova", "elastic_counts"}  # the heads of a group choose together
SPLITS = {
    "duo": lambda: by_head(MARKS, full(), streaming(5, sinks=2)),
    "duo + mikv": lambda: by_head(MARKS, mikv(0.5, lo=4, group=4), streaming(5, sinks=2)),
    "h2o | snapkv": lambda: by_head(MARKS, h2o(4, 3), snapkv(6, window=3, kernel=3)),
    "h2o + kivi | tova": lambda: by_head(MARKS, h2o(5, 4).stored(STORES["kivi"]), PRESETS["tova"](4)),
    "rolling | merging": lambda: by_head(MARKS, PRESETS["h2o_rolling"](6), PRESETS["d2o"](8)),
}


@pytest.mark.parametrize("name", ["h2o", "snapkv", "streaming", "tova", "d2o", "elastic_counts", "h2o_rolling"])
@pytest.mark.parametrize("store", ["plain", "kivi"])
def test_a_split_with_one_policy_on_one_side_is_that_policy(name, store, model, assert_close):
    policy = PRESETS[name](BUDGET)
    if store == "kivi":
        if policy.merge and policy.when != "prompt":
            pytest.skip("a pair that is refused")
        policy = policy.stored(STORES["kivi"])
    heads = model.config.num_key_value_heads
    whole, parts = prefill(model, prompt(LENGTH), policy), prompt(4, seed=5).split([1, 2, 1], 1)
    want = [whole.logits, *(continue_with(model, whole.cache, part) for part in parts)]
    half = torch.arange(3 * heads).view(3, heads) % 2 == 0
    for marks in (torch.ones_like(half), *([] if name in AGREEING else [half])):
        split = prefill(model, prompt(LENGTH), by_head(marks, policy, policy))
        got = [split.logits, *(continue_with(model, split.cache, part) for part in parts)]
        assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert split.cache.held == [[count] * heads for count in whole.cache.held]
        assert split.cache.nbytes() == whole.cache.nbytes()
        for layer in range(3):
            assert torch.equal(torch.stack(split.cache.positions(layer), 1), whole.cache.positions(layer))


@pytest.mark.parametrize("name", ["duo", "h2o | snapkv"])
def test_a_split_is_dense_attention_under_the_same_mask(name, model, dense, assert_close):
    policy = SPLITS[name]()
    parts = [prompt(LENGTH), *prompt(4, seed=5).split([1, 2, 1], 1)]
    got, want = dense(model, cache_for(model.config, policy, LENGTH), parts)
    assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.model
def test_a_split_is_dense_attention_under_the_same_mask_on_smollm2(smollm2, dense):
    model, tokenizer = smollm2
    ids = text("areopagitica", start=2000, length=77, tokenizer=tokenizer)
    marks = torch.rand(30, 3, generator=torch.Generator().manual_seed(0)) < 0.4
    cache = cache_for(model.config, by_head(marks, full(), streaming(24, sinks=4)), 72)
    got, want = dense(model, cache, [ids[:, :72], *ids[:, 72:].split(1, 1)])
    torch.testing.assert_close(got.softmax(-1), want.softmax(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-4)
    assert cache.held == [[77 if mark else 24 for mark in row] for row in marks.tolist()]


def test_bytes_are_freed_head_by_head(llama):
    cache = prefill(llama, prompt(LENGTH), SPLITS["duo"]()).cache
    tokens = int(MARKS.sum()) * LENGTH + int((~MARKS).sum()) * 5
    assert cache.held == [[LENGTH, 5], [5, 5], [LENGTH, LENGTH]]
    assert cache.nbytes() == {"payload": tokens * 2 * 8 * 4, "positions": tokens * 4, "scores": tokens * 4, "memory": 0}
    assert achieved(cache).tokens == ((LENGTH + 5) / 2, 5, LENGTH)
    held = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for layer in cache.layers
        for x in layer.parts()["payload"]
    }
    assert sum(held.values()) == cache.nbytes()["payload"]


@pytest.mark.parametrize("name", SPLITS)
def test_compress_equals_prefill_and_chunks_equal_one_forward(name, llama, assert_close):
    policy = SPLITS[name]()
    once = prefill(llama, prompt(LENGTH), policy).cache
    late = compress(prefill(llama, prompt(LENGTH), keep_queries=True), policy)
    assert isinstance(late, HeadSplitCache)
    assert late.held == once.held
    assert late.nbytes() == once.nbytes()
    part = prompt(3, seed=5)
    assert_close(continue_with(llama, late, part), continue_with(llama, once, part), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SPLITS)
def test_forks_resets_cuts_and_repeats(name, llama, assert_close):
    policy, part = SPLITS[name](), prompt(2, seed=5)
    cache, fresh = (prefill(llama, prompt(LENGTH), policy).cache for _ in range(2))
    spare, before = cache.fork(), cache.nbytes()
    want = continue_with(llama, fresh, part)
    continue_with(llama, spare, prompt(3, seed=6))
    handle = llama.model.layers[1].mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        continue_with(llama, cache, part)
    handle.remove()
    assert cache.nbytes() == before
    assert_close(continue_with(llama, cache, part), want)
    cache.reset()
    assert cache.get_seq_length() == sum(cache.nbytes().values()) == 0
    again = prefill(llama, prompt(LENGTH), policy).cache
    again.batch_repeat_interleave(2)
    assert_close(continue_with(llama, again, part.repeat(2, 1)), want.repeat(2, 1, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["duo", "duo + mikv", "h2o | snapkv"])
def test_generate_is_the_manual_loop_and_a_stream_is_its_steps(name, model):
    policy, ids = SPLITS[name](), prompt(LENGTH)
    cache = cache_for(model.config, policy, LENGTH)
    with cache.on(model):
        made = model.generate(
            ids, past_key_values=cache, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False
        )
    logits, loop, _ = prefill(model, ids, policy)
    for token in made[0, LENGTH:]:
        assert int(logits[0].argmax()) == int(token)
        logits = continue_with(model, loop, token.view(1, 1))[:, -1]
    assert stream_eval(model, ids, policy, chunk=3).shape == (1, LENGTH, 61)


def test_a_padded_batch_equals_its_rows_alone(llama, assert_close):
    policy = SPLITS["h2o | snapkv"]()
    rows, ids = [prompt(n, seed=n) for n in (14, 11)], torch.zeros(2, 14, dtype=torch.long)
    mask = torch.tensor([[1] * 14, [0] * 3 + [1] * 11])
    for row, tokens in enumerate(rows):
        ids[row, -tokens.shape[1] :] = tokens
    together = prefill(llama, ids, policy, mask=mask)
    for row, tokens in enumerate(rows):
        assert_close(together.logits[row : row + 1], prefill(llama, tokens, policy).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", sorted(set(PRESETS) - WHOLE))
def test_every_selection_in_every_storage_beside_another(name, store, llama):
    policy, fmt = PRESETS[name](BUDGET), STORES[store]
    if fmt is not None:
        try:
            policy = policy.stored(fmt)
        except ValueError as refused:
            pytest.skip(f"refused, as without a split: {refused}")
    cache = prefill(llama, prompt(LENGTH), by_head(MARKS, policy, streaming(5, sinks=2))).cache
    alone = prefill(llama, prompt(LENGTH), policy).cache
    for step in range(3):
        continue_with(llama, cache, prompt(1, seed=step))
        continue_with(llama, alone, prompt(1, seed=step))
        for layer, row in enumerate(MARKS.tolist()):
            assert cache.held[layer] == [alone.held[layer] if mark else 5 for mark in row]


def test_bad_splits_are_refused(llama):
    with pytest.raises(ValueError, match="heads has shape"):
        by_head(MARKS[0], full(), full())
    with pytest.raises(ValueError, match="float32; expected bool"):
        by_head(MARKS.float(), full(), full())
    with pytest.raises(ValueError, match="sirllm.*no more than its own heads"):
        by_head(MARKS, full(), sirllm(start=2, entropy=4, recent=2))
    for each in (SPLITS["duo"](), PRESETS["locret"](BUDGET)):
        with pytest.raises(ValueError, match="no more than its own heads"):
            by_head(MARKS, full(), each)
    with pytest.raises(ValueError, match=r"marks of shape \(2, 2\); expected \(layers, kv heads\) = \(3, 2\)"):
        prefill(llama, prompt(5), by_head(MARKS[:2], full(), full()))
    with pytest.raises(ValueError, match=r"marks of shape \(2, 2\)"):
        compress(prefill(llama, prompt(5), keep_queries=True), by_head(MARKS[:2], full(), full()))
    with pytest.raises(ValueError, match="queries to be kept"):
        prefill(llama, prompt(5), SPLITS["duo"](), keep_queries=True)
    other = tiny()
    cache = prefill(llama, prompt(5), SPLITS["duo"]()).cache
    with pytest.raises(ValueError, match="another model"):
        continue_with(other, cache, prompt(1))
