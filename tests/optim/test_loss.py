"""The barrier by hand and everywhere continuous; advantages against their definition."""

import pytest
import torch

from memlens.optim.loss import grpo_advantage, soft_barrier


@pytest.mark.parametrize("floor", [0.0, 0.3])
@pytest.mark.parametrize("margin", [0.1, 0.5, 1.0])
def test_the_barriers_corners_and_middle(margin, floor, assert_close):
    at = torch.tensor([0.0, 1 - margin, 1.0, 1 + margin, 9.0]) * 1000
    assert_close(soft_barrier(at, 1000, margin, floor), torch.tensor([1.0, 1.0, (1 + floor) / 2, floor, floor]))


def test_it_falls_and_does_not_jump():
    value = soft_barrier(torch.arange(0, 3000), 1000, 0.2)
    steps = value.diff()
    assert float(steps.max()) <= 0
    assert float(steps.min()) >= -1 / 400 - 1e-6
    assert value.dtype == torch.float32


@pytest.mark.parametrize("how", [(0, 0.2), (-5, 0.2), (100, 0.0), (100, 1.5), (100, 0.2, 1.1), (100, 0.2, -0.1)])
def test_a_barrier_that_makes_no_sense_is_refused(how):
    with pytest.raises(ValueError, match="soft_barrier"):
        soft_barrier(torch.tensor([1.0]), *how)
    with pytest.raises(ValueError, match="length"):
        soft_barrier(torch.tensor([-1.0]), 100, 0.2)


def test_advantages_sum_to_zero_with_unit_deviation(generator, assert_close):
    advantage = grpo_advantage(torch.rand(6, 8, generator=generator))
    assert_close(advantage.sum(-1), torch.zeros(6))
    assert_close(advantage.square().mean(-1), torch.ones(6))
    assert_close(grpo_advantage(torch.tensor([[0.0, 1.0, 1.0, 0.0]])), torch.tensor([[-1.0, 1.0, 1.0, -1.0]]))


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e-30])
def test_a_group_of_equal_rewards_gives_zero(value):
    assert grpo_advantage(torch.full((2, 7), value)).tolist() == [[0.0] * 7] * 2


def test_bad_rewards_are_refused():
    for rewards, word in [
        (torch.tensor([[1.0, float("nan")]]), "nan"),
        (torch.ones(3), "shape"),
        (torch.ones(3, 1), "samples"),
    ]:
        with pytest.raises(ValueError, match=word):
            grpo_advantage(rewards)
