"""Schedules: no device runs two things at once, order holds, and at t_a = t_m/(n - 1) nothing waits."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlens.cost.serving import replica, staggered_schedule

TIMES = st.floats(0.01, 10)


def spans(data, device):
    """(start, end) of what a device does, by start."""
    mine = data.device.values == device
    return sorted(zip(data.start.values[mine], data.end.values[mine], strict=True))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 5), tm=TIMES, ta=TIMES, slices=st.integers(1, 12))
def test_one_thing_at_a_time_and_in_order(n, tm, ta, slices):
    data = staggered_schedule(n, tm, ta, slices=slices)
    for device in range(n):
        runs = spans(data, device)
        assert all(end <= start + 1e-9 for (_, end), (start, _) in pairwise(runs))
    model, attention = data.sel(part="model"), data.sel(part="attention")
    assert (attention.start.values >= model.end.values - 1e-9).all()
    assert (model.start.values[:, 1:] >= attention.end.values[:, :-1] - 1e-9).all()
    np.testing.assert_allclose((model.end - model.start).values, tm)
    np.testing.assert_allclose((attention.end - attention.start).values, ta)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 6), ta=TIMES, slices=st.integers(2, 12))
def test_balanced_times_leave_no_bubble(n, ta, slices):
    data = staggered_schedule(n, (n - 1) * ta, ta, slices=slices)
    np.testing.assert_allclose(data.idle.values, 0, atol=1e-9 * slices * n)
    # nobody waits either: every part starts when the one before it ends
    model, attention = data.sel(part="model"), data.sel(part="attention")
    np.testing.assert_allclose(attention.start, model.end.values, rtol=1e-9)
    np.testing.assert_allclose(model.start.values[:, 1:], attention.end.values[:, :-1], rtol=1e-9)


def test_two_batches_stay_on_one_replica_and_more_rotate():
    assert {replica(j, k, 2) for j in range(2) for k in range(9)} == {0}
    assert [replica(0, k, 4) for k in range(4)] == [0, 1, 2, 0]
    assert [replica(1, k, 4) for k in range(4)] == [1, 2, 0, 1]


def test_two_batches_take_the_longer_of_the_two_times():
    for tm, ta in ((1.0, 0.4), (0.5, 2.0)):
        data = staggered_schedule(2, tm, ta, slices=40)
        assert float(data.end.max()) == pytest.approx(2 * 40 * max(tm, ta), rel=0.03)


def test_refusals():
    with pytest.raises(ValueError, match="n=1; expected n >= 2"):
        staggered_schedule(1, 1.0, 1.0)
    with pytest.raises(ValueError, match="tm=0, ta=1; expected positive times"):
        staggered_schedule(2, 0, 1)
    with pytest.raises(ValueError, match="slices=0"):
        staggered_schedule(2, 1, 1, slices=0)
