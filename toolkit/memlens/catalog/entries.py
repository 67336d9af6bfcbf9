"""The catalogue's entries, read from one TOML file per family in `papers/`.

    [h2o]
    title = "..."            # as printed
    year = 2023              # left out where unknown
    source = "arXiv:..."     # left out where unknown
    summary = "..."          # the idea, in our words
    block = ["memlens.kv.policies.h2o"]
    status = "working"       # or "planned"
    notebook = "kv/scores"   # left out where it is the entry's own, family/key
    claims = [{ text = "throughput over FlexGen, OPT-30B", value = 3.0, unit = "x" }]

An entry is named `family/key`; the bare key serves where it is unambiguous.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from memlens import check

__all__ = ["FAMILIES", "Claim", "Entry", "entries", "find"]

FAMILIES = ("attention", "memory", "kv", "optim", "routing", "quant", "parallel", "cost", "recall", "tasks")
STATUSES = ("planned", "working")


class Claim(NamedTuple):
    text: str
    value: float | None = None  # None where the paper claims no number
    unit: str = ""


class Entry(NamedTuple):
    family: str
    key: str
    title: str
    summary: str
    block: tuple[str, ...]  # importable names that carry it
    status: str
    claims: tuple[Claim, ...]
    year: int | None = None
    source: str = ""
    book: str = ""  # the notebook's name where several papers share one

    @property
    def name(self) -> str:
        return f"{self.family}/{self.key}"

    @property
    def notebook(self) -> str:
        """Path of the notebook from the project's top, whether or not it is written yet."""
        return f"notebooks/{self.book or self.name}.ipynb"


def _entry(family: str, key: str, row: dict) -> Entry:
    check.one_of(f"catalog {family}/{key}", STATUSES, status=row["status"])
    return Entry(
        family, key, row["title"], row["summary"], tuple(row["block"]), row["status"],
        tuple(Claim(**claim) for claim in row["claims"]), row.get("year"), row.get("source", ""), row.get("notebook", ""),
    )  # fmt: skip


@cache
def entries() -> dict[str, Entry]:
    """All entries by `family/key`, in the order of FAMILIES and then of the files."""
    found = {}
    for family in FAMILIES:
        path = files(__package__) / "papers" / f"{family}.toml"
        for key, row in tomllib.loads(path.read_text(encoding="utf-8")).items():
            entry = _entry(family, key, row)
            found[entry.name] = entry
    return found


def find(name: str) -> Entry:
    """The entry called `family/key`, or `key` where only one family has it.

    Raises:
        KeyError: unknown (naming the nearest) or ambiguous (naming each).
    """
    known = entries()
    if name in known:
        return known[name]
    matches = [entry for entry in known.values() if entry.key == name]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise KeyError(f"catalog: {name!r} is in several families; say {' or '.join(e.name for e in matches)}")
    options = known if "/" in name else {entry.key for entry in known.values()}
    raise KeyError(f"catalog: no paper {name!r}; {check.nearest(name, options)}")
