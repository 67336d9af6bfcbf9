"""The catalogue is whole and well-formed, names lead to one entry, and what it calls working is there."""

import importlib
import math
import re
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

from memlens import catalog
from memlens.catalog import FAMILIES, Entry, entries, find

ROOT = Path(__file__).parents[2]
COUNTS = {
    "attention": 23, "memory": 22, "kv": 24, "optim": 30, "routing": 8, "quant": 9, "parallel": 17, "cost": 19,
    "recall": 44, "tasks": 26,
}  # fmt: skip
UNITS = {
    "", "x", "%", "points", "tokens", "parameters", "samples", "GB", "KiB", "byte", "bits", "GB/s", "Gbit/s", "TFLOP/s",
    "PFLOP/s", "tokens/s", "s", "ms", "us", "ns", "min", "hours", "W", "$", "nats", "GPUs", "users", "experts", "images",
    "lines", "rules", "functions", "games",
}  # fmt: skip
HOMES = {*FAMILIES, "models", "catalog"}
ALL = list(entries().values())
WORKING = [entry for entry in ALL if entry.status == "working"]


def text_of(family: str) -> str:
    return (files(catalog) / "papers" / f"{family}.toml").read_text(encoding="utf-8")


def resolve(name: str):
    """The object of a dotted name: the longest importable module, then attributes."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        module = ".".join(parts[:count])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not module.startswith(error.name):  # the module is there and lacks something itself
                raise
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise AssertionError(name)


def test_every_paper_has_its_entry():
    assert {family: sum(entry.family == family for entry in ALL) for family in FAMILIES} == COUNTS
    assert len(ALL) == sum(COUNTS.values()) == 222


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_parses_with_one_row_a_key(family):
    text = text_of(family)
    keys = re.findall(r"^\[(.*)\]$", text, re.M)
    assert list(tomllib.loads(text)) == keys
    assert len(set(keys)) == len(keys) == COUNTS[family]
    assert all(re.fullmatch(r"[a-z0-9_-]+", key) for key in keys)
    assert max(map(len, text.splitlines())) <= 124


def test_entries_are_named_by_family_and_key_in_the_order_of_the_files():
    assert list(entries()) == [entry.name for entry in ALL]
    assert [entry.family for entry in ALL] == sorted((entry.family for entry in ALL), key=FAMILIES.index)
    assert find("kv/h2o") == find("h2o")
    assert find("h2o").name == "kv/h2o"
    assert find("h2o").notebook == "notebooks/kv/h2o.ipynb"


def test_a_key_of_two_families_raises_and_names_both():
    keys = [entry.key for entry in ALL]
    assert {key for key in keys if keys.count(key) > 1} == {"memo"}
    with pytest.raises(KeyError, match=r"optim/memo or cost/memo"):
        find("memo")
    assert find("cost/memo").title != find("optim/memo").title


@pytest.mark.parametrize(
    ("name", "near"),
    [("h20", "'h2o'"), ("kv/h20", "'kv/h2o'"), ("flash_attention", "'flashattention'"), ("cost/mem0", "'cost/memo'")],
)
def test_an_unknown_key_suggests_the_nearest(name, near):
    with pytest.raises(KeyError, match=rf"no paper '{name}'; did you mean .*{near}"):
        find(name)


def test_a_status_that_is_not_known_is_refused():
    row = {"title": "t", "summary": "s", "block": [], "claims": [], "status": "done"}
    with pytest.raises(ValueError, match=r"catalog kv/x: status='done'; expected one of 'planned', 'working'"):
        importlib.import_module("memlens.catalog.entries")._entry("kv", "x", row)


def test_titles_and_summaries_are_whole():
    clean = [(entry.name, text) for entry in ALL for text in (entry.title, entry.summary) if text == " ".join(text.split())]
    assert len(clean) == 2 * len(ALL)
    assert not [entry.name for entry in ALL if len(entry.title) < 10 or "…" in entry.title]
    assert not [(entry.name, len(entry.summary)) for entry in ALL if not 60 <= len(entry.summary) <= 300]
    assert not [entry.name for entry in ALL if not entry.summary.endswith(".")]


@pytest.mark.parametrize("field", ["title", "summary"])
def test_no_two_papers_share_a_title_or_a_summary(field):
    texts = [getattr(entry, field) for entry in ALL]
    assert [text for text in texts if texts.count(text) > 1] == []


def test_sources_are_dated():
    for entry in ALL:
        if match := re.fullmatch(r"arXiv:(\d\d)(0[1-9]|1[0-2])\.\d{4,5}", entry.source):
            assert entry.year == 2000 + int(match[1]), entry.name
        elif entry.source:
            assert re.fullmatch(rf"[A-Z][A-Za-z]+ {entry.year}", entry.source), entry.name
    arxiv = [entry.source for entry in ALL if entry.source.startswith("arXiv:")]
    assert len(set(arxiv)) == len(arxiv) > 100
    assert {entry.year for entry in ALL} <= {None, *range(2016, 2027)}


def test_claims_are_few_and_short():
    assert not [entry.name for entry in ALL if not 1 <= len(entry.claims) <= 5]
    assert not [entry.name for entry in ALL if len({claim.text for claim in entry.claims}) != len(entry.claims)]
    assert not [claim for entry in ALL for claim in entry.claims if not 0 < len(claim.text.strip()) <= 90]


def test_a_claimed_number_is_a_float_with_a_unit_we_know():
    claims = [claim for entry in ALL for claim in entry.claims]
    assert {claim.unit for claim in claims} <= UNITS
    assert not [claim for claim in claims if claim.value is None and claim.unit]
    numbers = [claim for claim in claims if claim.value is not None]
    assert not [claim for claim in numbers if type(claim.value) is not float or not 0 < claim.value < math.inf]


def test_blocks_are_names_in_our_packages():
    assert not [entry.name for entry in ALL if not 1 <= len(set(entry.block)) == len(entry.block) <= 4]
    names = [(entry.name, name) for entry in ALL for name in entry.block]
    assert not [pair for pair in names if not re.fullmatch(r"memlens(\.[A-Za-z_][A-Za-z0-9_]*){2,3}", pair[1])]
    assert not [pair for pair in names if pair[1].split(".")[1] not in HOMES]


def named(entry: Entry) -> str:
    return entry.key


@pytest.mark.parametrize("entry", WORKING, ids=named)
def test_the_blocks_of_a_working_paper_import(entry):
    assert all(resolve(name) is not None for name in entry.block)


@pytest.mark.parametrize("entry", WORKING, ids=named)
def test_a_working_paper_has_its_notebook(entry):
    assert (ROOT / entry.notebook).is_file()


def test_some_papers_work():
    assert {entry.name for entry in WORKING} >= {
        "attention/flashattention", "memory/based", "kv/h2o", "kv/snapkv", "optim/galore", "routing/moe_lrc",
    }  # fmt: skip
