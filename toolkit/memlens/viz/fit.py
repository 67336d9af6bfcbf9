"""Text that fits: long labels and titles wrap, category names that would touch turn, once the layout is known."""

from __future__ import annotations

import textwrap
from itertools import pairwise

__all__ = ["fit_text"]


def fit_text(figure) -> None:
    """Wrap what is longer than its axis and turn tick labels that overlap. Costs one layout."""
    figure.draw_without_rendering()
    for ax in figure.axes:
        box = ax.get_window_extent()
        for text, room, side in (
            (ax.xaxis.label, box.width * 1.15, "width"),
            (ax.yaxis.label, box.height * 1.1, "height"),
            (ax._left_title, box.width * 1.05, "width"),
        ):
            _wrap(text, room, side)
        _turn(ax.xaxis)


def _wrap(text, room: float, side: str) -> None:
    words = text.get_text()
    if not words or (long := getattr(text.get_window_extent(), side)) <= room:
        return
    text.set_text(textwrap.fill(words, max(8, int(len(words) * room / long)), break_long_words=False))


def _turn(axis) -> None:
    """Turn the names below an axis by 30 degrees where two of them would touch."""
    labels = [label for label in axis.get_ticklabels() if label.get_text()]
    boxes = [label.get_window_extent() for label in labels]
    if any(left.x1 + 2 > right.x0 for left, right in pairwise(boxes)) and not labels[0].get_rotation():
        axis.set_tick_params(labelrotation=30)
        for label in axis.get_ticklabels():
            label.set(horizontalalignment="right", rotation_mode="anchor")
