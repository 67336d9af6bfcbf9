"""The achieved budget is returned and is the one that was asked for: every policy, each view of a budget, prompt and decoding."""

import math
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_presets import MODELS, ONCE, PRESETS, full, prompt, tiny

from memlens.kv.budget import achieved, bytes_of, ratio_of, tokens
from memlens.kv.cache import PolicyCache, compress, continue_with, prefill
from memlens.kv.policies import d2o, elastic, prefixkv

LOW = 8  # every preset can hold what it protects
model_of = cache(tiny)


@cache
def layout(model):
    config, kept = model.config, prefilled(model, 8).cache
    return {
        "layers": config.num_hidden_layers,
        "kv_heads": config.num_key_value_heads,
        "dim": kept.layers[0].keys.shape[-1],
    }


def prefilled(model, length):
    return prefill(model, prompt(length), keep_queries=True)


def ask(unit, count, length, layout):
    """(the request in its unit, with what does not come out even, the tokens that it means)."""
    request = {
        "tokens": {"ratio": ratio_of(count, length)},
        "ratio": {"ratio": min(1.0, (count + 0.4) / length)},
        "bytes": {"nbytes": bytes_of(count, **layout) + bytes_of(1, **layout) - 1},
    }[unit]
    return request, tokens(length=length, **request, **(layout if unit == "bytes" else {}))


@pytest.mark.parametrize("unit", ["tokens", "ratio", "bytes"])
@pytest.mark.parametrize("name", PRESETS)
@given(kind=st.sampled_from(sorted(MODELS)), length=st.integers(12, 26), share=st.floats(0, 1), more=st.integers(1, 3))
@settings(max_examples=3, deadline=None)
def test_the_achieved_budget_is_the_one_asked_for(name, unit, kind, length, share, more):
    model = model_of(kind)
    parts, count = layout(model), LOW + round(share * (length - LOW))
    request, budget = ask(unit, count, length, parts)
    assert budget == count
    held = prefill(model, prompt(length), PRESETS[name](budget)).cache
    check(achieved(held), budget, length, request, parts)
    for step in range(1, more + 1):
        continue_with(model, held, prompt(1, seed=step))
        now = budget + (step if name in ONCE else 0)
        check(achieved(held), min(now, length + step), length + step, None, parts)


def check(got, budget, seen, request, parts):
    assert got.tokens == (budget,) * parts["layers"]
    assert got.ratio == pytest.approx(budget / seen)
    assert got.nbytes == bytes_of(budget, **parts)
    if request and "nbytes" in request:
        assert request["nbytes"] - bytes_of(1, **parts) < got.nbytes <= request["nbytes"]
    elif request:
        assert abs(got.ratio - request["ratio"]) <= 0.5 / seen


SHARES = {
    "d2o": lambda share: d2o(share, first=2),
    "elastic": lambda share: elastic(1 - share, distance=-1),
    "prefixkv": lambda share: prefixkv([share, share / 2, 1.0], distance=-1),
}


@pytest.mark.parametrize("name", SHARES)
@given(length=st.integers(12, 26), share=st.floats(0.4, 1), more=st.integers(1, 3))
@settings(max_examples=8, deadline=None)
def test_a_share_is_that_of_the_tokens_seen_rounded_up(name, length, share, more):
    model, policy = model_of("llama"), SHARES[name](share)
    want = policy.share if isinstance(policy.share, tuple) else (policy.share,) * 3
    held = prefill(model, prompt(length), policy).cache
    for seen in range(length, length + more + 1):
        if seen > length:
            continue_with(model, held, prompt(1, seed=seen))
        assert achieved(held).tokens == tuple(math.ceil(one * seen - 1e-9) for one in want)
        assert achieved(held).ratio >= sum(want) / 3 - 1e-9


def test_compressing_late_achieves_the_same_and_an_empty_cache_nothing():
    model = model_of("llama")
    filled = prefilled(model, 20)
    assert achieved(filled.cache)[:2] == ((20,) * 3, 1.0)
    assert achieved(compress(filled, PRESETS["h2o"](9))).tokens == (9, 9, 9)
    layers = PRESETS["h2o"](9)._replace(budget=(12, 9, 6))
    assert achieved(compress(filled, layers)) == ((12, 9, 6), 9 / 20, bytes_of(9, **layout(model)))
    with pytest.raises(ValueError, match="tokens_seen >= 1"):
        achieved(PolicyCache(model.config, full()))
