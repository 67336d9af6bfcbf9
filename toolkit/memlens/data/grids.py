"""ARC-AGI-1 training tasks whose every grid fits in 10 by 10: small puzzles of coloured grids, shown by example."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memlens import check
from memlens.data import cards

__all__ = ["Pair", "Task", "arc", "grid_text"]


class Pair(NamedTuple):
    input: NDArray[np.int64]  # (rows, columns), colours 0..9; read-only
    output: NDArray[np.int64]  # (rows, columns)


class Task(NamedTuple):
    key: str  # the eight hex digits of the published file
    train: tuple[Pair, ...]  # what the rule is shown by
    test: tuple[Pair, ...]  # what it is asked of


@lru_cache(maxsize=1)
def arc() -> tuple[Task, ...]:
    """The 178 tasks, ordered by key. The arrays are shared between calls and cannot be written to.

    Source: Chollet, arXiv:1911.01547; the set is the rule "no side above 10" over the 400 training tasks.
    """
    stored = json.loads(cards.verified("arc", "arc.json"))
    return tuple(Task(key, _pairs(task["train"]), _pairs(task["test"])) for key, task in sorted(stored.items()))


def _pairs(stored: list[dict]) -> tuple[Pair, ...]:
    return tuple(Pair(_grid(pair["input"]), _grid(pair["output"])) for pair in stored)


def _grid(rows: list[list[int]]) -> NDArray[np.int64]:
    grid = np.array(rows, dtype=np.int64)
    grid.flags.writeable = False
    return grid


def grid_text(grid: ArrayLike) -> str:
    """A grid as digits, one line for each row, as a language model reads it.

    >>> print(grid_text([[0, 3], [3, 0]]))
    03
    30

    Raises:
        ValueError: no 2-D array of whole numbers 0..9.
    """
    grid = np.asarray(grid)
    if grid.ndim != 2 or not np.issubdtype(grid.dtype, np.integer):
        check.fail("data.grid_text", f"shape {grid.shape} of {grid.dtype}", "(rows, columns) of integers")
    if grid.size and (grid.min() < 0 or grid.max() > 9):
        check.fail("data.grid_text", f"colours {grid.min()} to {grid.max()}", "colours 0 to 9")
    return "\n".join("".join(map(str, row)) for row in grid.tolist())
