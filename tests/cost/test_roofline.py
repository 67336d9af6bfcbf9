"""Decode arithmetic by hand, what the link must carry, and how both scale."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlens.cost.devices import DEVICES, Device, device, link
from memlens.cost.memory import Llama
from memlens.cost.serving import (
    LLAMA3_70B,
    Pools,
    cost_per_token,
    min_bandwidth,
    parameters,
    roofline_times,
    token_bytes,
    wire_bytes,
)

TOY = Llama(8, 16, 2, 10, 4, 2)
MODEL, ATTENTION = Device("m", 1e6, 1e4, 1e4), Device("a", 1e5, 2e4, 1e5)
# per layer: q and o 8x8, k and v 4x8, three of 16x8; norms 5 of 8; head 10x8
TOY_WEIGHTS = 2 * (2 * 64 + 2 * 32 + 3 * 128) + 5 * 8 + 80


def test_a_toy_by_hand():
    assert parameters(TOY) == TOY_WEIGHTS
    assert token_bytes(TOY) == 2 * 4 * 2 * 2
    assert wire_bytes(TOY) == (2 + 2 / 2) * 2 * 8
    times = roofline_times(TOY, 3, 5, model=MODEL, attention=ATTENTION)
    assert times.model == pytest.approx(max(2 * TOY_WEIGHTS * 3 / 1e6, 2 * TOY_WEIGHTS / 1e4))
    assert times.attention == pytest.approx(max(4 * 8 * 2 * 3 * 5 / 1e5, 32 * 15 / 2e4))
    wanted = 48 * 3 * 2 / (0.2 * sum(times))
    assert min_bandwidth(TOY, 3, 5, model=MODEL, attention=ATTENTION) == pytest.approx(wanted)


def test_llama3_has_seventy_billion_weights():
    everything = parameters(LLAMA3_70B) + LLAMA3_70B.vocab_size * LLAMA3_70B.hidden_size
    assert everything == 70_553_706_496  # the released checkpoint's count


@given(slack=st.floats(0.01, 2), factor=st.floats(1.1, 10), batch=st.integers(1, 300), context=st.integers(1, 10_000))
def test_the_link_scales_as_one_over_the_slack(slack, factor, batch, context):
    pools = {"model": device("h100"), "attention": device("h20")}
    one, other = (min_bandwidth(LLAMA3_70B, batch, context, slack=s, **pools) for s in (slack, slack * factor))
    assert one == pytest.approx(other * factor)


@given(batch=st.integers(1, 300))
def test_what_crosses_the_link_falls_with_the_group_and_stays_above_two_widths(batch):
    widths = [wire_bytes(LLAMA3_70B._replace(num_key_value_heads=64 // group)) for group in (1, 2, 4, 8, 64)]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] == 2 * widths[-1] - 2 * 2 * 8192 * (2 / 64)  # 4·e·d against (2 + 2/64)·e·d
    assert all(width > 2 * 2 * 8192 for width in widths)
    # with the times held fixed the bandwidth falls alike
    pools = {"model": device("h100"), "attention": device("h100")}
    needs = [
        min_bandwidth(LLAMA3_70B._replace(num_key_value_heads=64 // g), batch, 0, **pools) for g in (1, 2, 4, 8, 64)
    ]  # fmt: skip
    assert needs == sorted(needs, reverse=True)


def test_batching_helps_the_model_and_not_attention():
    one, many = (roofline_times(LLAMA3_70B, batch, 4096, model=device("h100")) for batch in (1, 64))
    assert many.model == one.model  # weights are read once
    assert many.attention == pytest.approx(64 * one.attention)


def test_a_token_costs_what_the_iteration_and_the_rent_say():
    plan, prices = Pools(("h100", 4)), {"h100": 3600.0}
    batch = int((0.9 * 320e9 - 2 * parameters(LLAMA3_70B)) // (token_bytes(LLAMA3_70B) * 4096))
    times = roofline_times(LLAMA3_70B, batch, 4096, model=device("h100").times(4))
    cost = cost_per_token(plan, prices, shape=LLAMA3_70B, context=4096)
    assert cost == pytest.approx(sum(times) * 4 / batch)
    half = cost_per_token(plan, {"h100": 1800.0}, shape=LLAMA3_70B, context=4096)
    assert half == pytest.approx(cost / 2)


def test_two_pools_take_turns():
    plan = Pools(("h100", 2), ("h20", 4))
    batch = int(0.9 * 384e9 // (token_bytes(LLAMA3_70B) * 8192)) // 2
    times = roofline_times(LLAMA3_70B, batch, 8192, model=device("h100").times(2), attention=device("h20").times(4))
    rent = (2 * device("h100").price + 4 * device("h20").price) / 3600
    wanted = 2 * max(times) * rent / (2 * batch)
    assert cost_per_token(plan, shape=LLAMA3_70B, context=8192) == pytest.approx(wanted)


def test_what_does_not_fit_costs_infinitely_much():
    assert math.isinf(cost_per_token(Pools(("h100", 1)), shape=LLAMA3_70B, context=4096))


def test_presets_are_whole():
    assert all(each.flops > 0 and each.bandwidth > 0 and each.memory > 0 for each in DEVICES.values())
    assert device("t4").ridge == pytest.approx(65e12 / 320e9)
    assert link("pcie3") < link("pcie4")
    assert device("h20").times(3)[1:] == pytest.approx([3 * value for value in device("h20")[1:]])


def test_refusals():
    with pytest.raises(ValueError, match=r"did you mean 'h100'"):
        device("h1000")
    with pytest.raises(ValueError, match=r"slack=0; expected a positive share"):
        min_bandwidth(TOY, 1, 1, model=MODEL, attention=ATTENTION, slack=0)
    with pytest.raises(ValueError, match="batch=0; expected batch >= 1"):
        roofline_times(TOY, 0, 1, model=MODEL)
    with pytest.raises(ValueError, match="batches=1; expected batches >= 2"):
        cost_per_token(Pools(("h100", 2), ("h20", 1), 1), shape=LLAMA3_70B, context=100)
