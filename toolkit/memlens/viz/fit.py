"""Text that fits: long labels and titles wrap, tick labels that would touch turn or thin out, once the layout is known."""

from __future__ import annotations

import textwrap
from itertools import pairwise

from matplotlib.ticker import FixedLocator

__all__ = ["fit_text"]


def fit_text(figure) -> None:
    """Wrap what is longer than its axis and turn tick labels that overlap. Costs two layouts."""
    figure.draw_without_rendering()
    for ax in figure.axes:
        box = ax.get_window_extent()
        for text, room, side in (
            (ax.xaxis.label, box.width * 1.15, "width"),
            (ax.yaxis.label, box.height * 1.1, "height"),
            (ax._left_title, box.width * 1.05, "width"),
        ):
            _wrap(text, room, side)
    figure.draw_without_rendering()
    for ax in figure.axes:
        _spare(ax.xaxis)


def _wrap(text, room: float, side: str) -> None:
    words = text.get_text()
    if not words or (long := getattr(text.get_window_extent(), side)) <= room:
        return
    text.set_text(textwrap.fill(words, max(8, int(len(words) * room / long)), break_long_words=False))


def _spare(axis) -> None:
    """Where two tick labels below an axis would touch, turn them by 30 degrees (words) or keep every second (numbers)."""
    labels = [label for label in axis.get_ticklabels() if label.get_text()]
    boxes = [label.get_window_extent() for label in labels]
    gap = 0.4 * boxes[0].height if boxes else 0
    if not any(left.x1 + gap > right.x0 for left, right in pairwise(boxes)):
        return
    locator = axis.get_major_locator()
    if isinstance(locator, FixedLocator) and all(_is_number(label.get_text()) for label in labels):
        axis.set_major_locator(FixedLocator(locator.locs[::-2][::-1]))  # the last one stays
        return
    axis.set_tick_params(labelrotation=30)
    for label in axis.get_ticklabels():
        label.set(horizontalalignment="right", rotation_mode="anchor")


def _is_number(text: str) -> bool:
    return text[:1].isdigit() and text[-1:] in "0123456789kMGT"
