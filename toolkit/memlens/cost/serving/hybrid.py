"""When it pays to let a slow CPU attend for requests whose cache does not fit the GPU: three strategies and one inequality.

For one layer, with GPU seconds T_gl (linear) and T_ga (attention), and N_G, N_C requests attended to in a second by GPU and CPU:

    gpu         N_G·T_ga / (T_gl + T_ga)
    pipelining  N_G·T_ga / (2·T_gl + T_ga) + N_C      two sub-batches, so linear work runs twice; the CPU works all the while
    overlap     N_G·T_ga / (T_gl + T_ga) + N_C        no split: CPU requests ride in the GPU's linear batch, one layer for each
                                                      iteration, and the CPU has an iteration's time for their attention

Pipelining beats the GPU alone iff N_G/N_C < 2·T_gl/T_ga + 3 + T_ga/T_gl. Overlap beats both whatever the times: it has the same
second term and a larger first one. It pays in latency (a layer for each iteration) and in requests that must be under way.
Source: arXiv:2506.03296, section 3; the overlap's throughput is derived here.
"""

from __future__ import annotations

from memlens import check

__all__ = ["STRATEGIES", "apex_threshold", "hybrid_throughput", "prefers_pipelining"]

STRATEGIES = ("gpu", "pipelining", "overlap")


def apex_threshold(T_gl: float, T_ga: float) -> float:
    """N_G/N_C below which pipelining beats the GPU alone; at least 3 + 2·sqrt(2), at T_gl/T_ga = 1/sqrt(2).

    Args:
        T_gl, T_ga: the GPU's seconds for a layer's linear part and its attention; any unit, positive.
    Raises:
        ValueError: a time that is not positive.
    """
    _positive("apex_threshold", T_gl=T_gl, T_ga=T_ga)
    return 2 * T_gl / T_ga + 3 + T_ga / T_gl


def hybrid_throughput(strategy: str, *, N_G: float, N_C: float, T_gl: float, T_ga: float) -> float:
    """Requests that get through a layer in a second, when there are always enough of them.

    Args:
        strategy: one of `STRATEGIES`.
        N_G, N_C: requests that GPU and CPU attend to in a second of nothing else; N_C may be 0.
        T_gl, T_ga: s, as `apex_threshold`.
    Raises:
        ValueError: an unknown strategy, a time or N_G that is not positive, a negative N_C.
    """
    check.one_of("hybrid_throughput", STRATEGIES, strategy=strategy)
    _positive("hybrid_throughput", T_gl=T_gl, T_ga=T_ga, N_G=N_G)
    check.within("hybrid_throughput", 0, float("inf"), N_C=N_C)
    if strategy == "gpu" or N_C == 0:  # nobody to split the batch for
        return N_G * T_ga / (T_gl + T_ga)
    return N_G * T_ga / (T_gl * (2 if strategy == "pipelining" else 1) + T_ga) + N_C


def prefers_pipelining(*, N_G: float, N_C: float, T_gl: float, T_ga: float, prefill: float = 0.0) -> bool:
    """The scheduler's test, N_G/N_C < threshold; prefill seconds in the iteration count as linear work."""
    return N_C > 0 and apex_threshold(T_gl + prefill, T_ga) > N_G / N_C


def _positive(op: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            check.fail(op, f"{name}={value}", f"a positive {name}")
