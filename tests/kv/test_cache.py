"""The adapter: bytes that are really freed, forks, turns, several questions, and misuse that leaves the cache as it was."""

import weakref

import pytest
import torch
from kv_presets import MODELS, PRESETS, SHAPE, prompt, tiny
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from memlens.kv.cache import PolicyCache, compress, continue_with, prefill, stream_eval
from memlens.kv.policies import h2o, snapkv, streaming

LENGTH, BUDGET = 23, 9


@pytest.mark.parametrize("name", MODELS)
def test_bytes_are_those_of_the_tensors_and_of_the_formula(name):
    model = tiny(name)
    _, cache, _ = prefill(model, prompt(LENGTH, rows=2), h2o(5, 4))
    parts, dim = cache.nbytes(), cache.layers[0].keys.shape[-1]
    tokens = 2 * 3 * 2 * BUDGET  # rows, layers, kv heads, tokens
    assert parts == {"payload": tokens * 2 * dim * 4, "positions": tokens * 4, "scores": tokens * 4, "memory": 0}
    for layer in cache.layers:
        assert layer.keys.untyped_storage().nbytes() == layer.keys.numel() * 4
    _, kept, _ = prefill(model, prompt(LENGTH, rows=2))
    assert kept.nbytes()["payload"] == parts["payload"] // BUDGET * LENGTH


def test_a_prompt_being_observed_reports_the_queries_that_it_remembers(llama):
    cache = PolicyCache(llama.config, snapkv(BUDGET, window=3), hold_until=LENGTH)
    continue_with(llama, cache, prompt(LENGTH - 1))
    assert cache.nbytes()["memory"] == 3 * (4 * 3 * 8) * 4  # layers x (heads, window, dim) in float32
    continue_with(llama, cache, prompt(1))
    assert cache.nbytes()["memory"] == 0


def test_what_a_policy_gives_up_is_freed(llama):
    _, cache, _ = prefill(llama, prompt(LENGTH))
    cache._policy, cache.state = h2o(5, 4), tuple(cache.state)
    old = [weakref.ref(x.untyped_storage()) for layer in cache.layers for x in (layer.keys, layer.values)]
    alive = [weakref.ref(layer.keys) for layer in cache.layers]
    for index in range(3):
        cache.evict(index)
    assert all(ref() is None for ref in alive)
    assert len(old) == 6
    assert cache.held == [BUDGET] * 3


@pytest.mark.parametrize("name", PRESETS)
def test_a_fork_goes_its_own_way(name, llama, assert_close):
    ids = prompt(LENGTH + 2)
    _, cache, _ = prefill(llama, ids[:, :LENGTH], PRESETS[name](BUDGET))
    twin, bytes_before = cache.fork(), cache.nbytes()
    assert twin.layers[0].keys is cache.layers[0].keys
    want = continue_with(llama, twin, ids[:, LENGTH:])
    assert cache.get_seq_length() == LENGTH
    assert cache.nbytes() == bytes_before
    if name != "random":  # a fork shares the generator
        assert_close(continue_with(llama, cache, ids[:, LENGTH:]), want)


def test_several_questions_share_one_context(llama, assert_close):
    _, cache, _ = prefill(llama, prompt(LENGTH), snapkv(BUDGET, window=3))
    questions = prompt(4, rows=3)
    together = cache.fork()
    together.batch_repeat_interleave(3)
    got = continue_with(llama, together, questions)
    for row in range(3):
        assert_close(got[row : row + 1], continue_with(llama, cache.fork(), questions[row : row + 1]))


def test_several_turns_continue_one_conversation(llama):
    first, second = prompt(LENGTH), prompt(7, seed=5)
    options = {"max_new_tokens": 5, "do_sample": False}
    cache = PolicyCache(llama.config, h2o(6, 6))
    with cache.on(llama):
        turn = llama.generate(first, past_key_values=cache, attention_mask=torch.ones_like(first), **options)
        ids = torch.cat((turn, second), 1)
        made = llama.generate(ids, past_key_values=cache, attention_mask=torch.ones_like(ids), **options)
    _, loop, _ = prefill(llama, first, h2o(6, 6))
    for token in turn[0, LENGTH:-1]:
        continue_with(llama, loop, token.view(1, 1))
    logits = continue_with(llama, loop, torch.cat((turn[:, -1:], second), 1))
    for token in made[0, ids.shape[1] :]:
        assert int(logits[0, -1].argmax()) == int(token)
        logits = continue_with(llama, loop, token.view(1, 1))


def test_rolling_attends_at_positions_without_gaps(llama, assert_close):
    """Under `rolling`, a decode step equals one on a text in which the lost tokens never had a place."""
    ids = prompt(LENGTH)
    policy = streaming(BUDGET, sinks=2)._replace(rolling=True)
    _, cache, _ = prefill(llama, ids, policy)
    got = continue_with(llama, cache, ids[:, -1:])
    cache_2 = prefill(llama, ids, streaming(BUDGET, sinks=2)).cache
    from memlens.attention.rope import shift

    inv_freq = llama.model.rotary_emb.inv_freq
    for layer in cache_2.layers:
        held = torch.tensor([0, 1, *range(LENGTH - BUDGET + 2, LENGTH)])
        layer.keys = shift(layer.keys, torch.arange(BUDGET) - held, inv_freq)
    assert_close(got, continue_with(llama, cache_2, ids[:, -1:], pos0=BUDGET))
    assert (
        float((got - continue_with(llama, prefill(llama, ids, streaming(BUDGET, sinks=2)).cache, ids[:, -1:])).abs().max())
        > 1e-3
    )


def test_the_model_is_as_it_was_afterwards(llama):
    before = llama.config._attn_implementation
    cache = PolicyCache(llama.config, h2o(4, 4))
    with cache.on(llama):
        assert llama.config._attn_implementation != before
    assert llama.config._attn_implementation == before
    with pytest.raises(KeyboardInterrupt), cache.on(llama):
        raise KeyboardInterrupt
    assert llama.config._attn_implementation == before
    with torch.no_grad():
        llama(prompt(5), past_key_values=DynamicCache(config=llama.config))


def test_a_forward_outside_of_the_context_changes_nothing(llama):
    _, cache, _ = prefill(llama, prompt(LENGTH), h2o(5, 4))
    with pytest.raises(RuntimeError, match="with cache.on"):
        llama(prompt(1), past_key_values=cache)
    assert cache.held == [BUDGET] * 3
    with cache.on(llama), pytest.raises(RuntimeError, match="past_key_values=cache"):
        llama(prompt(3), use_cache=False)


def test_another_model_is_refused(llama):
    other = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": 2})).eval()
    _, cache, _ = prefill(llama, prompt(LENGTH))
    with pytest.raises(ValueError, match=r"a model of \(layers, kv heads, dim\) \(2, 2, 8\)"):
        continue_with(other, cache, prompt(1))


def test_an_interrupted_forward_is_undone_and_reset_starts_again(llama, assert_close):
    ids = prompt(LENGTH)
    _, cache, _ = prefill(llama, ids, h2o(5, 4))
    handle = llama.model.layers[1].mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        continue_with(llama, cache, ids[:, :1])
    handle.remove()
    want = continue_with(llama, prefill(llama, ids, h2o(5, 4)).cache, ids[:, :1])
    assert_close(continue_with(llama, cache, ids[:, :1]), want)
    cache.reset()
    continue_with(llama, cache, ids)
    assert_close(continue_with(llama, cache, ids[:, :1]), want)


@pytest.mark.parametrize("mask", [[1, 1, 1, 0], [0, 1, 0, 1]])
def test_masks_other_than_left_padding_are_refused(mask, llama):
    cache = PolicyCache(llama.config)
    with pytest.raises(RuntimeError, match="pad on the left"):
        continue_with(llama, cache, prompt(4), mask=torch.tensor([mask]))
    assert cache.get_seq_length() == 0


def test_what_the_cache_does_not_serve_is_refused(llama):
    _, cache, _ = prefill(llama, prompt(LENGTH), h2o(5, 4))
    with pytest.raises(RuntimeError, match="crop"):
        cache.crop(-1)
    fresh, ids = PolicyCache(llama.config, h2o(5, 4)), prompt(5)
    with fresh.on(llama), pytest.raises(RuntimeError, match="num_beams=1"):
        llama.generate(ids, past_key_values=fresh, attention_mask=torch.ones_like(ids), num_beams=2, max_new_tokens=3)
    narrow = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=8)).eval()
    with pytest.raises(RuntimeError, match="window that is exceeded"):
        prefill(narrow, prompt(LENGTH))
    with pytest.raises(AttributeError):
        cache.policy = h2o(1, 1)


def test_nan_keys_are_refused_with_the_reason():
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN among the scores"):
        prefill(model, prompt(LENGTH), h2o(5, 4))


def test_doors_check_what_they_are_given(llama):
    with pytest.raises(ValueError, match="length >= 1"):
        prefill(llama, prompt(0))
    with pytest.raises(ValueError, match="chunk >= 1"):
        stream_eval(llama, prompt(5), chunk=0)
    with pytest.raises(ValueError, match="start within"):
        stream_eval(llama, prompt(5), start=5)
    with pytest.raises(ValueError, match="keep_queries=True"):
        compress(prefill(llama, prompt(5)), h2o(1, 1))


def test_a_stream_gives_the_logits_from_start_on(llama, assert_close):
    ids = prompt(LENGTH)
    with torch.no_grad():
        want = llama(ids).logits
    for chunk, start in ((1, 0), (5, 7), (LENGTH, 22), (4, 8)):
        assert_close(stream_eval(llama, ids, chunk=chunk, start=start), want[:, start:])
