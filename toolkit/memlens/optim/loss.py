"""Rewards and advantages for training a model to be brief: a soft barrier around a length budget, groups of samples.

Source: efficient reasoning on the edge, arXiv:2603.16867 (the barrier), and GRPO, arXiv:2402.03300 (the advantage).
"""

from __future__ import annotations

from torch import Tensor

from memlens import check

__all__ = ["grpo_advantage", "soft_barrier"]


def soft_barrier(length: Tensor, budget: float, margin: float, floor: float = 0.0) -> Tensor:
    """1 up to (1 - margin) budget, `floor` from (1 + margin) budget on, a straight line between; shape of `length`.

    It multiplies the reward of a right answer.

    Args:
        length: tokens of the whole answer, at least 0. If only the thought counted, a model would hide it behind the closing tag.
        budget: tokens, above 0; margin: in (0, 1]; floor: in [0, 1].
    Raises:
        ValueError: a number outside its range.
    """
    check.within("soft_barrier", 0, float("inf"), length=length)
    check.within("soft_barrier", 0, 1, floor=floor)
    if not (budget > 0 and 0 < margin <= 1):
        check.fail("soft_barrier", f"budget={budget}, margin={margin}", "a budget above 0 and a margin in (0, 1]")
    over = (length.double() - (1 - margin) * budget) / (2 * margin * budget)
    return (1 - (1 - floor) * over.clamp(0, 1)).float()


def grpo_advantage(rewards: Tensor) -> Tensor:
    """(reward - mean) / std within each group, (groups, samples); 0 where all rewards of a group are equal.

    Such a group teaches nothing and so drops out of the gradient. The deviation is that of the group, not an estimate.

    Args:
        rewards: (groups, samples), finite, at least two samples.
    Raises:
        ValueError: another shape, NaN, a single sample.
    """
    check.shapes("grpo_advantage", rewards=(rewards, "groups samples"))
    check.finite("grpo_advantage", rewards=rewards)
    check.at_least("grpo_advantage", 2, samples=rewards.shape[1])
    rewards = rewards.double()
    centred = rewards - rewards.mean(-1, keepdim=True)
    same = (rewards == rewards[:, :1]).all(-1, keepdim=True)
    spread = rewards.std(-1, keepdim=True, correction=0).masked_fill(same, 1.0)
    return (centred / spread).masked_fill(same, 0.0).float()
