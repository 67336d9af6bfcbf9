"""Words beside points, each put where it covers neither a point nor another word, as far as there is room."""

from __future__ import annotations

from itertools import product

import numpy as np
from matplotlib.transforms import Bbox

from memlens.viz.tidy import Chart

__all__ = ["tag_points"]

NEAR, FAR = 8, 16  # points from the mark
PLACES = [
    (side * reach, lift * reach) for reach in (NEAR, FAR) for side, lift in product((1, 0, -1), (1, -1, 0)) if side or lift
]


def tag_points(ax, chart: Chart) -> None:
    """Write each point's `text` beside it."""
    spots = [(x, y, text) for one in chart.series if one.text for x, y, text in zip(one.x, one.y, one.text)]
    if not spots:
        return
    taken = [_around(ax, one.x[place], one.y[place]) for one in chart.series for place in range(len(one.x))]
    room = ax.get_window_extent()
    for x, y, text in spots:
        note = ax.annotate(
            text, (x, y), xytext=(0, 0), textcoords="offset points", fontsize="small", color="#444444", va="center"
        )
        best = min(PLACES, key=lambda place: _cost(_move(note, place), taken, room))
        taken.append(_move(note, best))


def _around(ax, x: float, y: float) -> Bbox:
    across, up = ax.transData.transform((x, y))
    half = 3 * ax.figure.dpi / 72
    return Bbox([[across - half, up - half], [across + half, up + half]])


def _move(note, place: tuple[float, float]) -> Bbox:
    note.set(position=place, ha={1: "left", -1: "right", 0: "center"}[int(np.sign(place[0]))])
    return note.get_window_extent().padded(2)


def _cost(box: Bbox, taken: list[Bbox], room: Bbox) -> float:
    """The area covered twice, with a word that leaves the axes worse than any."""
    covered = sum(_area(Bbox.intersection(box, other)) for other in taken)
    return covered + 10 * (_area(box) - _area(Bbox.intersection(box, room)))


def _area(box: Bbox | None) -> float:
    return box.width * box.height if box is not None else 0.0
