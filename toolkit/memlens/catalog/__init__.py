"""Every paper memlens knows: what it claims, the block that carries it, its notebook, and the verdict we measured."""

from memlens.catalog.entries import FAMILIES, Claim, Entry, entries, find
from memlens.catalog.kv_directions import kv_directions
from memlens.catalog.kv_taxonomy import coverage, kv_taxonomy
from memlens.catalog.verdict import Verdict, judge, table, verdict

__all__ = [
    "FAMILIES", "Claim", "Entry", "Verdict", "coverage", "entries", "find", "judge", "kv_directions", "kv_taxonomy", "table",
    "verdict",
]  # fmt: skip
