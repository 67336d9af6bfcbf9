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
    "", "x", "%", "points", "tokens", "parameters", "samples", "GB", "KiB", "byte", "bits", "GB/s", "Gbit/s", "TFLOP/s", "PFLOP/s",
    "tokens/s", "s", "ms", "us", "ns", "min", "hours", "W", "$", "nats", "GPUs", "users", "experts", "images", "lines", "rules",
    "functions", "games",
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


def test_titles_and_summaries_are_whole_and_say_something_of_their_own():
    for entry in ALL:
        assert entry.title == entry.title.strip() and len(entry.title) > 10 and "…" not in entry.title, entry.name
        assert 60 <= len(entry.summary) <= 300, (entry.name, len(entry.summary))
        assert entry.summary.endswith(".") and "  " not in entry.summary and "\n" not in entry.summary, entry.name
    for field in ("title", "summary"):
        texts = [getattr(entry, field) for entry in ALL]
        assert len(set(texts)) == len(texts), {text for text in texts if texts.count(text) > 1}


def test_sources_are_dated_and_belong_to_one_paper():
    sources = [entry.source for entry in ALL if entry.source]
    assert len(set(sources)) == len(set(sources) | {""}) - 1
    arxiv = [source for source in sources if source.startswith("arXiv:")]
    assert len(set(arxiv)) == len(arxiv)
    for entry in ALL:
        assert entry.year is None or 1980 <= entry.year <= 2026, entry.name
        if match := re.fullmatch(r"arXiv:(\d\d)(\d\d)\.\d{5}", entry.source):
            assert entry.year == 2000 + int(match[1]) and 1 <= int(match[2]) <= 12, entry.name
        elif entry.source:
            assert re.fullmatch(rf"[A-Z][A-Za-z]+ {entry.year}", entry.source), entry.name


def test_claims_are_short_and_a_number_has_a_unit_we_know():
    for entry in ALL:
        assert 1 <= len(entry.claims) <= 5, entry.name
        assert len({claim.text for claim in entry.claims}) == len(entry.claims), entry.name
        for claim in entry.claims:
            assert 0 < len(claim.text) <= 90 and claim.text == claim.text.strip(), (entry.name, claim.text)
            assert claim.unit in UNITS, (entry.name, claim.unit)
            if claim.value is None:
                assert not claim.unit, (entry.name, claim.text)
            else:
                assert type(claim.value) is float and math.isfinite(claim.value) and claim.value > 0, (
                    entry.name,
                    claim.text,
                )


def test_blocks_are_names_in_our_packages():
    for entry in ALL:
        assert 1 <= len(entry.block) <= 4 and len(set(entry.block)) == len(entry.block), entry.name
        for name in entry.block:
            match = re.fullmatch(r"memlens\.([a-z]+)(\.[A-Za-z_][A-Za-z0-9_]*){1,2}", name)
            assert match and match[1] in HOMES, (entry.name, name)


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
