"""Budgets: exact sums within bounds, and the views between tokens, ratios and bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlens.kv.budget import allocate, bytes_of, density_softmax, prefix_search, ratio_of, tokens, uniform

LAYOUT = {"layers": 30, "kv_heads": 3, "dim": 64}


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12), st.integers(0, 5), st.integers(0, 40), st.data())
@settings(max_examples=200, deadline=None)
def test_allocate_sums_exactly_within_its_bounds(weights, low, room, data):
    weights[0] += 0.1
    high = low + room
    total = data.draw(st.integers(low * len(weights), high * len(weights)))
    shares = allocate(weights, total, low=low, high=high)
    assert sum(shares) == total
    assert all(low <= share <= high for share in shares)


def test_allocate_by_hand():
    assert allocate([1.0, 1.0, 1.0], 10) == [4, 3, 3]  # the remainder goes to the lower index
    assert allocate([3.0, 1.0], 8) == [6, 2]
    assert allocate([100.0, 1.0, 1.0], 12, high=8) == [8, 2, 2]
    assert allocate([0.0, 1.0], 10, low=2) == [2, 8]


@pytest.mark.parametrize(
    ("weights", "total", "message"),
    [([1, 1], 1, "expected 2 to"), ([0, 0], 4, "positive"), ([1, -1], 4, "within"), ([1, float("nan")], 4, "expected")],
)
def test_allocate_refuses_what_cannot_be(weights, total, message):
    with pytest.raises(ValueError, match=message):
        allocate(weights, total)


@given(st.integers(1, 600), st.integers(1, 600))
@settings(max_examples=100, deadline=None)
def test_tokens_ratio_and_bytes_are_views_of_each_other(length, count):
    count = min(count, length)
    assert tokens(length=length, ratio=ratio_of(count, length)) == count
    assert tokens(length=length, nbytes=bytes_of(count, **LAYOUT), **LAYOUT) == count
    assert tokens(length=length, nbytes=bytes_of(count + 1, **LAYOUT) - 1, **LAYOUT) == count


@pytest.mark.parametrize(
    "options", [{}, {"ratio": 0.5, "nbytes": 10**6}, {"ratio": 0.0}, {"ratio": 1.5}, {"nbytes": 100, **LAYOUT}]
)
def test_budgets_that_say_nothing_are_refused(options):
    with pytest.raises(ValueError, match="tokens"):
        tokens(length=512, **options)


def curves(generator, layers=5, length=40):
    mass = torch.rand(layers, length, generator=generator).pow(torch.arange(1.0, layers + 1)[:, None] * 2)
    mass = mass.sort(dim=1, descending=True).values
    return (mass / mass.sum(1, keepdim=True)).cumsum(1)


def smallest(rows, counts):
    return min(float(row[count - 1]) for row, count in zip(rows, counts, strict=True))


def test_prefix_search_maximises_the_smallest_retained_mass(generator):
    rows, before = curves(generator), [0] * 5
    for total in range(10, 200, 7):
        counts = prefix_search(rows, total)
        assert sum(counts) == total
        assert all(new >= old for new, old in zip(counts, before, strict=True))
        assert smallest(rows, counts) >= smallest(rows, allocate([1.0] * 5, total)) - 1e-6
        before = counts
        for giver in range(5):  # no exchange of one token raises the smallest mass
            for taker in range(5):
                moved = [c + (i == taker) - (i == giver) for i, c in enumerate(counts)]
                if min(moved) >= 1 and max(moved) <= 40:
                    assert smallest(rows, moved) <= smallest(rows, counts) + 1e-6


def test_prefix_search_gives_equal_layers_equal_budgets(generator):
    rows = curves(generator, 1).expand(4, -1)
    assert prefix_search(rows, 40) == [10] * 4
    assert prefix_search(rows, 160) == [40] * 4
    for total, message in ((7, "within"), (161, "within")):
        with pytest.raises(ValueError, match=message):
            prefix_search(rows, total, protect=1)
    with pytest.raises(ValueError, match="falls"):
        prefix_search(rows.flip(1), 40)


def test_density_softmax_favours_flat_layers():
    share = density_softmax(torch.tensor([1.0, 100.0, 200.0]), 0.3)
    assert share[0] > share[1] > share[2]
    torch.testing.assert_close(density_softmax(torch.ones(4), 0.25), torch.full((4,), 0.25))
    torch.testing.assert_close(density_softmax(torch.ones(4), 1.0), torch.ones(4))
    with pytest.raises(ValueError, match="within"):
        density_softmax(torch.ones(4), 0.0)


def test_uniform():
    assert uniform(3, 7) == [7, 7, 7]
    with pytest.raises(ValueError, match="per_layer"):
        uniform(3, 0)
