"""`memlens bench`: the families there are, and rows that outlive a run of another family."""

import csv
import os
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from memlens.bench import Case, run

TOP = Path(__file__).parents[1]


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """build/bench.csv of a clone with two families of one case; a measurement takes no time."""
    for folder in ("notebooks", "toolkit/memlens"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "families", lambda: ["kv", "memory"])
    monkeypatch.setattr(run, "ceilings", lambda: (1.0, 1.0))
    monkeypatch.setattr(run, "import_module", lambda name: SimpleNamespace(cases=lambda: [case(name.split(".")[-1])]))
    monkeypatch.setattr(run, "ROUNDS", 3)
    return tmp_path / "build" / "bench.csv"


def case(name: str) -> Case:
    return Case(f"{name} case", lambda: torch.ones(4), lambda: torch.ones(4), "a peer")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_rows_of_other_families_stay(stored):
    assert run.bench() == 0
    before = read(stored)
    assert [(row["family"], row["name"]) for row in before] == [("kv", "kv case"), ("memory", "memory case")]
    run.bench(family="kv")
    after = read(stored)
    assert [row["family"] for row in after] == ["memory", "kv"]
    assert after[0] == before[1]
    assert after[1] != before[0]
    assert os.listdir(stored.parent) == ["bench.csv"]


def test_rows_that_name_no_family_are_told_by_their_case(stored):
    stored.parent.mkdir()
    stored.write_text("name,ours_ms,torch\nkv case,1.0,2.0\nan older case,3.0,2.0\n")
    run.bench(family="kv")
    rows = read(stored)
    assert [row["name"] for row in rows] == ["an older case", "kv case"]
    assert (rows[0]["ours_ms"], rows[0]["packages"]) == ("3.0", "")


def test_a_run_that_cannot_write_leaves_the_old_rows(stored, monkeypatch):
    run.bench()
    before = stored.read_bytes()

    def full(self, *args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        run.bench(family="kv")
    assert stored.read_bytes() == before
    assert os.listdir(stored.parent) == ["bench.csv"]


def test_a_row_says_what_was_installed(stored, monkeypatch):
    monkeypatch.setattr(run, "PACKAGES", ("memlens", "transformers", "no-such-package"))
    run.bench(family="kv")
    (row,) = read(stored)
    assert row["torch"] == torch.__version__
    assert row["packages"] == f"memlens={version('memlens')} transformers={version('transformers')} no-such-package="


def test_every_peer_is_among_the_packages():
    lines = (TOP / "requirements-peers.txt").read_text(encoding="utf-8").splitlines()
    peers = {line.split("==")[0] for line in lines if line and not line.startswith("#")}
    assert {"memlens", "transformers"} | peers == set(run.PACKAGES)


@pytest.mark.parametrize("family", ["recall", "case", "run"])
def test_a_family_without_benchmarks_is_refused(family):
    with pytest.raises(ValueError, match=rf"bench: family='{family}'; expected one of 'attention', 'kv', "):
        run.bench(family=family)
