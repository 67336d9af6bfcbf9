"""What must not be done with a cache: each is refused with the reason, and what was held before is as good as it was."""

import weakref
from functools import partial

import pytest
import torch
from kv_presets import DRAWN, MERGING, PRESETS, full, prompt, tiny

from memlens.kv.budget import tokens
from memlens.kv.cache import HeldLayer, PolicyCache, compress, continue_with, prefill
from memlens.kv.kivi import kivi
from memlens.kv.ksort import block_floats
from memlens.kv.mikv import mixed
from memlens.kv.policies import d2o, elastic, h2o, prefixkv, snapkv, streaming
from memlens.kv.quantize import affine_quantize

LENGTH, BUDGET = 23, 9
ATTENTIVE = sorted(set(PRESETS) - {"streaming", "random", "sirllm", "locret"})  # their score comes from attention


def unharmed(model, cache, fresh, assert_close):
    """The cache goes on like one that nothing was done to."""
    assert cache.get_seq_length() == fresh.get_seq_length()
    assert cache.held == fresh.held
    assert cache.nbytes() == fresh.nbytes()
    assert_close(continue_with(model, cache, prompt(3, seed=8)), continue_with(model, fresh, prompt(3, seed=8)))


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_budget_below_sinks_and_recent_is_refused_when_the_cache_is_made(name, llama):
    policy = PRESETS[name](BUDGET)._replace(first=6, last=6)
    for budget in (11, (12, 12, 11)):
        with pytest.raises(ValueError, match=r"budget=11; expected budget >= 1\d.* count inside the budget"):
            PolicyCache(llama.config, policy._replace(budget=budget, distance=None))


@pytest.mark.parametrize(
    "make", [lambda: elastic(0.5, start=14), lambda: prefixkv([0.5, 0.5, 0.2], start=6)._replace(first=6, last=8)]
)
def test_a_share_below_sinks_and_recent_is_refused_before_anything_is_stored(make, llama):
    cache = PolicyCache(llama.config, make())
    with pytest.raises(ValueError, match="count inside the budget"):
        continue_with(llama, cache, prompt(LENGTH))
    assert cache.held == [0] * 3
    assert sum(cache.nbytes().values()) == 0


def test_a_point_outside_is_refused_before_anything_is_written(llama, assert_close):
    cache, fresh = (prefill(llama, prompt(LENGTH), elastic(0.5, distance=-25)).cache for _ in range(2))
    with pytest.raises(ValueError, match=r"elastic: p=-13; expected p within \[1, 12\]"):
        continue_with(llama, cache, prompt(1))
    assert cache.nbytes() == fresh.nbytes()
    assert len({layer.seen for layer in cache.layers}) == 1


@pytest.mark.parametrize("name", PRESETS)
def test_budget_zero_is_refused(name, llama):
    with pytest.raises(ValueError, match="expected"):
        PolicyCache(llama.config, PRESETS[name](BUDGET)._replace(budget=0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: tokens(length=20, ratio=0.0), lambda: tokens(length=20, nbytes=0, layers=3, kv_heads=2, dim=8),
        lambda: d2o(0.0), lambda: elastic(1.0), lambda: prefixkv([0.5, 0.0]), lambda: streaming(0), lambda: snapkv(0),
    ],
)  # fmt: skip
def test_nothing_to_keep_is_refused_in_every_unit(make):
    with pytest.raises(ValueError, match="expected"):
        make()


# --- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [-1, 0, 5, 6, 7, 9, 32])
@pytest.mark.parametrize(
    "make",
    [
        lambda bits: kivi(bits, group=8, residual=8), lambda bits: kivi((4, bits), group=8, residual=8),
        lambda bits: mixed(0.3, lo=bits), lambda bits: mixed(0.3, hi=bits),
        lambda bits: affine_quantize(torch.ones(8, 8), bits, axis=-1, group=8),
    ],
)  # fmt: skip
def test_bits_that_have_no_packing_are_refused(make, bits):
    with pytest.raises(ValueError, match=f"'?{bits}'?; expected"):
        make(bits)


@pytest.mark.parametrize("make", [partial(block_floats, 8, block=3), partial(kivi, 4, group=16, residual=16)])
def test_a_group_that_does_not_divide_is_refused_and_reset_starts_again(make, llama):
    cache = PolicyCache(llama.config, full().stored(make()))
    with pytest.raises(ValueError, match="no multiple of (group|block)"):
        continue_with(llama, cache, prompt(40))  # heads of 8 channels
    cache.reset()
    assert sum(cache.nbytes().values()) == 0
    with pytest.raises(ValueError, match="residual=24 is no multiple of group=16"):
        kivi(4, group=16, residual=24)


# --- numbers and padding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATTENTIVE)
def test_nan_in_the_scores_is_refused_and_the_cache_is_unharmed(name, llama, assert_close):
    fresh, cache = (prefill(llama, prompt(LENGTH), PRESETS[name](BUDGET)._replace(when="always")).cache for _ in range(2))
    weight = llama.model.layers[1].self_attn.q_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN among the scores"):
        continue_with(llama, cache, prompt(2))
    with torch.no_grad():
        weight.copy_(kept)
    if name not in DRAWN:
        unharmed(llama, cache, fresh, assert_close)


@pytest.mark.parametrize("mask", [[1, 1, 0], [1, 0, 1], [0, 1, 0]])
def test_padding_that_is_not_on_the_left_is_refused_in_mid_stream(mask, llama, assert_close):
    cache, fresh = (prefill(llama, prompt(LENGTH), h2o(5, 4)).cache for _ in range(2))
    with pytest.raises(RuntimeError, match="pad on the left"):
        continue_with(llama, cache, prompt(3), mask=torch.tensor([[1] * LENGTH + mask]))
    unharmed(llama, cache, fresh, assert_close)


@pytest.mark.parametrize("make", [lambda: d2o(0.5), lambda: elastic(0.5), lambda: prefixkv([0.5] * 3)])
def test_a_share_of_a_padded_batch_is_refused_before_anything_is_stored(make, llama):
    cache, mask = PolicyCache(llama.config, make()), torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, :4] = 0
    with pytest.raises(ValueError, match="rows of one length.*run one by one"):
        continue_with(llama, cache, prompt(LENGTH, rows=2), mask=mask)
    assert sum(cache.nbytes().values()) == 0


def padded(lengths, width):
    rows = [prompt(n, seed=n) for n in lengths]
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    return rows, ids, torch.tensor([[0] * (width - n) + [1] * n for n in lengths])


@pytest.mark.parametrize(("bits", "tolerance"), [(16, 1e-5), (8, 0.03), (4, 0.5)])
@pytest.mark.parametrize("policy", [full(), h2o(12, 12), snapkv(24, window=3, kernel=3)], ids=lambda policy: policy.name)
def test_left_padding_in_the_groups_of_a_quantised_cache(policy, bits, tolerance, llama):
    """Padding that fills groups changes nothing; one that shares a group with text costs no more than the rounding."""
    rows, ids, mask = padded((40, 32, 35), 40)
    stored = policy.stored(kivi(bits, group=8, residual=8))
    _, cache, _ = prefill(llama, ids, stored, mask=mask)
    steps = prompt(6, rows=3)
    mask = torch.cat((mask, torch.ones(3, 6, dtype=mask.dtype)), 1)
    got = continue_with(llama, cache, steps, mask=mask)
    for row, alone in enumerate(rows):
        single, exact = (prefill(llama, alone, p).cache for p in (stored, policy))
        want, plain = (continue_with(llama, c, steps[row : row + 1]) for c in (single, exact))
        if bits == 16 or (row < 2 and policy.name == "full"):
            torch.testing.assert_close(got[row : row + 1], want, rtol=1e-4, atol=1e-4)
        assert float((got[row] - plain[0]).norm() / plain.norm()) < tolerance


# --- layers, models, policies ------------------------------------------------------------------------------------------


def test_a_layer_without_tokens_says_so(llama, assert_close):
    cache = PolicyCache(llama.config, h2o(5, 4))
    for ask in (cache.positions, lambda layer: compress(prefill(llama, prompt(5))._replace(cache=cache), h2o(1, 1))):
        with pytest.raises(ValueError, match="layer 1 without tokens|without queries"):
            ask(1)
    cache.batch_repeat_interleave(2)  # twice nothing
    twin = cache.fork()
    assert cache.held == twin.held == [0] * 3
    unharmed(llama, cache, PolicyCache(llama.config, h2o(5, 4)), assert_close)


def test_a_layer_that_brings_its_tokens_to_another_is_noticed(llama):
    llama.model.layers[1].self_attn.layer_idx = 0
    cache = PolicyCache(llama.config, h2o(5, 4))
    with pytest.raises(RuntimeError, match="out of step"):
        continue_with(llama, cache, prompt(LENGTH))


def test_a_layer_that_brings_none_is_noticed_at_the_next_forward(llama):
    cache, layer = PolicyCache(llama.config, h2o(5, 4)), llama.model.layers[1]
    layer.forward = lambda hidden, *args, **kwargs: hidden
    continue_with(llama, cache, prompt(LENGTH))
    with pytest.raises(RuntimeError, match="out of step"):
        continue_with(llama, cache, prompt(1))


def test_another_model_of_the_same_shape_is_refused(llama, assert_close):
    other = tiny()
    cache, fresh = (prefill(llama, prompt(LENGTH), h2o(5, 4)).cache for _ in range(2))
    for held in (cache, cache.fork()):
        with pytest.raises(ValueError, match="another model; expected the one whose keys are held"):
            continue_with(other, held, prompt(1))
    unharmed(llama, cache, fresh, assert_close)
    cache.reset()
    continue_with(other, cache, prompt(3))
    assert cache.held == [3] * 3


def test_the_policy_stays_to_the_end(llama, assert_close):
    cache, fresh = (prefill(llama, prompt(LENGTH), h2o(5, 4)).cache for _ in range(2))
    with pytest.raises(AttributeError, match="'h2o' to the end; see compress"):
        cache.policy = streaming(BUDGET)
    assert cache.policy.name == "h2o"
    unharmed(llama, cache, fresh, assert_close)


@pytest.mark.parametrize("name", sorted(set(PRESETS) - DRAWN))
def test_a_generate_that_is_interrupted_between_tokens_leaves_a_cache_that_goes_on(name, llama, assert_close):
    ids, cache = prompt(LENGTH), PolicyCache(llama.config, PRESETS[name](BUDGET))

    def stop(seen, scores):
        if seen.shape[1] == LENGTH + 3:
            raise KeyboardInterrupt
        return scores

    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    before = llama.config._attn_implementation
    with pytest.raises(KeyboardInterrupt), cache.on(llama):
        llama.generate(ids, past_key_values=cache, logits_processor=[stop], **options)
    assert llama.config._attn_implementation == before
    assert not {**llama._forward_hooks, **llama._forward_pre_hooks}
    logits, loop, _ = prefill(llama, ids, PRESETS[name](BUDGET))
    for _ in range(3):
        logits = continue_with(llama, loop, logits.view(1, -1).argmax(-1, keepdim=True))
    unharmed(llama, cache, loop, assert_close)


def cut(model, layer, cache):
    """A `generate` of two new tokens and more that is stopped right after a layer's attention."""
    projection = model.model.layers[layer].self_attn.o_proj
    forward = projection.forward

    def stop(*_):
        raise KeyboardInterrupt

    projection.forward = stop
    with pytest.raises(KeyboardInterrupt), cache.on(model):
        model.generate(torch.cat((prompt(LENGTH), prompt(2, seed=8)), 1), past_key_values=cache, max_new_tokens=3)
    projection.forward = forward


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("store", ["none", "kivi", "mikv"])
@pytest.mark.parametrize("name", ["h2o", "snapkv", "sirllm", "d2o", "elastic"])
def test_a_forward_that_is_cut_short_is_undone(name, store, where, llama, assert_close):
    policy = PRESETS[name](BUDGET)
    stores = {"none": None, "kivi": kivi(4, group=4, residual=8), "mikv": mixed(0.5, lo=4, group=4)}
    if stores[store] is not None:
        if stores[store].problem(policy) or (policy.merge and policy.when != "prompt"):
            pytest.skip("a pair that is refused")
        policy = policy.stored(stores[store])
    cache, fresh = (prefill(llama, prompt(LENGTH), policy).cache for _ in range(2))
    for _ in range(2):  # what was undone can be undone again
        cut(llama, where, cache)
    unharmed(llama, cache, fresh, assert_close)


def test_a_forward_counts_once_its_last_layer_has_attended(llama, assert_close):
    cache, fresh = (prefill(llama, prompt(LENGTH), h2o(5, 4)).cache for _ in range(2))
    continue_with(llama, fresh, prompt(2, seed=8))
    cut(llama, 2, cache)
    unharmed(llama, cache, fresh, assert_close)
    hearing, fresh = (prefill(llama, prompt(LENGTH), PRESETS["sirllm"](BUDGET)).cache for _ in range(2))
    cut(llama, 2, hearing)  # such a policy evicts after the logits: its forward is not over
    unharmed(llama, hearing, fresh, assert_close)


def test_inside_the_context_a_cut_forward_is_refused_and_without_undo_it_spoils_the_cache(llama, assert_close):
    layer = llama.model.layers[1]
    ids = prompt(1)
    for undo in (True, False):
        cache, fresh = PolicyCache(llama.config, h2o(5, 4), undo=undo), prefill(llama, prompt(LENGTH), h2o(5, 4)).cache
        continue_with(llama, cache, prompt(LENGTH))
        handle = layer.mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with cache.on(llama):
            with pytest.raises(KeyboardInterrupt):
                llama(ids, past_key_values=cache)
            handle.remove()
            with pytest.raises(RuntimeError, match="cut short.*leave `on`, reset.*earlier fork"):
                llama(ids, past_key_values=cache)
        if undo:
            unharmed(llama, cache, fresh, assert_close)
        else:
            with pytest.raises(RuntimeError, match="cut short"):
                continue_with(llama, cache, ids)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def storages(monkeypatch):
    """Weak references to the storages of all keys and values that any layer has ever handed to the model."""
    seen, plain = [], HeldLayer.update

    def update(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        seen.extend(weakref.ref(x.untyped_storage()) for x in out)
        return out

    monkeypatch.setattr(HeldLayer, "update", update)
    return seen


def alive(storages):
    """Bytes of those that are left, at once: no cycle waits for the collector."""
    return [ref().nbytes() for ref in storages if ref() is not None]


def test_the_references_follow_the_memory_and_not_the_wrapper():
    x = torch.ones(5)
    ref, view = weakref.ref(x.untyped_storage()), x[1:]
    del x
    assert alive([ref]) == [20]
    del view
    assert alive([ref]) == []


@pytest.mark.parametrize("store", [None, kivi(4, group=8, residual=8)], ids=["plain", "kivi"])
@pytest.mark.parametrize("name", PRESETS)
def test_keys_and_values_that_were_given_up_are_released(name, store, llama, storages):
    policy = PRESETS[name](BUDGET)
    if store and name in MERGING and policy.when == "always":
        pytest.skip("refused: this policy merges at every step into tokens that are stored already")
    policy = policy.stored(store) if store else policy
    cache = prefill(llama, prompt(LENGTH), policy).cache
    assert len(storages) >= 6
    assert alive(storages) == []  # what is held was gathered, merged or packed into memory of its own
    continue_with(llama, cache, prompt(1))
    held = {x.untyped_storage().data_ptr() for layer in cache.layers for part in layer.parts().values() for x in part}
    assert {ref().data_ptr() for ref in storages if ref() is not None} <= held


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"sirllm"}))
def test_compressing_a_prompt_releases_it_once_it_is_let_go(name, llama, storages):
    filled = prefill(llama, prompt(LENGTH), keep_queries=True)
    cache = compress(filled, PRESETS[name](BUDGET))
    assert len(alive(storages)) == 6
    del filled
    assert alive(storages) == []
    assert cache.held == [BUDGET] * 3
