"""Every paper memlens knows: what it claims, the block that carries it, its notebook, and the verdict we measured."""

from memlens.catalog.entries import FAMILIES, Claim, Entry, entries, find
from memlens.catalog.verdict import Verdict, judge, table, verdict

__all__ = ["FAMILIES", "Claim", "Entry", "Verdict", "entries", "find", "judge", "table", "verdict"]
