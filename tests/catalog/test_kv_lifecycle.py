"""The table of lifecycle stages covers every kv paper, policy and format, and nothing else."""

import importlib
import inspect
import pkgutil
import sys
from pathlib import Path

import pytest

import memlens.kv
from memlens.catalog import entries
from memlens.catalog.kv_lifecycle import BASELINES, LIFECYCLE, STAGES, stages

sys.path.insert(0, str(Path(__file__).parents[1] / "kv"))
from kv_presets import PRESETS

from memlens.kv import policies
from memlens.kv.kivi import kivi
from memlens.kv.policies import full, h2o, snapkv
from memlens.kv.retrieval import instinfer


def formats():
    """The class of every storage format in memlens.kv: what can commit and has a name."""
    modules = (importlib.import_module(f"memlens.kv.{found.name}") for found in pkgutil.iter_modules(memlens.kv.__path__))
    classes = {x for module in modules for x in vars(module).values() if inspect.isclass(x) and hasattr(x, "commit")}
    return sorted((x for x in classes if "name" in getattr(x, "_field_defaults", {})), key=lambda x: x.__name__)


def test_every_kv_paper_has_its_row_and_there_is_no_other():
    assert list(LIFECYCLE) == [entry.key for entry in entries().values() if entry.family == "kv"]
    assert not set(LIFECYCLE) & set(BASELINES)
    for row in (LIFECYCLE | BASELINES).values():
        assert row == tuple(stage for stage in STAGES if stage in row)  # known, in order, once
    assert {stage for row in LIFECYCLE.values() for stage in row} == set(STAGES)


def test_a_paper_whose_block_is_a_policy_or_a_format_has_a_stage():
    acts = ("memlens.kv.policies.", "memlens.kv.locret.", "memlens.kv.kivi.", "memlens.kv.mikv.", "memlens.kv.retrieval.")
    blocks = {entry.key: entry.block for entry in entries().values() if entry.family == "kv"}
    assert {key for key, names in blocks.items() if names[0].startswith(acts)} <= {k for k, row in LIFECYCLE.items() if row}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_compresses(name):
    assert "compression" in stages(PRESETS[name](12))


def test_every_policy_that_is_exported_is_in_the_table():
    made = {PRESETS[name](12).name for name in PRESETS} | {full().name}
    exported = {name for name in policies.__all__ if name[0].islower()}
    assert made == {"random" if name == "random_keep" else name for name in exported}


@pytest.mark.parametrize("made", formats(), ids=lambda x: x.__name__)
def test_every_storage_format_has_its_row(made):
    name = made._field_defaults["name"]
    found = stages(full()._replace(store=type("Format", (), {"name": name})()))
    assert found == () if name == "plain" else found


def test_there_are_as_many_formats_as_the_storage_tests_know():
    assert {x._field_defaults["name"] for x in formats()} == {
        "plain", "kivi", "mikv", "block_floats", "think", "low_rank", "shadowkv", "instinfer",
    }  # fmt: skip


def test_a_policy_with_a_format_acts_where_both_do():
    assert stages(full()) == ()
    assert stages(snapkv(64).stored(instinfer(4, 8))) == ("compression", "loading")
    assert stages(h2o(2, 2).stored(kivi(4))) == stages(full().stored(kivi(4))) == ("compression",)
    with pytest.raises(ValueError, match=r"stages: name='h3o'; expected one of .*did you mean 'h2o'"):
        stages(full()._replace(name="h3o"))
