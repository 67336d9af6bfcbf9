"""Which stored examples to show, which model to ask, what to improve at night, what to keep.

    gain = proxy.predict(example_features(cosine, quality, tokens, past))       # (n,) gain in the chance of success
    chosen = select_examples(gain, tokens, price=0.0005)                        # at most five positions, best first
    arm = bandit.choose(x, price=(0.1, 0.4), bias=(0.0, load_bias(load)))
    bandit = bandit.learn(arm, x, reward)

Everything is a value: `learn` returns a new one. Numbers are float64; a `torch.Generator` is passed where something is drawn.

Source: IC-Cache, arXiv:2501.12689, for the selector, the router and the manager; the constants and the exact features are ours.
Category-aware caching, arXiv:2510.26835, for `adapt`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from memlens import check

if TYPE_CHECKING:
    from memlens.recall.store import CategoryPolicy

__all__ = [
    "GainProxy", "LinearBandit", "Ridge", "ThresholdGrid", "adapt", "example_features", "knapsack_keep", "load_bias",
    "replay_gain", "replay_order", "select_examples",
]  # fmt: skip

RULES = ("thompson", "ucb")


def _row(op: str, **values: Tensor | Sequence[float]) -> list[Tensor]:
    """Vectors of one length as float64, finite."""
    rows = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in values.items()}
    check.shapes(op, **{name: (row, "n") for name, row in rows.items()})
    check.finite(op, **rows)
    return list(rows.values())


class Ridge(NamedTuple):
    """Linear regression with a penalty, updated one row at a time: gram = ridge I + sum x x^T, moment = sum y x."""

    gram: Tensor  # (d, d) float64
    moment: Tensor  # (d,)

    @classmethod
    def start(cls, dim: int, *, ridge: float = 1.0) -> Ridge:
        """No data yet; `ridge` > 0 is the penalty on |w|^2."""
        check.at_least("Ridge", 1, dim=dim)
        if not ridge > 0:
            check.fail("Ridge", f"ridge={ridge}", "a penalty above 0", "the solution would not be unique")
        return cls(ridge * torch.eye(dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64))

    def learn(self, x: Tensor, y: float) -> Ridge:
        """With one more row x (d,) and its outcome."""
        x = self._row(x)
        check.finite("Ridge", y=torch.tensor(float(y)))
        return Ridge(self.gram + torch.outer(x, x), self.moment + float(y) * x)

    @property
    def mean(self) -> Tensor:
        """The weights (d,) that minimise sum (x.w - y)^2 + ridge |w|^2."""
        return torch.linalg.solve(self.gram, self.moment)

    def predict(self, x: Tensor) -> Tensor:
        """x.mean for rows x (n, d), as (n,)."""
        x = torch.as_tensor(x, dtype=torch.float64)
        check.shapes("Ridge", x=(x, f"n {len(self.moment)}"))
        return x @ self.mean

    def _row(self, x: Tensor) -> Tensor:
        x = torch.as_tensor(x, dtype=torch.float64)
        check.shapes("Ridge", x=(x, str(len(self.moment))))
        check.finite("Ridge", x=x)
        return x


# --- selector -------------------------------------------------------------------------------------------------------

FEATURES = ("one", "cosine", "quality", "tokens", "past gain")
GainProxy = Ridge  # started with len(FEATURES): what an example adds to the small model's chance of success


def example_features(cosine: Tensor, quality: Tensor, tokens: Tensor, past: Tensor) -> Tensor:
    """Rows (n, 5) for `GainProxy`: 1, cosine, quality of the stored answer in [0, 1], hundreds of tokens, mean gain so far."""
    cosine, quality, tokens, past = _row("example_features", cosine=cosine, quality=quality, tokens=tokens, past=past)
    check.within("example_features", 0, 1, quality=quality)
    return torch.stack((torch.ones_like(cosine), cosine, quality, tokens / 100, past), -1)


def select_examples(
    gain: Tensor | Sequence[float], tokens: Tensor | Sequence[float], *, price: float, theta: float = 0.0, limit: int = 5
) -> Tensor:  # fmt: skip
    """Positions (c,) of the candidates worth showing: largest gain - price tokens first, while it exceeds theta.

    Args:
        gain: (n,) predicted gain in the chance of success.
        tokens: (n,) what showing each one costs, at least 0.
        price: of a token, in units of gain; limit: most examples, 0 for none. Ties go to the lower position.
    Raises:
        ValueError: lengths that differ, NaN, negative tokens or price, a limit below 0.
    """
    gain, tokens = _row("select_examples", gain=gain, tokens=tokens)
    check.at_least("select_examples", 0, limit=limit)
    check.within("select_examples", 0, float("inf"), price=price, tokens=tokens)
    net = gain - price * tokens
    order = net.argsort(descending=True, stable=True)[:limit]
    return order[net[order] > theta]


class ThresholdGrid(NamedTuple):
    """Finds theta on live traffic: a small share of requests tries a value of the grid at random, the rest uses the best."""

    values: tuple[float, ...]
    reward: tuple[float, ...]  # summed
    count: tuple[int, ...]
    share: float  # of requests that explore, in [0, 1]

    @classmethod
    def start(cls, values: Sequence[float], *, share: float = 0.03) -> ThresholdGrid:
        check.at_least("ThresholdGrid", 1, values=len(values))
        check.within("ThresholdGrid", 0, 1, share=share)
        return cls(tuple(values), (0.0,) * len(values), (0,) * len(values), share)

    @property
    def best(self) -> int:
        """Place of the value with the largest mean reward; of those tried, the lower place wins a tie."""
        means = [r / n if n else -float("inf") for r, n in zip(self.reward, self.count, strict=True)]
        return max(range(len(means)), key=lambda place: (means[place], -place))

    def draw(self, generator: torch.Generator) -> int:
        """The place in the grid that the next request uses."""
        if float(torch.rand((), generator=generator)) < self.share:
            return int(torch.randint(len(self.values), (), generator=generator))
        return self.best

    def learn(self, place: int, reward: float) -> ThresholdGrid:
        reward_sum, count = list(self.reward), list(self.count)
        reward_sum[place] += reward
        count[place] += 1
        return self._replace(reward=tuple(reward_sum), count=tuple(count))


# --- router ---------------------------------------------------------------------------------------------------------


class LinearBandit:
    """A contextual bandit: each arm's reward is linear in the context, with ridge regression as what it knows.

    thompson: theta ~ N(mean, sigma^2 gram^-1), the arm with the largest x.theta. ucb: x.mean + sigma sqrt(x^T gram^-1 x).

    Args:
        rule: "thompson" or "ucb".
        generator: for thompson's draws; ucb draws nothing.
        arms, dim: how many arms, and numbers in a context.
        ridge: the penalty; sigma: how widely it explores, at least 0.
    Raises:
        ValueError: an unknown rule, no generator for thompson, sizes below 1, a negative sigma.
    """

    def __init__(
        self, rule: str = "thompson", generator: torch.Generator | None = None, *, arms: int = 2, dim: int = 4,
        ridge: float = 1.0, sigma: float = 0.3,
    ):  # fmt: skip
        check.one_of("LinearBandit", RULES, rule=rule)
        check.at_least("LinearBandit", 1, arms=arms, dim=dim)
        check.within("LinearBandit", 0, float("inf"), sigma=sigma)
        if rule == "thompson" and generator is None:
            check.fail(
                "LinearBandit", "thompson without a generator", "generator=torch.Generator()", "it draws its weights"
            )
        self.rule, self.generator, self.sigma = rule, generator, sigma
        self.regressions: tuple[Ridge, ...] = (Ridge.start(dim, ridge=ridge),) * arms

    def learn(self, arm: int, x: Tensor, reward: float) -> LinearBandit:
        """The bandit once it has seen that `arm` gave `reward` in context x (d,)."""
        check.within("LinearBandit", 0, len(self.regressions) - 1, arm=arm)
        twin = object.__new__(LinearBandit)
        twin.rule, twin.generator, twin.sigma = self.rule, self.generator, self.sigma
        new = self.regressions[arm].learn(x, reward)
        twin.regressions = (*self.regressions[:arm], new, *self.regressions[arm + 1 :])
        return twin

    def values(self, x: Tensor) -> Tensor:
        """What each arm is believed to give in context x, (arms,), explored by the rule."""
        x = self.regressions[0]._row(x)
        return torch.stack([self._value(ridge, x) for ridge in self.regressions])

    def _value(self, ridge: Ridge, x: Tensor) -> Tensor:
        lower = torch.linalg.cholesky(ridge.gram)
        if self.rule == "ucb":
            half = torch.linalg.solve_triangular(lower, x[:, None], upper=False)[:, 0]
            return x @ ridge.mean + self.sigma * half.norm()
        noise = torch.randn(len(x), generator=self.generator, dtype=torch.float64)
        # gram^-1 = L^-T L^-1, so L^-T noise has that covariance
        return x @ (ridge.mean + self.sigma * torch.linalg.solve_triangular(lower.T, noise[:, None], upper=True)[:, 0])

    def choose(self, x: Tensor, *, price: Sequence[float], bias: Sequence[float] | None = None) -> int:
        """The arm with the largest value - price - bias; ties go to the lower arm.

        Args:
            price: of each arm, in units of reward, at least 0; `inf` closes an arm (a budget that is used up).
            bias: of each arm, at least 0, e.g. `load_bias` for the model whose queue grows.
        Raises:
            ValueError: negative prices, another number of arms, or every arm closed.
        """
        arms = len(self.regressions)
        offsets = [torch.as_tensor([0.0] * arms if part is None else list(part)).double() for part in (price, bias)]
        for name, part in zip(("price", "bias"), offsets, strict=True):
            check.shapes("LinearBandit", **{name: (part, str(arms))})
            check.within("LinearBandit", 0, float("inf"), **{name: part})
        net = self.values(x) - offsets[0] - offsets[1]
        if bool(net.isneginf().all()):
            check.fail("LinearBandit", "every arm has an infinite price", "an arm that can be afforded")
        return int(net.argmax())


def load_bias(ema: float, *, weight: float = 1.0) -> float:
    """weight max(0, tanh(ema - 1)): what is taken from the large model's value once its load average exceeds capacity.

    Args:
        ema: smoothed load, 1 at capacity, at least 0.
        weight: reward given up at an endless load, at least 0.
    """
    check.within("load_bias", 0, float("inf"), ema=ema, weight=weight)
    return weight * max(0.0, float(torch.tanh(torch.tensor(float(ema) - 1, dtype=torch.float64))))


# --- manager --------------------------------------------------------------------------------------------------------


def replay_gain(example: Sequence[int], quality: Sequence[float], cost: Sequence[float], *, examples: int) -> Tensor:
    """G (examples,): for each, the sum over its uses of (1 - quality of what came out) x cost of the model that served.

    Raises:
        ValueError: quality outside [0, 1], a negative cost, an example out of range.
    """
    quality, cost = _row("replay_gain", quality=quality, cost=cost)
    place = torch.as_tensor(example, dtype=torch.int64)
    check.shapes("replay_gain", example=(place, "n"), quality=(quality, "n"))
    check.within("replay_gain", 0, examples - 1, example=place)
    check.within("replay_gain", 0, 1, quality=quality)
    check.within("replay_gain", 0, float("inf"), cost=cost)
    return torch.zeros(examples, dtype=torch.float64).index_add_(0, place, (1 - quality) * cost)


def replay_order(gain: Tensor | Sequence[float], *, cost: float) -> Tensor:
    """Which examples to generate again while the large model is idle: decreasing gain, until it is below the cost of one.

    Args:
        gain: (n,) from `replay_gain`, at least 0. Ties go to the lower position.
        cost: of one replay, at least 0.
    """
    (gain,) = _row("replay_order", gain=gain)
    check.within("replay_order", 0, float("inf"), gain=gain, cost=cost)
    order = gain.argsort(descending=True, stable=True)
    return order[gain[order] >= cost]


def knapsack_keep(value: Tensor | Sequence[float], weight: Tensor | Sequence[float], capacity: float) -> Tensor:
    """The set with the largest total value whose weight fits, exactly: positions (c,), ascending.

    Of sets equal in value the lighter is kept. It holds only sets that no other beats in both, so bytes need no rounding.

    Args:
        value, weight: (n,), at least 0; a weight of 0 always fits.
        capacity: in the unit of the weights, at least 0.
    Raises:
        ValueError: negative numbers, NaN, lengths that differ.
    """
    value, weight = _row("knapsack_keep", value=value, weight=weight)
    check.within("knapsack_keep", 0, float("inf"), value=value, weight=weight, capacity=capacity)
    front: list[tuple[float, float, tuple | None]] = [(0.0, 0.0, None)]  # weight, value, (item, rest): no set beats another
    for item, (v, w) in enumerate(zip(value.tolist(), weight.tolist(), strict=True)):
        added = [(have + w, worth + v, (item, rest)) for have, worth, rest in front if have + w <= capacity]
        front = _undominated(sorted(front + added, key=lambda entry: (entry[0], -entry[1])))
    kept, chain = [], front[-1][2]
    while chain is not None:
        kept.append(chain[0])
        chain = chain[1]
    return torch.tensor(sorted(kept), dtype=torch.int64)


def _undominated(sets: list[tuple]) -> list[tuple]:
    best, front = -1.0, []
    for entry in sets:
        if entry[1] > best:
            best = entry[1]
            front.append(entry)
    return front


def adapt(policy: CategoryPolicy, load: float, *, delta: float = 0.05, beta: float = 1.0) -> CategoryPolicy:
    """A category's policy while the model behind it is loaded: threshold - load delta, lifetime x (1 + load beta).

    The threshold never falls below the category's floor. At load 0 the policy is returned unchanged.

    Args:
        load: in [0, 1]; delta: in [0, 1], how far the threshold may fall; beta: at least 0, how far the lifetime may grow.
    """
    check.within("adapt", 0, 1, load=load, delta=delta)
    check.within("adapt", 0, float("inf"), beta=beta)
    threshold = max(policy.threshold - load * delta, min(policy.floor, policy.threshold))
    return policy._replace(threshold=threshold, ttl=policy.ttl * (1 + load * beta))
