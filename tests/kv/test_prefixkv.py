"""PrefixKV: one choice for all heads of a layer, curves of the mass, ratios that carry over to another length."""

import pytest
import torch
from kv_presets import generator, prompt

from memlens.kv.budget import prefix_search
from memlens.kv.cache import continue_with, prefill
from memlens.kv.prefixkv import layer_mass, prefix_curves, prefixkv
from memlens.kv.score import column_mass
from memlens.tasks.merge_studies import smallest_mass

LENGTH = 40


def test_curves_are_cumulated_shares_of_the_best(assert_close):
    mass = torch.tensor([[1.0, 4.0, 3.0, 2.0], [0.0, 0.0, 5.0, 0.0]])
    assert_close(prefix_curves(mass), torch.tensor([[0.4, 0.7, 0.9, 1.0], [1.0] * 4], dtype=torch.float64))
    without = torch.tensor([[0.0, 4 / 9, 7 / 9, 1.0], [0.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    assert_close(prefix_curves(mass, sinks=1), without)
    order = torch.randperm(4, generator=generator())
    assert torch.equal(prefix_curves(mass[:, order]), prefix_curves(mass))  # tokens have no order here
    for bad in (-mass, mass / 0):
        with pytest.raises(ValueError, match=r"mass"):
            prefix_curves(bad)


def test_the_mass_is_that_of_the_attention(llama, assert_close):
    filled = prefill(llama, prompt(LENGTH), keep_queries=True)
    mass = layer_mass(filled)
    assert_close(mass.sum(1), torch.full((3,), float(LENGTH)))
    q, held = filled.queries[1], filled.cache.layers[1]
    assert_close(mass[1], column_mass(q, held.keys, group="none").mean((0, 1)))
    weighted = (column_mass(q, held.keys) * held.values.norm(dim=-1)).mean((0, 1))
    assert_close(layer_mass(filled, by_value=True)[1], weighted)
    with pytest.raises(ValueError, match="keep_queries=True"):
        layer_mass(prefill(llama, prompt(LENGTH)))


def test_the_search_keeps_the_smallest_mass_largest(llama):
    curves = prefix_curves(layer_mass(prefill(llama, prompt(LENGTH), keep_queries=True)))
    for total in (12, 30, 61):
        best = smallest_mass(curves, prefix_search(curves, total, 2))
        draw = generator(total)
        for _ in range(50):
            cuts = torch.randint(3, LENGTH + 1, (3,), generator=draw).tolist()
            if sum(cuts) <= total:
                assert smallest_mass(curves, cuts) <= best
    assert prefix_search(curves, 3 * LENGTH) == [LENGTH] * 3


def test_ratios_hold_what_they_say_at_any_length(llama):
    counts = [30, 14, 6]
    policy = prefixkv([count / LENGTH for count in counts], distance=-3)
    assert prefill(llama, prompt(LENGTH), policy).cache.held == counts
    _, cache, _ = prefill(llama, prompt(2 * LENGTH), policy)
    assert cache.held == [2 * count for count in counts]
    kept = cache.positions(0)[0]
    assert torch.equal(kept[0], kept[1])
    assert {0, 2 * LENGTH - 1} <= set(kept[0].tolist())
    for step in range(1, 11):
        continue_with(llama, cache, prompt(1))
        for held, count in zip(cache.held, counts, strict=True):
            assert 0 <= held - count / LENGTH * (2 * LENGTH + step) < 1


def test_the_best_of_the_layer_stay(llama):
    ids = prompt(LENGTH)
    mass = layer_mass(prefill(llama, ids, keep_queries=True))[0]
    kept = prefill(llama, ids, prefixkv([0.25] * 3)).cache.positions(0)[0, 0].tolist()
    inner = mass[1:-1].topk(8).indices.add(1).tolist()
    assert kept == sorted([0, LENGTH - 1, *inner])


def test_what_cannot_be_is_refused(llama):
    for ratios in ([], [0.5, 0.0], [1.5]):
        with pytest.raises(ValueError, match="prefixkv"):
            prefixkv(ratios)
    with pytest.raises(ValueError, match="2 budgets for 3 layers"):
        prefill(llama, prompt(LENGTH), prefixkv([0.5, 0.5]))
