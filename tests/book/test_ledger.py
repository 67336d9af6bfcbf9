"""The README's tables and the gallery say what the notebooks and the catalogue say."""

import doctest
from pathlib import Path

import pytest

from memlens.book import ledger
from memlens.book.place import root
from memlens.book.store import store

from .conftest import whole

TOP = Path(__file__).parents[2]


@pytest.fixture
def here(monkeypatch):
    monkeypatch.chdir(TOP)


def test_the_generated_parts_are_current(here):
    assert ledger.stale() == []


def test_the_readme_example_runs(here):
    failed, tried = doctest.testfile(str(root() / "README.md"), module_relative=False)
    assert tried > 5
    assert failed == 0


def test_a_changed_verdict_makes_the_readme_stale(put, clone):
    (clone / "README.md").write_text("<!-- generated: methods -->\n<!-- end: methods -->\n")
    (clone / "docs").mkdir(exist_ok=True)
    (clone / "docs" / "verdicts.md").write_text("<!-- generated: verdicts -->\n<!-- end: verdicts -->\n")
    put([], "00-start-here")
    store(put(whole()))
    assert ledger.refresh() == ["README.md", "docs/verdicts.md"]
    assert "| c |  | 1 | <= 2 | **holds** |" in (clone / "docs" / "verdicts.md").read_text()
    assert "| 1 holds | c | 1 | <= 2 | **holds** |" in (clone / "README.md").read_text()
    assert ledger.stale() == []
    store(put(whole("x = 3.0")))
    assert ledger.stale() == ["README.md", "docs/verdicts.md"]
