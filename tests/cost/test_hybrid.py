"""The inequality is the comparison of two throughputs; a trace keeps within its devices' time."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlens.cost.serving import (
    HYBRIDS,
    STRATEGIES,
    Job,
    apex_threshold,
    hybrid_throughput,
    prefers_pipelining,
    simulate_hybrid,
)

TIMES = st.floats(1e-3, 1e3)
RATES = st.floats(1e-2, 1e2)
TRACE = [Job(600, 40), Job(900, 25), Job(300, 60)] * 12
POLICIES = ("gpu", "pipelining", "overlap", "apex", "best")


@given(T_gl=TIMES, T_ga=TIMES, N_G=RATES, N_C=RATES)
def test_the_inequality_is_the_comparison(T_gl, T_ga, N_G, N_C):
    profile = {"N_G": N_G, "N_C": N_C, "T_gl": T_gl, "T_ga": T_ga}
    rates = {name: hybrid_throughput(name, **profile) for name in STRATEGIES}
    if not math.isclose(rates["pipelining"], rates["gpu"], rel_tol=1e-9):
        assert prefers_pipelining(**profile) == (rates["pipelining"] > rates["gpu"])
    assert rates["overlap"] >= max(rates["gpu"], rates["pipelining"])
    assert rates["overlap"] / rates["gpu"] == pytest.approx(1 + N_C / N_G * (1 + T_gl / T_ga))


@given(ratio=st.floats(1e-3, 1e3))
def test_the_threshold_is_least_at_one_over_root_two(ratio):
    least = apex_threshold(1 / math.sqrt(2), 1.0)
    assert least == pytest.approx(3 + 2 * math.sqrt(2))
    assert apex_threshold(ratio, 1.0) >= least - 1e-9


def test_the_papers_example():
    gain = hybrid_throughput("overlap", N_G=1, N_C=0.1, T_gl=8.4, T_ga=1) / hybrid_throughput(
        "gpu", N_G=1, N_C=0.1, T_gl=8.4, T_ga=1
    )
    assert gain == pytest.approx(1.94)
    assert max(apex_threshold(1.0, share) for share in (0.5, 1.0, 1.5)) <= 7.5


@given(T_gl=TIMES, T_ga=TIMES, N_G=RATES)
def test_without_a_cpu_every_strategy_is_the_gpu(T_gl, T_ga, N_G):
    rates = {hybrid_throughput(name, N_G=N_G, N_C=0, T_gl=T_gl, T_ga=T_ga) for name in STRATEGIES}
    assert len(rates) == 1
    assert not prefers_pipelining(N_G=N_G, N_C=0, T_gl=T_gl, T_ga=T_ga)


@given(T_gl=TIMES, T_ga=TIMES, N_G=RATES, N_C=RATES, factor=st.floats(1.0, 5.0))
@settings(max_examples=50)
def test_a_faster_cpu_is_never_slower(T_gl, T_ga, N_G, N_C, factor):
    for name in ("gpu", "overlap", "pipelining"):
        slow, fast = (hybrid_throughput(name, N_G=N_G, N_C=n, T_gl=T_gl, T_ga=T_ga) for n in (N_C, factor * N_C))
        assert fast >= slow * (1 - 1e-12)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("preset", HYBRIDS)
def test_a_trace_is_answered_within_the_devices_time(preset, policy):
    data = simulate_hybrid(TRACE, HYBRIDS[preset], policy)
    assert float(data.tokens.sum()) == pytest.approx(sum(job.output for job in TRACE))
    assert (data.busy <= data.wall * (1 + 1e-9)).all()
    assert (data.busy >= 0).all()
    assert data.busy.max("device").values == pytest.approx(data.wall.values)  # somebody always works
    if policy == "gpu":
        assert float(data.tokens.sel(device="cpu").sum()) == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_a_host_without_bandwidth_leaves_the_gpu_alone(policy):
    alone = HYBRIDS["t4"]._replace(host=HYBRIDS["t4"].host._replace(bandwidth=0.0))
    data, gpu = simulate_hybrid(TRACE, alone, policy), simulate_hybrid(TRACE, alone, "gpu")
    assert data.throughput == gpu.throughput
    assert set(data.strategy.values) == {"gpu"}


def test_one_request_by_hand():
    device = HYBRIDS["t4"]
    data = simulate_hybrid([Job(100, 1)], device, "gpu")
    wanted = 32 * (device.linear(1 + 100) + device.attend(100))
    assert data.wall.values.tolist() == pytest.approx([wanted])


def test_an_overlapped_request_takes_a_layer_for_each_iteration():
    device = HYBRIDS["t4"]
    big = device.room // 2 + 1
    data = simulate_hybrid([Job(big - 200, 200), Job(big - 3, 3)], device, "overlap")
    cpu = data.tokens.sel(device="cpu")
    last = int((cpu > 0).values.nonzero()[0][-1])
    assert int(data.iterations[: last + 1].sum()) == 3 * device.shape.num_hidden_layers


def test_refusals():
    with pytest.raises(ValueError, match="T_ga=0; expected a positive T_ga"):
        apex_threshold(1.0, 0)
    with pytest.raises(ValueError, match="strategy='overlapp'"):
        hybrid_throughput("overlapp", N_G=1, N_C=1, T_gl=1, T_ga=1)
    with pytest.raises(ValueError, match="N_C=-1"):
        hybrid_throughput("gpu", N_G=1, N_C=-1, T_gl=1, T_ga=1)
    with pytest.raises(ValueError, match="a request of 9000 tokens; expected at most"):
        simulate_hybrid([Job(8000, 1000)], HYBRIDS["t4"], "gpu")
    with pytest.raises(ValueError, match="requests=0"):
        simulate_hybrid([], HYBRIDS["t4"], "gpu")
    with pytest.raises(ValueError, match="policy='neo'"):
        simulate_hybrid(TRACE, HYBRIDS["t4"], "neo")
