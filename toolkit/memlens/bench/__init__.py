"""Measurements against named peers, in one process. Each family's module here has `cases()`, a list of `Case`."""

from memlens.bench.case import Case

__all__ = ["Case"]
