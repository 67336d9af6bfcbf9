"""A shared prefix: nothing copied, nothing leaked, and the logits of separate caches."""

import pytest
import torch
from kv_presets import prompt

from memlens.kv.cache import continue_with, prefill, share_prefix
from memlens.kv.kivi import kivi
from memlens.kv.policies import full, h2o, snapkv
from memlens.kv.select import positions


def own(cache, model, row):
    """What a branch gives when it goes on alone."""
    twin = cache.fork()
    return [continue_with(model, twin, part) for part in row]


@pytest.mark.parametrize("policy", [full(), snapkv(14, window=4, kernel=3)], ids=["full", "snapkv"])
def test_branches_give_what_separate_caches_give(model, policy, assert_close):
    cache = prefill(model, prompt(23), policy).cache
    parts = [prompt(4, rows=3, seed=5), prompt(1, rows=3, seed=6), prompt(2, rows=3, seed=7)]
    branches = share_prefix(cache, 3)
    got = [continue_with(model, branches, part) for part in parts]
    for row in range(3):
        want = own(cache, model, [part[row : row + 1] for part in parts])
        assert_close([part[row : row + 1] for part in got], want)
    assert branches.held == [held + 7 for held in cache.held]
    last = positions(cache.state[1].stream, 7).expand(3, -1, -1)
    assert torch.equal(branches.positions(1), last)


def test_the_prefix_is_the_same_storage_and_counted_once(llama):
    cache = prefill(llama, prompt(40)).cache
    branches = share_prefix(cache, 5)
    payload = cache.nbytes()["payload"]
    assert branches.nbytes()["payload"] == payload
    continue_with(llama, branches, prompt(3, rows=5))
    for old, new in zip(cache.layers, branches.layers, strict=True):
        assert new.prefix[0].data_ptr() == old.keys.data_ptr()
        assert new.prefix[1].data_ptr() == old.values.data_ptr()
    assert branches.nbytes()["payload"] == payload + 5 * 3 * payload // 40
    assert cache.held == [40] * 3


def test_what_one_branch_writes_no_other_sees(llama, assert_close):
    cache = prefill(llama, prompt(20)).cache
    before = [layer.keys.clone() for layer in cache.layers]
    first, other = share_prefix(cache, 2), share_prefix(cache, 2)
    ids = prompt(5, rows=2, seed=8)
    changed = torch.stack((ids[0], prompt(5, seed=9)[0]))
    a, b = continue_with(llama, first, ids), continue_with(llama, other, changed)
    assert_close(a[0], b[0])
    assert not torch.allclose(a[1], b[1], atol=1e-3)
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)


def test_generate_runs_on_branches(llama):
    ids = prompt(12)
    cache = prefill(llama, ids[:, :-1]).cache
    branches = share_prefix(cache, 3)
    with branches.on(llama):
        got = llama.generate(ids.expand(3, -1), past_key_values=branches, max_new_tokens=5, do_sample=False)
    want = llama.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(got, want.expand(3, -1))


def test_branches_can_branch(llama, assert_close):
    cache = prefill(llama, prompt(10)).cache
    branches = share_prefix(cache, 2)
    ids = prompt(3, rows=2, seed=3)
    continue_with(llama, branches, ids)
    branches.batch_repeat_interleave(2)
    got = continue_with(llama, branches, prompt(2, rows=4, seed=4))
    alone = own(cache, llama, [ids[1:], prompt(2, rows=4, seed=4)[2:3]])[1]
    assert_close(got[2:3], alone)


def test_what_cannot_be_shared_is_refused(llama):
    cache = prefill(llama, prompt(30)).cache
    with pytest.raises(ValueError, match="n=0"):
        share_prefix(cache, 0)
    for policy, word in [(h2o(6, 6), "'h2o'"), (full().stored(kivi(4, group=8, residual=8)), "plain keys")]:
        with pytest.raises(ValueError, match=word):
            share_prefix(prefill(llama, prompt(30), policy).cache, 2)
    with pytest.raises(ValueError, match="one prompt"):
        share_prefix(prefill(llama, prompt(30, rows=2)).cache, 2)
    branches = share_prefix(cache, 2)
    with pytest.raises(RuntimeError, match="3 rows for 2 branches"):
        continue_with(llama, branches, prompt(2, rows=3))
    with pytest.raises(RuntimeError, match="share_prefix again"):
        branches.reset()
