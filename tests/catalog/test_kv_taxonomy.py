"""The taxonomy is a partition of the cache methods into 28 leaves, and the directions speak of the same methods."""

import pytest

from memlens import catalog
from memlens.catalog.kv_directions import DIRECTIONS, EFFECTS, SITUATIONS
from memlens.catalog.kv_taxonomy import ALSO, NEAREST, ON_THE_LIST, STUDIES, coverage, kv_taxonomy, leaf_of, leaves

PRESETS = {"streaming", "tova"}  # of memlens.kv.policies, with no paper here
METHODS = [method for methods in leaves().values() for method in methods]


def test_there_are_28_leaves_on_three_levels():
    count = {level: sum(map(len, branches.values())) for level, branches in kv_taxonomy.items()}
    assert count == {"token": 13, "model": 6, "system": 9}
    assert len(leaves()) == 28  # as a dict: every path is there once


def test_no_method_has_two_primary_leaves():
    assert len(METHODS) == len(set(METHODS))
    assert not set(METHODS) & set(STUDIES)


def test_every_cache_paper_has_a_leaf_or_is_a_study():
    papers = {entry.key for entry in catalog.entries().values() if entry.family == "kv"}
    assert papers - set(METHODS) == set(STUDIES)
    for key in set(METHODS) - PRESETS:
        assert catalog.find(key).key == key


def test_every_selection_preset_has_a_leaf():
    from memlens.kv import policies

    named = {"elastic": "elasticcache"}
    other = {"Block", "LayerState", "Policy", "full", "random_keep"}  # no method, or what a method must beat
    assert {named.get(name, name) for name in policies.__all__ if name not in other} <= set(METHODS)


@pytest.mark.parametrize(
    ("method", "leaf"),
    [
        ("snapkv", "token/selection/static"), ("h2o", "token/selection/dynamic, evicting"),
        ("keyformer", "token/selection/dynamic, evicting"), ("scissorhands", "token/selection/dynamic, evicting"),
        ("d2o", "token/merging/within a layer"), ("kivi", "token/quantisation/mixed precision"),
        ("mikv", "token/quantisation/mixed precision"), ("prefixkv", "token/budget/by layer"),
        ("shadowkv", "token/low rank/singular values"), ("batchllm", "system/scheduling/prefix-aware"),
        ("instinfer", "system/hardware-aware/SSD"), ("flashattention", "system/hardware-aware/input and output"),
    ],
)  # fmt: skip
def test_the_leaf_that_the_survey_gives(method, leaf):
    assert method in ON_THE_LIST
    assert leaf_of(method) == leaf


def test_the_counts_sum_to_the_methods():
    counts = coverage()
    assert counts.dims == ("leaf",)
    assert list(counts.leaf.values) == list(leaves())
    assert int(counts.sum()) == len(METHODS)
    assert counts.groupby("level").count().to_series().to_dict() == {"token": 13, "model": 6, "system": 9}
    assert int((counts == 0).sum()) > 0  # and they are there to be listed


def test_notes_speak_of_methods_and_leaves_that_exist():
    assert set(NEAREST) | set(ALSO) | set(ON_THE_LIST) <= set(METHODS)
    assert not set(NEAREST) & set(ON_THE_LIST)
    for method, others in ALSO.items():
        assert set(others) <= set(leaves()) - {leaf_of(method)}


def test_a_study_or_an_unknown_method_has_no_leaf():
    with pytest.raises(ValueError, match=r"leaf_of: method='scbench'; expected a method; it is a study"):
        leaf_of("scbench")
    with pytest.raises(ValueError, match="leaf_of: method='snapvk'.*did you mean 'snapkv'"):
        leaf_of("snapvk")


def test_every_method_has_one_direction():
    assert set(catalog.kv_directions) == set(METHODS)
    for one in catalog.kv_directions.values():
        assert one.direction in DIRECTIONS
        assert {one.prefill, one.decode} <= set(EFFECTS)
    assert {one.direction for one in catalog.kv_directions.values()} == set(DIRECTIONS)
    assert len(DIRECTIONS) == len(SITUATIONS) == 5


def test_what_evicts_is_not_lossless():
    table = catalog.kv_directions
    assert not any(one.lossless for one in table.values() if one.direction in ("eviction", "compression"))
    evicting = leaves()["token/selection/dynamic, evicting"]
    assert {table[key].direction for key in evicting} == {"eviction"}
    assert not any(table[key].linear for key in evicting)  # a fixed number of tokens
