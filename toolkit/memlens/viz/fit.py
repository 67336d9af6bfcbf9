"""Text that fits: long labels and titles wrap, tick labels that would touch turn or thin out, once the layout is known."""

from __future__ import annotations

import textwrap
from itertools import pairwise

from matplotlib.ticker import FixedLocator

__all__ = ["fit_text"]


def fit_text(figure) -> None:
    """Wrap what is longer than its axis and free tick labels that touch; since one changes the room of the other, twice."""
    for _ in range(2):
        figure.draw_without_rendering()
        turned = [ax.xaxis for ax in figure.axes if _spare(ax.xaxis)]
        if turned:  # what the words take, the plots get back
            taken = max(label.get_window_extent().height for axis in turned for label in axis.get_ticklabels())
            figure.set_figheight(
                figure.get_figheight() + taken / figure.dpi - turned[0].get_ticklabels()[0].get_size() / 72
            )
        figure.draw_without_rendering()
        grown = [_wrap_all(ax) for ax in figure.axes]
        lines = sum(map(max, zip(*grown)))
        figure.set_figheight(figure.get_figheight() + 1.3 * lines * figure.axes[0].xaxis.label.get_size() / 72)


def _wrap_all(ax) -> tuple[int, int]:
    """Wrap the texts of one plot; how many lines its x label and its title gained."""
    box = ax.get_window_extent()
    _wrap(ax.yaxis.label, box.height, "height")
    return _wrap(ax.xaxis.label, 1.05 * box.width, "width"), _wrap(ax._left_title, 1.1 * box.width, "width")


def _wrap(text, room: float, side: str) -> int:
    words = text.get_text().replace("\n", " ")
    if not words or (long := getattr(text.get_window_extent(), side)) <= room:
        return 0
    before = text.get_text().count("\n")
    text.set_text(textwrap.fill(words, max(8, int(len(words) * room / long)), break_long_words=False))
    return text.get_text().count("\n") - before


def _spare(axis) -> bool:
    """Where two tick labels below an axis would touch, keep every second (numbers) or turn them (words: True)."""
    if axis.get_tick_params().get("labelrotation"):
        return False
    labels = [label for label in axis.get_ticklabels() if label.get_text()]
    boxes = [label.get_window_extent() for label in labels]
    letter = labels[0].get_size() * axis.figure.dpi / 72 if labels else 0.0
    if not any(left.x1 + 0.4 * letter > right.x0 for left, right in pairwise(boxes)):
        return False
    locator = axis.get_major_locator()
    if isinstance(locator, FixedLocator) and all(_is_number(label.get_text()) for label in labels):
        axis.set_major_locator(FixedLocator(locator.locs[::-2][::-1]))  # the last one stays
        return False
    apart = min(right.x1 + right.x0 - left.x1 - left.x0 for left, right in pairwise(boxes)) / 2
    turn = 30 if apart > 2.4 * letter else 90
    axis.set_tick_params(labelrotation=turn)
    for label in axis.get_ticklabels():
        label.set(rotation_mode="anchor", horizontalalignment="right", verticalalignment="top" if turn < 90 else "center")
    return True


def _is_number(text: str) -> bool:
    return text[:1].isdigit() and text[-1:] in "0123456789kMGT"
