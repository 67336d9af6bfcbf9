"""The main job: failures do not stop the others, an interrupted run goes on, nothing is rewritten without need."""

import json
import sys
from pathlib import Path

import pytest

from memlens.book.notebook import read, source_of
from memlens.book.place import notebooks, select
from memlens.book.reproduce import FIGURE, reproduce, run_one
from memlens.book.store import store

from .conftest import code, text, whole


def test_a_failing_notebook_is_named_and_does_not_stop_the_others(put, capsys):
    store(put(whole()))
    put([text("# t"), code("1 / 0")], "kv/snapkv")
    assert reproduce(workers=2) == 1
    out = capsys.readouterr().out
    assert "passed kv/h2o" in out
    assert "FAILED kv/snapkv" in out
    assert "code cell 1: ZeroDivisionError" in out


def test_what_is_no_notebook_does_not_stop_the_others(put, clone, capsys):
    store(put(whole()))
    (clone / "notebooks/kv/broken.ipynb").write_text('{"cells": [')
    assert reproduce(workers=2) == 1
    out = capsys.readouterr().out
    assert "passed kv/h2o" in out
    assert "FAILED kv/broken: 0 s: NotJSONError" in out
    assert "2 notebooks, 1 failed" in out


def test_a_kernel_that_does_not_start_is_a_failure_like_any_other(put, monkeypatch):
    def dead(path):
        raise RuntimeError("Kernel died before replying to kernel_info")

    monkeypatch.setattr(sys.modules["memlens.book.reproduce"], "execute", dead)
    row = run_one(put(whole()))
    assert (row["error"], row["cell"]) == ("RuntimeError: Kernel died before replying to kernel_info", None)


def test_a_verdict_that_falls_is_said_and_the_run_has_not_passed(put, clone, capsys):
    (clone / "value.txt").write_text("1.0")
    path = put(whole("x = float(open('../../value.txt').read())"))
    store(path)
    (clone / "value.txt").write_text("3.0")
    assert reproduce() == 1
    assert "a verdict fell kv/h2o: c: holds, now not reproduced here" in capsys.readouterr().out
    (clone / "value.txt").write_text("1.0")
    assert reproduce() == 0


def test_a_family_without_notebooks_is_refused(put):
    put(whole())
    with pytest.raises(KeyError, match="family 'tasks' has no notebook yet"):
        reproduce(family="tasks")


def test_an_unchanged_verdict_leaves_the_file(put, capsys):
    path = put(whole("import random\nx = 1.0 + 1e-9 * random.random()"))
    store(path)
    before = path.read_bytes()
    assert reproduce(paper="h2o") == 0
    assert path.read_bytes() == before
    assert "1 holds" in capsys.readouterr().out


def test_a_changed_verdict_is_stored(put, clone):
    (clone / "value.txt").write_text("1.0")
    path = put(whole("x = float(open('../../value.txt').read())"))
    store(path)
    (clone / "value.txt").write_text("1.5")
    assert reproduce(family="kv") == 0
    assert "1.5" in str(read(path).cells[4].outputs)


def test_an_interrupted_run_resumes(put, clone, capsys):
    store(put(whole()))
    store(put(whole(), "kv/snapkv"))
    assert reproduce() == 0
    record = clone / ".state" / "reproduce.json"
    kept = json.loads(record.read_text())
    del kept["done"]["kv/snapkv"]
    record.write_text(json.dumps({**kept, "finished": False}))
    capsys.readouterr()
    assert reproduce() == 0
    out = capsys.readouterr().out
    assert "resuming: 1 of 2" in out
    assert "passed kv/snapkv" in out
    assert "passed kv/h2o" not in out


def test_a_finished_run_starts_anew_and_a_broken_record_is_no_obstacle(put, clone, capsys):
    store(put(whole()))
    assert reproduce() == 0
    (clone / ".state" / "reproduce.json").write_text("{ not json")
    assert reproduce() == 0
    assert "resuming" not in capsys.readouterr().out


def test_selection_names_the_nearest_paper(put):
    put(whole())
    assert list(notebooks()) == ["kv/h2o"]
    with pytest.raises(KeyError, match="did you mean 'h2o'"):
        select(paper="h20")
    with pytest.raises(KeyError, match="has no notebook yet"):
        select(paper="kivi")
    with pytest.raises(ValueError, match="family='kw'"):
        select(family="kw")


def test_every_stored_figure_is_redrawn_with_the_notebook_that_draws_it():
    top = Path(__file__).parents[2]
    drawn = [name for path in (top / "notebooks").rglob("*.ipynb") for name in FIGURE.findall(source_of(read(path)))]
    assert sorted(drawn) == sorted(path.stem for path in (top / "figures").glob("*.nc"))
