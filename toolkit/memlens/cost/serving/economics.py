"""When a cache in front of a model pays: the hit rate at which its search costs what its hits save."""

from __future__ import annotations

from memlens import check

__all__ = ["break_even", "expected_latency"]


def expected_latency(hit_rate: float, search: float, fetch: float, model: float) -> float:
    """Mean time of a request behind a cache: search + hit_rate fetch + (1 - hit_rate) model.

    Args:
        hit_rate: in [0, 1].
        search: of the cache, paid by every request; fetch: of a stored answer, paid by hits; model: paid by misses. One
            unit of time, at least 0.
    Raises:
        ValueError: a rate outside [0, 1], a negative time.
    """
    check.within("expected_latency", 0, 1, hit_rate=hit_rate)
    check.within("expected_latency", 0, float("inf"), search=search, fetch=fetch, model=model)
    return search + hit_rate * fetch + (1 - hit_rate) * model


def break_even(search: float, fetch: float, model: float) -> float:
    """The hit rate above which a cache lowers the mean time: search / (model - fetch).

    It is above 1 where no hit rate pays.

    Args:
        search, fetch, model: times as in `expected_latency`; model above fetch.
    Raises:
        ValueError: a negative time; a fetch that takes as long as the model.
    Source: the economics of category-aware caching, arXiv:2510.26835; the formula is reconstructed.

    >>> break_even(30, 5, 205)
    0.15
    """
    check.within("break_even", 0, float("inf"), search=search, fetch=fetch, model=model)
    if fetch >= model:
        check.fail("break_even", f"fetch={fetch}, model={model}", "a fetch faster than the model", "no hit saves anything")
    return search / (model - fetch)
