"""Caches against Python's own lru_cache, an exhaustive optimum, cases by hand, and each other."""

from functools import lru_cache
from itertools import combinations

import pytest
import torch

from memlens.routing.caching import POLICIES, hit_curve, simulate


def some_requests(generator, batch, tokens, items, width):
    return torch.rand(batch, tokens, items, generator=generator).argsort(-1)[..., :width]


def curve(requests, items, policy, **options):
    return hit_curve(requests, items, policy, future=min(3, requests.shape[1]) if policy == "segment" else None, **options)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("free_fill", [True, False])
def test_all_capacities_at_once_are_the_step_by_step_caches(policy, free_fill, generator):
    for trial in range(25):
        items = 2 + trial % 6
        requests = some_requests(generator, 3, 1 + trial % 17, items, 1 + trial % items)
        got, want = (curve(requests, items, policy, free_fill=free_fill, form=form) for form in ("torch", "reference"))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("future", [1, 2, 7, 20])
def test_the_segment_window_agrees_at_every_length(future, generator):
    requests = some_requests(generator, 4, 20, 7, 3)
    got, want = (hit_curve(requests, 7, "segment", future=future, form=form) for form in ("torch", "reference"))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("capacity", [1, 2, 4])
def test_lru_is_the_cache_of_the_standard_library(capacity, generator):
    requests = some_requests(generator, 1, 200, 6, 1)
    cached = lru_cache(maxsize=capacity)(lambda item: item)
    for item in requests.flatten().tolist():
        cached(item)
    log = simulate(requests, 6, capacity, "lru", free_fill=False)
    assert int(log.hits.sum()) == cached.cache_info().hits
    assert int(log.loads.sum()) == cached.cache_info().misses


def best_hits(flat, items, capacity):
    """Most hits of any cache that must load what it misses, over all choices of victims."""
    states = {frozenset(): 0}
    for item in flat:
        after = {}
        for state, hits in states.items():
            if item in state:
                options = [state]
            elif len(state) < capacity:
                options = [state | {item}]
            else:
                options = [frozenset(kept) | {item} for kept in combinations(state, capacity - 1)]
            for option in options:
                after[option] = max(after.get(option, 0), hits + (item in state))
        states = after
    return max(states.values())


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_belady_is_the_best_there_is(capacity, generator):
    requests = some_requests(generator, 3, 20, 6, 2)
    log = simulate(requests, 6, capacity, "belady", semantics="request", free_fill=False)
    for sample in range(3):
        assert int(log.hits[sample].sum()) == best_hits(requests[sample].flatten().tolist(), 6, capacity)


def test_by_hand():
    requests = torch.tensor([0, 1, 2, 0, 1]).view(1, 5, 1)
    logs = {policy: simulate(requests, 3, 2, policy, future=2 if policy == "segment" else None) for policy in POLICIES}
    hits = {policy: log.hits.int().flatten().tolist() for policy, log in logs.items()}
    assert hits["lru"] == [1, 1, 0, 0, 0]  # two free fills, then always the one just thrown out
    assert hits["lfu"] == [1, 1, 0, 0, 0]  # equal counts: the least recent goes
    assert hits["belady"] == [1, 1, 0, 1, 0]
    assert hits["segment"] == [1, 1, 0, 1, 0]  # sees that 0 is next
    assert hits["fixed"] == [1, 1, 0, 1, 1]  # 0 and 1 lie there for good


def test_a_token_is_looked_up_as_a_whole_and_loaded_in_order():
    requests = torch.tensor([[[0, 1], [2, 0]]])
    token, request = (simulate(requests, 3, 2, "lru", semantics=name) for name in ("token", "request"))
    assert token.hits.tolist() == [[[True, True], [False, True]]]  # 0 was there before the token,
    assert token.loads.tolist() == [[0, 2]]  # but 2 threw it out, so it is loaded again
    assert request.hits.tolist() == [[[True, True], [False, False]]]
    assert token.bytes.tolist() == [[0, 2]]
    assert simulate(requests, 3, 2, "lru", item_bytes=10).bytes.tolist() == [[0, 20]]


def test_without_free_fill_first_touches_are_loads():
    log = simulate(torch.tensor([[[0, 1], [0, 1]]]), 4, 2, "lru", free_fill=False)
    assert log.hits.tolist() == [[[False, False], [True, True]]]
    assert log.loads.tolist() == [[2, 0]]
    assert log.evictions.sum() == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_a_larger_cache_never_loses_and_a_full_one_never_misses(policy, generator):
    rates = curve(some_requests(generator, 4, 30, 9, 3), 9, policy)
    assert (rates.diff(dim=1) >= 0).all()
    torch.testing.assert_close(rates[:, -1], torch.ones(4, dtype=torch.float64))


def test_a_window_of_one_token_with_one_expert_is_lru(generator):
    requests = some_requests(generator, 3, 40, 6, 1)
    torch.testing.assert_close(hit_curve(requests, 6, "segment", future=1), hit_curve(requests, 6, "lru"))


@pytest.mark.parametrize("policy", POLICIES)
def test_names_of_items_do_not_matter(policy, generator):
    requests, names = some_requests(generator, 3, 30, 8, 2), torch.randperm(8, generator=generator)
    torch.testing.assert_close(curve(names[requests], 8, policy), curve(requests, 8, policy))


def test_prefetched_items_hit_and_pinned_ones_stay(generator):
    requests = torch.tensor([[[0], [1], [2], [0]]])
    ahead = torch.tensor([[[-1], [-1], [2], [-1]]])
    log = simulate(requests, 3, 2, "lru", free_fill=False, prefetch=ahead)
    assert log.hits.flatten().tolist() == [False, False, True, False]
    assert log.loads.tolist() == [[1, 1, 1, 1]]
    pinned = simulate(requests, 3, 2, "lru", free_fill=False, pinned=[0])
    assert pinned.hits.flatten().tolist() == [True, False, False, True]
    assert pinned.evictions.tolist() == [[0, 0, 1, 0]]


def test_refusals(generator):
    requests = some_requests(generator, 1, 5, 4, 2)
    with pytest.raises(ValueError, match="one of 'lru'.*did you mean"):
        hit_curve(requests, 4, "lruu")
    with pytest.raises(ValueError, match="future=m"):
        hit_curve(requests, 4, "segment")
    with pytest.raises(ValueError, match="and for no other"):
        hit_curve(requests, 4, "lru", future=2)
    with pytest.raises(ValueError, match="future=6"):
        hit_curve(requests, 4, "segment", future=6)
    with pytest.raises(ValueError, match="experts"):
        hit_curve(requests, 3, "lru")
    with pytest.raises(ValueError, match="twice"):
        hit_curve(torch.zeros(1, 2, 2, dtype=torch.long), 4, "lru")
    with pytest.raises(TypeError, match="integer"):
        hit_curve(requests.float(), 4, "lru")
    with pytest.raises(ValueError, match="capacity=5"):
        simulate(requests, 4, 5, "lru")
    with pytest.raises(ValueError, match="a free slot"):
        simulate(requests, 4, 2, "lru", pinned=[0, 1])
    with pytest.raises(ValueError, match="never changes"):
        simulate(requests, 4, 2, "fixed", pinned=[0])
    with pytest.raises(ValueError, match="no kernel"):
        hit_curve(requests, 4, "lru", form="triton")
