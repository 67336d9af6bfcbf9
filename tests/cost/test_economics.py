"""When a cache pays: the algebra against a simulated stream, and what is refused."""

import pytest
import torch

from memlens.cost.serving import break_even, expected_latency


@pytest.mark.parametrize(("search", "fetch", "model"), [(30.0, 5.0, 200.0), (2.0, 5.0, 60.0), (0.0, 0.0, 1.0)])
def test_at_break_even_a_cache_changes_nothing(search, fetch, model):
    rate = break_even(search, fetch, model)
    assert expected_latency(rate, search, fetch, model) == pytest.approx(model)
    assert expected_latency(min(1.0, rate + 0.01), search, fetch, model) < model
    if rate >= 0.01:
        assert expected_latency(rate - 0.01, search, fetch, model) > model


def test_the_mean_is_that_of_a_stream(generator):
    hits = torch.rand(200_000, generator=generator) < 0.3
    times = 2 + torch.where(hits, 5.0, 80.0)
    assert float(times.mean()) == pytest.approx(expected_latency(float(hits.float().mean()), 2, 5, 80), rel=1e-5)


def test_a_cache_slower_than_the_model_never_pays():
    assert break_even(30, 5, 20) > 1


@pytest.mark.parametrize("times", [(-1, 5, 80), (2, -5, 80), (2, 5, -80), (float("nan"), 5, 80)])
def test_negative_times_are_refused(times):
    with pytest.raises(ValueError, match="within"):
        break_even(*times)


def test_a_fetch_as_slow_as_the_model_is_refused():
    with pytest.raises(ValueError, match="no hit saves anything"):
        break_even(2, 80, 80)
    with pytest.raises(ValueError, match="hit_rate"):
        expected_latency(1.2, 2, 5, 80)
