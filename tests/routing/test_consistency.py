"""Segment routing against a case by hand, a walk over all windows, and the identities it must obey."""

import numpy as np
import pytest
import torch
import xarray as xr

from memlens.routing.caching import hit_curve
from memlens.routing.consistency import (
    expert_specialization,
    sch,
    segment_counts,
    segment_sums,
    shuffle_control,
    srp,
    srp_controlled,
    srp_floor,
)
from memlens.routing.trace import RoutingTrace


def a_trace(generator, batch=4, tokens=21, layers=2, experts=8, k=3, labels=("a", "a", "b", "b")):
    chosen = torch.rand(batch, tokens, layers, experts, generator=generator).argsort(-1)[..., :k]
    return RoutingTrace(chosen, None, None, experts, k, tuple(range(layers)), labels)


def one_layer(experts, num_experts):
    return RoutingTrace(torch.tensor(experts)[:, :, None], None, None, num_experts, len(experts[0][0]), (0,))


def test_by_hand():
    """Tokens choose 0, 0, 1, 0; windows of 2 hold (2, 0), (1, 1), (1, 1) of experts 0 and 1."""
    trace = one_layer([[[0], [0], [1], [0]]], 2)
    assert segment_counts(trace.experts[:, :, 0], 2, 2).tolist() == [[[2, 0], [1, 1], [1, 1]]]
    each, layer = (srp(trace, 2, level=level).isel(dataset=0, layer=0) for level in ("expert", "layer"))
    np.testing.assert_allclose(each.srp, [8 / 10, 4 / 6])  # 2 TP / (P + A): 2*4/(6+4) at c=0, 2*2/(4+2) at c=1
    assert each.threshold.values.tolist() == [0, 1]  # c=0 and c=1 tie for expert 0: the first
    np.testing.assert_allclose(each.size_ratio, [6 / 4, 4 / 2])
    np.testing.assert_allclose(layer.srp, 2 * 6 / (10 + 6))  # not the mean of 0.8 and 0.67
    np.testing.assert_allclose(layer.size_ratio, 10 / 6)
    np.testing.assert_allclose(layer.act_ratio, 1 / 2)


@pytest.mark.parametrize("m", [1, 2, 5, 21])
def test_the_histogram_is_the_walk_over_windows(m, generator, assert_close):
    experts = a_trace(generator).experts[:, :, 0]
    assert_close(segment_sums(experts, 8, m, form="torch"), segment_sums(experts, 8, m, form="reference"))


@pytest.mark.parametrize("m", [1, 3, 16, 21])
def test_counts_are_sums_over_the_window(m, generator):
    experts = a_trace(generator).experts[:, :, 0]
    active = torch.nn.functional.one_hot(experts, 8).sum(2)
    assert torch.equal(segment_counts(experts, 8, m).long(), active.unfold(1, m, 1).sum(-1))


@pytest.mark.parametrize("level", ["expert", "layer", "model"])
def test_names_of_experts_do_not_matter(level, generator):
    trace, names = a_trace(generator), torch.randperm(8, generator=generator)
    renamed = trace._replace(experts=names[trace.experts])
    got, want = srp(renamed, 5, level=level), srp(trace, 5, level=level)
    xr.testing.assert_allclose(got.isel(expert=names.tolist()) if level == "expert" else got, want)


def test_one_token_segments_are_perfect_and_the_floor_holds(generator):
    trace = a_trace(generator)
    one = srp(trace, 1)
    np.testing.assert_allclose(one.srp, 1)
    np.testing.assert_allclose(one.size_ratio, 1)
    found = srp(trace, [2, 8, 21])
    np.testing.assert_allclose(found.floor, srp_floor(3 / 8))
    assert (found.srp >= found.floor - 1e-12).all()


def test_constant_routing_scores_one(generator):
    trace = one_layer([[[1, 4]] * 9, [[1, 4]] * 9], 6)
    found = srp(trace, 4)
    np.testing.assert_allclose([found.srp.item(), found.size_ratio.item()], [1, 1])
    assert found.threshold.item() == 1  # c = 1..4 tie
    never = srp(trace, 4, level="expert").isel(expert=[0, 2, 3, 5])
    assert not never.srp.any()
    assert not never.size_ratio.any()


def test_model_level_of_one_layer_is_its_layer_level(generator):
    trace = a_trace(generator, layers=1)
    layer, model = srp(trace, 5), srp(trace, 5, level="model")
    xr.testing.assert_allclose(layer.isel(layer=0, drop=True), model)
    xr.testing.assert_allclose(sch(trace, 5).isel(layer=0, drop=True), sch(trace, 5, level="model"))


def test_groups_by_label_or_all(generator):
    trace = a_trace(generator)
    assert srp(trace, 5).dataset.values.tolist() == ["a", "b"]
    half = trace._replace(experts=trace.experts[2:], labels=())
    np.testing.assert_allclose(srp(trace, 5).srp.sel(dataset="b"), srp(half, 5).srp.sel(dataset="all"))
    assert srp(trace, 5, by=()).dataset.values.tolist() == ["all"]


@pytest.mark.parametrize("level", ["expert", "layer", "model"])
def test_the_interval_is_pivotal_and_shrinks_to_nothing_without_variation(level, generator):
    trace = a_trace(generator)
    same = trace._replace(experts=trace.experts[:1].expand(4, -1, -1, -1))
    flat = srp(same, 5, level=level, bootstrap=50, generator=generator)
    np.testing.assert_allclose(flat.ci_lb, flat.srp)
    np.testing.assert_allclose(flat.ci_ub, flat.srp)
    found = srp(trace, 5, level=level, by=(), bootstrap=400, generator=generator)
    assert (found.ci_lb <= found.ci_ub).all()
    assert (found.ci_ub - found.ci_lb).max() > 0.001


def test_the_draws_are_those_of_resampled_samples(generator):
    trace = a_trace(generator, batch=3, labels=())
    seed = torch.Generator().manual_seed(7)
    picks = torch.randint(3, (200, 3), generator=torch.Generator().manual_seed(7))
    scores = [srp(trace._replace(experts=trace.experts[pick]), 5).srp.values[0] for pick in picks]
    value = srp(trace, 5).srp.values[0]
    low, high = np.quantile(scores, [0.025, 0.975], axis=0)
    found = srp(trace, 5, bootstrap=200, generator=seed)
    np.testing.assert_allclose(found.ci_lb.values[0], 2 * value - high)
    np.testing.assert_allclose(found.ci_ub.values[0], 2 * value - low)


def test_sch_is_the_mean_curve_and_ends_at_one(generator):
    trace = a_trace(generator)
    found = sch(trace, 5)
    want = hit_curve(trace.experts[2:, :, 1], 8, "segment", future=5).mean(0)
    np.testing.assert_allclose(found.sel(dataset="b", layer=1), want)
    np.testing.assert_allclose(found.isel(capacity=-1), 1)
    np.testing.assert_allclose(found.ratio, found.capacity / 3)
    model = sch(trace, 5, level="model")
    assert model.sizes["capacity"] == 16
    assert (model.diff("capacity") >= 0).all()


def test_shuffling_keeps_loads_and_destroys_locality(generator):
    blocks = torch.arange(4).repeat_interleave(16).view(1, 64, 1)
    trace = RoutingTrace(blocks.repeat(3, 1, 1)[..., None], None, None, 4, 1, (0,))
    control = shuffle_control(trace, generator)
    assert torch.equal(control.experts.sort(1).values, trace.experts)
    assert srp(trace, 8).srp.item() > 0.85
    assert srp(control, 8).srp.item() < 0.6


def test_the_control_is_the_mean_of_its_shuffles(generator):
    trace = a_trace(generator)
    found = srp_controlled(trace, [3, 5], shuffles=2, generator=torch.Generator().manual_seed(3))
    draws = torch.Generator().manual_seed(3)
    one, two = (srp(shuffle_control(trace, draws), [3, 5]).srp for _ in range(2))
    np.testing.assert_allclose(found.shuffled, (one + two) / 2)
    xr.testing.assert_identical(found.drop_vars("shuffled"), srp(trace, [3, 5]))


def test_shuffling_moves_all_layers_and_what_they_read_alike(generator):
    trace = a_trace(generator)._replace(gate_in=torch.arange(21.0).view(1, 21, 1, 1).expand(4, 21, 2, 1))
    control = shuffle_control(trace, generator)
    order = control.gate_in[:, :, 0, 0].long()
    assert torch.equal(order, control.gate_in[:, :, 1, 0].long())
    assert torch.equal(control.experts, trace.experts[torch.arange(4)[:, None], order])


def test_specialization_by_domain_and_by_token(generator):
    experts = [[[0], [1]] * 20, [[2], [1]] * 20]  # expert 0 only in a, 2 only in b, 1 in both alike, 3 never
    trace = one_layer(experts, 4)
    cv = expert_specialization(trace, ("a", "b")).isel(layer=0)
    np.testing.assert_allclose(cv, [2**0.5, 0, 2**0.5, 0])
    tokens = torch.tensor([[5, 6] * 20, [5, 6] * 20])
    by_token = expert_specialization(trace, tokens).isel(layer=0)
    np.testing.assert_allclose(by_token, [2**0.5, 2**0.5, 2**0.5, 0])


def test_refusals(generator):
    trace = a_trace(generator)
    with pytest.raises(ValueError, match="m=0"):
        srp(trace, 0)
    with pytest.raises(ValueError, match="m=22"):
        srp(trace, [4, 22])
    with pytest.raises(ValueError, match="m=22"):
        sch(trace, 22)
    with pytest.raises(ValueError, match="num_experts|experts"):
        srp(trace._replace(num_experts=5), 4)
    with pytest.raises(ValueError, match="twice"):
        segment_counts(torch.zeros(1, 4, 2, dtype=torch.long), 3, 2)
    with pytest.raises(ValueError, match="one of 'expert', 'layer', 'model'"):
        srp(trace, 4, level="token")
    with pytest.raises(ValueError, match="generator"):
        srp(trace, 4, bootstrap=10)
    with pytest.raises(ValueError, match="by"):
        srp(trace, 4, by=("language",))
    with pytest.raises(ValueError, match="at least two"):
        expert_specialization(trace, ("a",) * 4)
    with pytest.raises(ValueError, match="ratio"):
        srp_floor(1.5)
