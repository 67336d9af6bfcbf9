"""The experiments behind the notebook on reuse across requests and `datasets/kv_reuse`.

`shots` asks a small model with and without cached examples; `serve` plays a stream of requests through selector, proxy,
bandit and cache with the success rates that were measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import xarray as xr
from torch import Tensor

from memlens import check
from memlens.recall.embed import embed
from memlens.recall.routing import (
    FEATURES,
    GainProxy,
    LinearBandit,
    ThresholdGrid,
    example_features,
    load_bias,
    select_examples,
)
from memlens.recall.store import Example, ExampleCache
from memlens.tasks.house_formats import FAMILIES, Request, complete, house_requests

__all__ = ["ARMS", "House", "Served", "house", "prompts", "serve", "shots", "stream", "success_rates"]

BATCH = 8  # prompts
ASKED, CACHED = 12, 12  # of each family: requests to answer, and answered ones in the cache
PRICES = (0.05, 0.6)  # of small with examples and of large, in units of a success
THETAS = (0.0, -1.0, 0.1)  # least net gain of an example; -1 shows some whatever is predicted
TOKEN_PRICE, TOKENS = 0.0002, 30  # of showing an example
ARMS = ("zero-shot", "1 similar", "3 similar", "3 other", "cached answer")


class House(NamedTuple):
    requests: list[Request]  # one of each family in turn
    vectors: Tensor  # (n, 384)
    cache: ExampleCache
    families: list[str]  # of the cached examples


def house(seed: int = 0) -> House:
    """Twelve requests of each family, and a cache of twelve other answered ones of each."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {family: house_requests(family, ASKED + CACHED, generator=generator) for family in FAMILIES}
    asked = [drawn[family][place] for place in range(ASKED) for family in FAMILIES]
    stored = [request for family in FAMILIES for request in drawn[family][ASKED:]]
    cache = ExampleCache.empty()
    for request, vector in zip(stored, embed([request.text for request in stored]), strict=True):
        cache = cache.insert(Example(request.text, request.answer, tokens=TOKENS), vector)
    return House(asked, embed([request.text for request in asked]), cache, [request.family for request in stored])


def nearest(world: House, place: int, count: int, *, same: bool | None = None) -> list[int]:
    """The examples nearest to a request: any (None), those of its own family (True), or of the others (False)."""
    idx, _ = world.cache.near(world.vectors[place], len(world.families))
    own = world.requests[place].family
    fits = [i for i in idx.tolist() if same is None or (world.families[i] == own) == same]
    return fits[:count]


def prompts(world: House, arm: str, chosen: Sequence[int]) -> list[str]:
    """What the small model reads in an arm, for the requests at these places."""
    check.one_of("prompts", ARMS[:-1], arm=arm)
    count, same = {"zero-shot": (0, None), "1 similar": (1, None), "3 similar": (3, None), "3 other": (3, False)}[arm]
    return [world.cache.prompt(world.requests[i].text, nearest(world, i, count, same=same)) for i in chosen]


def shots(model: Any, tokenizer: Any, world: House, arms: Sequence[str], chosen: Sequence[int]) -> xr.DataArray:
    """Whether each answer is exactly right, (arm, request) bool; "cached answer" returns that of the nearest example."""
    for arm in arms:
        check.one_of("shots", ARMS, arm=arm)
    asked = [arm for arm in arms if arm != "cached answer"]
    texts = [text for arm in asked for text in prompts(world, arm, chosen)]
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))  # like lengths together: little padding
    said: dict[int, str] = {}
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        said.update(zip(part, complete(model, tokenizer, [texts[i] for i in part]), strict=True))
    answers = {arm: [said[n * len(chosen) + i] for i in range(len(chosen))] for n, arm in enumerate(asked)}
    answers["cached answer"] = [world.cache.examples[nearest(world, i, 1)[0]].answer for i in chosen]
    rows = [[answer == world.requests[i].answer for answer, i in zip(answers[arm], chosen, strict=True)] for arm in arms]
    out = xr.DataArray(rows, {"arm": list(arms), "request": list(chosen)}, ("arm", "request"), "right")
    families = [world.requests[i].family for i in chosen]
    return out.assign_coords(family=("request", families)).assign_attrs(long_name="answered exactly", units="")


def success_rates(right: xr.DataArray) -> dict[str, tuple[float, ...]]:
    """For each family the small model's success with 0, 1, 2 and 3 examples of that family; 2 is halfway from 1 to 3."""
    by = right.groupby("family").mean("request")
    rates = {}
    for family in FAMILIES:
        zero, one, three = (float(by.sel(family=family, arm=arm)) for arm in ("zero-shot", "1 similar", "3 similar"))
        rates[family] = (zero, one, (one + three) / 2, three)
    return rates


def stream(count: int, *, generator: torch.Generator, pool: int = 60) -> list[Request]:
    """`count` requests of all families alike, drawn with repetition from the same `pool` of each."""
    fixed = torch.Generator().manual_seed(1)
    drawn = [house_requests(family, pool, generator=fixed) for family in FAMILIES]
    picks = torch.randint(len(FAMILIES) * pool, (count,), generator=generator).tolist()
    return [drawn[pick % len(FAMILIES)][pick // len(FAMILIES)] for pick in picks]


class Served(NamedTuple):
    reward: Tensor  # (n,) success - price of the model that served
    small: Tensor  # (n,) bool: whether the small model served
    cached: int  # examples at the end
    fixed: Tensor  # (2,) mean reward after the warm-up had every request gone to the small, or to the large model


def serve(
    rates: Mapping[str, Sequence[float]], world: House, requests: Sequence[Request], vectors: Tensor, *,
    generator: torch.Generator, load: float = 0.0, weight: float = 0.5, warm: int = 100, rule: str = "thompson",
    budget: float = float("inf"),
) -> Served:  # fmt: skip
    """Serve a stream: find examples, predict what they gain, choose a model, learn from the outcome, cache large answers.

    The large model is always right. The small one succeeds with its measured rate for the request's family and the number
    of shown examples of that family.

    Args:
        rates: from `success_rates`.
        world: from `house`; its examples are in the cache at first.
        vectors: (n, 384) of the requests.
        load: smoothed load of the large model, 1 at capacity; weight: of its bias.
        warm: requests before the means of `fixed` begin.
        budget: requests that the small model may serve.
    """
    check.within("serve", 0, len(requests) - 1, warm=warm)
    cache, families = world.cache, list(world.families)
    proxy = GainProxy.start(len(FEATURES)).learn(
        torch.tensor([1.0, 1.0, 1.0, TOKENS / 100, 0.0]), 0.5
    )  # shows some at first
    grid = ThresholdGrid.start(THETAS, share=0.05)
    bandit = LinearBandit(rule, generator, arms=2, dim=4)
    reward, small, could = [], [], []
    for request, vector in zip(requests, vectors, strict=True):
        idx, cosine = cache.near(vector)
        held = [cache.examples[i] for i in idx.tolist()]
        tokens = [example.tokens for example in held]
        features = example_features(cosine, [e.quality for e in held], tokens, [e.past for e in held])
        gain = proxy.predict(features)
        theta = grid.draw(generator)
        chosen = select_examples(gain, tokens, price=TOKEN_PRICE, theta=THETAS[theta], limit=3)
        best, mean = (float(gain[chosen].max()), float(gain[chosen].mean())) if len(chosen) else (0.0, 0.0)
        x = torch.tensor([1.0, best, mean, len(request.text) / 100])
        price = (PRICES[0] if budget > sum(small) else float("inf"), PRICES[1])
        arm = bandit.choose(x, price=price, bias=(0.0, load_bias(load, weight=weight)))
        shown = idx[chosen].tolist()
        similar = sum(families[i] == request.family for i in shown)
        chance = rates[request.family][similar]
        success = float(torch.rand((), generator=generator)) < (chance if arm == 0 else 1.0)
        bandit = bandit.learn(arm, x, float(success))
        if arm == 0:
            grid = grid.learn(theta, float(success))
            for row in chosen.tolist():
                proxy = proxy.learn(features[row], float(success) - rates[request.family][0])
            cache = cache.credit(shown, gain=float(success), offload=float(success)) if shown else cache
        else:
            cache = cache.insert(Example(request.text, request.answer, tokens=TOKENS), vector)
            families.append(request.family)
        reward.append(float(success) - PRICES[arm])
        small.append(arm == 0)
        could.append(chance)
    fixed = torch.tensor([sum(could[warm:]) / len(could[warm:]) - PRICES[0], 1 - PRICES[1]])
    return Served(torch.tensor(reward), torch.tensor(small), len(cache.examples), fixed)
