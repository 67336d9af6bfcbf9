"""The stored grid is the grid, its labels are what the plans say, and the tables for the pictures lose nothing."""

import numpy as np
import pytest
import xarray as xr

from memlens import catalog, data, kv
from memlens.catalog.kv_taxonomy import leaf_of, leaves
from memlens.cost.memory import LLAMA_7B, Llama
from memlens.kv.plan import Plan
from memlens.tasks import frontier_studies as studies

SMOL = Llama(576, 1536, 30, 49152, 9, 3)


@pytest.fixture(scope="module")
def stored():
    return xr.load_dataset(data.cards.verified("kv_frontier", "frontier.nc"))


@pytest.fixture(scope="module")
def kl(stored):
    return studies.labelled(stored[["kl"]], SMOL).kl.mean("text", keep_attrs=True)


def test_the_stored_arms_are_the_plans(stored):
    assert list(stored.arm.values) == [plan.name for plan in studies.plans()]
    assert list(stored.text.values) == list(studies.TEXTS)
    assert bool((stored.kl > 0).all())
    assert bool((stored.leaf_kl > 0).all())


def test_what_caches_held_is_what_plans_predict(stored):
    for plan in studies.plans():
        predicted = sum(plan.bytes(SMOL, studies.PROMPT, itemsize=4).values())
        assert set(stored.held.sel(arm=plan.name).values.tolist()) == {predicted}


def test_the_measured_methods_cover_the_covered_leaves(stored):
    covered = {leaf for leaf, methods in leaves().items() if methods and leaf.startswith("token")}
    assert {leaf_of(method) for method in stored["method"].values} == covered


def test_labels(kl):
    assert float(kl.sel(arm="H2O 50 %").share) == 0.5
    assert kl.sel(arm="KIVI-4").share == pytest.approx((5 * 64 * 512 + 5 * 64 * 480 + 16 * 64 * 32) / (16 * 128 * 512))
    kinds = {name: str(kl.sel(arm=name).kind.values) for name in ("H2O 50 %", "D2O 50 %", "KIVI-2", "ThinK 25 %")}
    assert list(kinds.values()) == ["eviction", "merging", "bits", "channels"]
    assert set(kl.kind.values[kl.axes.values > 1]) == {"combined"}
    with pytest.raises(KeyError, match="H2O 60 %"):
        studies.by_name(["H2O 60 %"])


def test_figure_data_holds_every_point_once(kl):
    table = studies.figure_data(kl, ["KIVI-4"])
    assert table.kl.notnull().sum("kind").values.tolist() == [1] * kl.size
    np.testing.assert_array_equal(table.kl.sum("kind").values, kl.values)
    assert [name for name in table.name.values if name] == ["KIVI-4"]


def test_losses_know_every_plan_that_is_advised(kl):
    lost = studies.losses(kl)
    assert lost["full"] == lost["full elsewhere"] == 0.0
    assert lost["KIVI-4 elsewhere"] == lost["KIVI-4"] == pytest.approx(float(kl.sel(arm="KIVI-4")))
    assert None not in [option.loss for option in kv.advise(8000, 1, 80e9, measured=lost).ranked]


def test_advice_data_tells_the_answers_apart():
    advice = kv.advise(32_000, 1, 24e9, 3, True)
    table = studies.advice_data(advice, LLAMA_7B, 32_000, 1)
    assert list(table.answer.values) == ["advised", "too large", "unsuitable"]
    assert table["size"].notnull().sum("answer").values.tolist() == [1] * table.sizes["plan"]
    assert float(table["size"].sel(answer="too large", plan="full")) == pytest.approx(16.777216)
    assert float(table["size"].sel(answer="advised", plan="full elsewhere")) == 0.0
    assert bool(table["size"].sel(answer="unsuitable", plan="H2O 50 %").notnull())
    assert list(studies.advice_data(kv.advise(64, 1, 80e9), LLAMA_7B, 64, 1).answer.values) == ["advised", "unsuitable"]


def test_coverage_data_is_the_coverage_by_level():
    table = studies.coverage_data()
    assert table.methods.dims == ("level", "leaf")
    assert len(set(table.leaf.values)) == 28
    np.testing.assert_array_equal(table.methods.sum("level").values, catalog.coverage().values)


def test_a_share_is_that_of_a_16_bit_cache():
    assert studies.share(Plan(), SMOL) == 1.0
    assert studies.share(Plan("H2O", 0.25), LLAMA_7B, 400) == 0.25
