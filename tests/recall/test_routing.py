"""Selector, router and manager: regression and knapsack against other solvers, decisions by hand, what is refused."""

from itertools import combinations, pairwise

import pytest
import torch

from memlens.recall import routing
from memlens.recall.routing import (
    LinearBandit,
    Ridge,
    ThresholdGrid,
    example_features,
    knapsack_keep,
    load_bias,
    replay_gain,
    replay_order,
    select_examples,
)  # fmt: skip
from memlens.recall.store import CategoryPolicy


def history(generator, n=40, dim=4):
    x = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    return x, x @ torch.tensor([1.0, -2.0, 0.5, 0.0]).double() + 0.1 * torch.randn(n, generator=generator)


def test_the_mean_is_the_ridge_solution_on_the_history(generator, assert_close):
    x, y = history(generator)
    ridge = Ridge.start(4, ridge=0.7)
    for row, outcome in zip(x, y, strict=True):
        ridge = ridge.learn(row, float(outcome))
    # least squares on the data with sqrt(penalty) I below it, by QR: another route to the same minimum
    tall, right = torch.cat((x, 0.7**0.5 * torch.eye(4).double())), torch.cat((y, torch.zeros(4).double()))
    assert_close(ridge.mean, torch.linalg.lstsq(tall, right[:, None]).solution[:, 0])
    assert_close(ridge.predict(x), x @ ridge.mean)


def test_each_arm_of_the_bandit_learns_from_its_own_history(generator, assert_close):
    x, y = history(generator)
    bandit = LinearBandit(generator=generator, arms=2, dim=4)
    alone = Ridge.start(4)
    for number, (row, outcome) in enumerate(zip(x, y, strict=True)):
        bandit = bandit.learn(number % 2, row, float(outcome))
        alone = alone.learn(row, float(outcome)) if number % 2 else alone
    assert_close(bandit.regressions[1].mean, alone.mean)
    assert not torch.allclose(bandit.regressions[0].mean, alone.mean)


def test_thompson_draws_have_the_posteriors_mean_and_variance(generator):
    x, y = history(generator)
    bandit = LinearBandit(generator=generator, arms=1, dim=4, sigma=0.5)
    for row, outcome in zip(x, y, strict=True):
        bandit = bandit.learn(0, row, float(outcome))
    probe = torch.tensor([1.0, 0.3, -0.5, 2.0]).double()
    draws = torch.stack([bandit.values(probe)[0] for _ in range(4000)])
    ridge = bandit.regressions[0]
    variance = 0.25 * probe @ torch.linalg.inv(ridge.gram) @ probe
    assert float(draws.mean()) == pytest.approx(float(probe @ ridge.mean), abs=4 * float((variance / 4000) ** 0.5))
    assert float(draws.var() / variance) == pytest.approx(1, abs=0.1)


def test_ucb_adds_the_standard_deviation_and_draws_nothing(generator, assert_close):
    bandit = LinearBandit("ucb", arms=1, dim=4, sigma=2.0).learn(0, torch.tensor([1.0, 2.0, 0.0, 0.0]), 1.0)
    x = torch.tensor([0.5, 1.0, -1.0, 0.0]).double()
    ridge = bandit.regressions[0]
    want = x @ ridge.mean + 2 * (x @ torch.linalg.inv(ridge.gram) @ x).sqrt()
    assert_close(bandit.values(x)[0], want)
    assert torch.equal(bandit.values(x), bandit.values(x))


@pytest.mark.parametrize("rule", routing.RULES)
def test_it_finds_the_arm_that_pays_in_each_context(rule, generator):
    bandit = LinearBandit(rule, generator, arms=2, dim=2)
    right = 0
    for step in range(300):
        x = torch.tensor([1.0, float(torch.randint(2, (), generator=generator))])
        arm = bandit.choose(x, price=(0.0, 0.0))
        best = int(x[1])
        right += step >= 200 and arm == best
        bandit = bandit.learn(arm, x, float(arm == best))
    assert right >= 90


def test_price_and_load_move_the_choice_and_a_closed_arm_is_never_taken():
    bandit, x = LinearBandit("ucb", arms=2, dim=1, sigma=0.0), torch.ones(1)
    for arm, reward in ((0, 0.5), (1, 0.9)):
        for _ in range(200):
            bandit = bandit.learn(arm, x, reward)
    assert bandit.choose(x, price=(0.0, 0.0)) == 1
    assert bandit.choose(x, price=(0.0, 0.5)) == 0
    assert bandit.choose(x, price=(0.0, 0.0), bias=(0.0, load_bias(3.0))) == 0
    assert bandit.choose(x, price=(float("inf"), 9.0)) == 1  # nothing left for the small model
    with pytest.raises(ValueError, match="every arm"):
        bandit.choose(x, price=(float("inf"), float("inf")))
    with pytest.raises(ValueError, match="price"):
        bandit.choose(x, price=(-0.1, 0.0))
    with pytest.raises(ValueError, match="bias"):
        bandit.choose(x, price=(0.1, 0.0), bias=(0.0,))


def test_learning_leaves_the_old_bandit_alone():
    old = LinearBandit("ucb", arms=2, dim=1)
    new = old.learn(0, torch.ones(1), 1.0)
    assert float(old.regressions[0].mean) == 0 < float(new.regressions[0].mean)


@pytest.mark.parametrize(
    ("how", "word"),
    [({"rule": "greedy"}, "rule"), ({"arms": 0}, "arms"), ({"sigma": -1.0}, "sigma"), ({}, "without a generator")],
)
def test_a_bandit_that_makes_no_sense_is_refused(how, word):
    with pytest.raises(ValueError, match=word):
        LinearBandit(**how)


def test_load_bias_is_zero_up_to_capacity_then_rises_to_its_weight():
    values = [load_bias(load / 4, weight=0.5) for load in range(40)]
    assert values[:5] == [0.0] * 5
    assert all(a < b for a, b in pairwise(values[4:31]))
    assert max(values) <= 0.5
    with pytest.raises(ValueError, match="ema"):
        load_bias(-0.1)


# --- selector ---


def test_examples_are_taken_by_net_gain():
    gain, tokens = [0.30, 0.50, 0.10, 0.31, 0.31], [10, 300, 0, 10, 10]
    assert select_examples(gain, tokens, price=0.001).tolist() == [3, 4, 0, 1, 2]
    assert select_examples(gain, tokens, price=0.001, theta=0.15).tolist() == [3, 4, 0, 1]
    assert select_examples(gain, tokens, price=0.001, limit=1).tolist() == [3]
    assert select_examples(gain, tokens, price=1.0, theta=0.2).tolist() == []
    assert select_examples([], [], price=0.1).tolist() == []


@pytest.mark.parametrize(
    ("gain", "tokens", "price"), [([float("nan")], [1], 0.1), ([0.1], [-1], 0.1), ([0.1], [1], -0.1), ([0.1], [1, 2], 0.1)]
)
def test_bad_candidates_are_refused(gain, tokens, price):
    with pytest.raises(ValueError, match="select_examples"):
        select_examples(gain, tokens, price=price)


def test_features_are_laid_out_as_named(assert_close):
    row = example_features(torch.tensor([0.8]), torch.tensor([1.0]), torch.tensor([40.0]), torch.tensor([0.2]))
    assert_close(row, torch.tensor([[1.0, 0.8, 1.0, 0.4, 0.2]]).double(), rtol=1e-6)
    assert row.shape[1] == len(routing.FEATURES)


def test_a_grid_explores_a_share_and_settles_on_the_best(generator):
    grid, tried = ThresholdGrid.start((0.0, 0.1, 0.2), share=0.2), 0
    for _ in range(600):
        place = grid.draw(generator)
        tried += place != grid.best
        grid = grid.learn(place, (0.2, 0.8, 0.5)[place] + 0.1 * float(torch.randn((), generator=generator)))
    assert grid.values[grid.best] == 0.1
    assert 0.05 < tried / 600 < 0.25


# --- manager ---


def test_replay_gain_and_order_by_hand():
    gain = replay_gain([0, 1, 1, 2], [0.5, 0.0, 0.8, 1.0], [1.0, 2.0, 2.0, 9.0], examples=4)
    torch.testing.assert_close(gain, torch.tensor([0.5, 2.4, 0.0, 0.0]).double())
    assert replay_order(gain, cost=0.4).tolist() == [1, 0]
    assert replay_order(gain, cost=0.6).tolist() == [1]
    assert replay_order(gain, cost=3.0).tolist() == []


@pytest.mark.parametrize("cost", [-1.0, float("nan")])
def test_negative_costs_are_refused(cost):
    with pytest.raises(ValueError, match="cost"):
        replay_gain([0], [0.5], [cost], examples=1)
    with pytest.raises(ValueError, match="cost"):
        replay_order([1.0], cost=cost)
    with pytest.raises(ValueError, match=r"value|weight"):
        knapsack_keep([1.0], [cost], 3)


@pytest.mark.parametrize("seed", range(12))
def test_the_knapsack_is_the_best_of_all_sets(seed):
    generator = torch.Generator().manual_seed(seed)
    value = torch.randint(0, 9, (10 + seed % 3,), generator=generator).double()
    weight = torch.randint(0, 40, value.shape, generator=generator).double()
    capacity = 60.0
    best = max(
        float(value[list(chosen)].sum())
        for size in range(len(value) + 1)
        for chosen in combinations(range(len(value)), size)
        if float(weight[list(chosen)].sum()) <= capacity
    )
    keep = knapsack_keep(value, weight, capacity)
    assert float(weight[keep].sum()) <= capacity
    assert float(value[keep].sum()) == best
    assert keep.tolist() == sorted(set(keep.tolist()))


def test_a_set_that_fills_the_knapsack_exactly_is_kept():
    assert knapsack_keep([1.0, 1.0, 1.5], [3, 4, 5], 7).tolist() == [0, 1]
    assert knapsack_keep([1.0, 1.0], [3, 0], 0).tolist() == [1]


def test_a_knapsack_in_bytes_stays_small_enough(generator):
    value = torch.rand(120, generator=generator)
    weight = torch.randint(1500, 4000, (120,), generator=generator)
    keep = knapsack_keep(value, weight, 100_000)
    greedy, left = 0.0, 100_000
    for place in (value / weight).argsort(descending=True).tolist():
        if int(weight[place]) <= left:
            greedy, left = greedy + float(value[place]), left - int(weight[place])
    assert int(weight[keep].sum()) <= 100_000
    assert float(value[keep].sum()) >= greedy - 1e-9


def test_adapt_loosens_with_load_down_to_the_floor():
    policy = CategoryPolicy(0.9, ttl=100.0, floor=0.87)
    assert routing.adapt(policy, 0.0) == policy
    assert routing.adapt(policy, 0.5, delta=0.04, beta=1.0)[:2] == (pytest.approx(0.88), 150.0)
    assert routing.adapt(policy, 1.0, delta=0.1).threshold == 0.87
    with pytest.raises(ValueError, match="load"):
        routing.adapt(policy, 1.5)
