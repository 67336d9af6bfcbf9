"""Names of series: beside the ends of their lines where there is room, else in a legend outside the plots."""

from __future__ import annotations

import numpy as np
from matplotlib import rcParams

from memlens.viz.legends import legend_of_all, legends_above
from memlens.viz.palette import darker
from memlens.viz.tags import tag_points
from memlens.viz.tidy import Chart

__all__ = ["name_lines", "name_series", "spread_out"]

MOST_DIRECT = 6
LONGEST = 24  # letters of a name that may take its place from the plot
GREY = "#555555"


def name_series(figure, axes, groups: list[list[Chart]], columns: int) -> None:
    """Name every series: at the ends of its lines, or in one legend for all plots, or in one above each plot that has
    other series than its neighbours; and the reference lines at the right edge of each group.

    Legends make the figure taller by their own height, so that the plots keep theirs.
    """
    figure.draw_without_rendering()
    parts = [(chart, group) for group in groups for chart in group]
    open_plots = []  # that still need a legend
    for ax, (chart, group) in zip(axes, parts):
        alone = len(parts) == 1 or chart.panel.labels == "direct"
        edge = chart is group[min(columns, len(group)) - 1]
        if not name_lines(ax, chart, direct=alone, references=edge):
            open_plots.append((ax, chart))
    looks = {tuple((one.label, one.look) for one in chart.series) for _, chart in open_plots}
    if len(looks) == 1:
        legend_of_all(figure, *open_plots[0])
    elif looks:
        legends_above(figure, axes, open_plots, columns)
    figure.draw_without_rendering()
    for ax, (chart, _) in zip(axes, parts):
        tag_points(ax, chart)


def name_lines(ax, chart: Chart, *, direct: bool = True, references: bool = True) -> bool:
    """Write names beyond the right edge of `ax`; False where the series still need a legend.

    Args:
        direct: whether the series may be named there, if they are few, end together and their names find room.
        references: whether the horizontal reference lines are named, which they always can be.
    """
    wanted = chart.panel.labels
    fixed = _reference_names(chart) if references else []
    named = chart.series if direct and _may_be_direct(chart) else ()
    names = [(one.y[-1], one.label, darker(one.look.colour)) for one in named]
    if names and (placed := _places(ax, [*names, *fixed], strict=wanted != "direct")) is not None:
        _write(ax, [*names, *fixed], placed)
        return True
    if fixed and (placed := _places(ax, fixed, strict=False)) is not None:
        _write(ax, fixed, placed)
    return wanted == "none" or not any(one.label for one in chart.series)


def _may_be_direct(chart: Chart) -> bool:
    if chart.panel.labels in ("legend", "none") or chart.panel.plot != "lines" or chart.panel.style:
        return False
    ends = {one.x[-1] for one in chart.series if len(one.x)}
    full = all(len(one.x) and one.label for one in chart.series)
    return full and 1 < len(chart.series) <= MOST_DIRECT and len(ends) == 1


def _reference_names(chart: Chart) -> list[tuple[float, str, str]]:
    turned = chart.panel.plot == "bars" and chart.panel.horizontal
    lines = [line for line in chart.panel.reference or [] if line.get("label") and ("y" in line) != turned]
    return [(float(np.mean(line["x" if turned else "y"])), line["label"], GREY) for line in lines]


def _places(ax, names: list[tuple], *, strict: bool):
    """Heights in pixels for the names, moved apart; None where they do not fit or (strict) stand far from their lines."""
    gap = 1.25 * rcParams["font.size"] * ax.figure.dpi / 72
    box = ax.get_window_extent()
    ends = np.array([ax.transData.transform((ax.get_xlim()[1], value))[1] for value, *_ in names])
    placed = spread_out(ends, gap, box.y0, box.y1)
    if strict and max(len(text) for _, text, _ in names) > LONGEST:
        return None
    if placed is None or (strict and np.abs(placed - ends).max() > 1.4 * gap):
        return None
    return placed


def _write(ax, names: list[tuple], placed) -> None:
    for (value, text, colour), place in zip(names, placed):
        at = ax.transData.transform((ax.get_xlim()[1], value))[1]
        ax.annotate(
            text, (1, value), xycoords=("axes fraction", "data"), xytext=(3, (place - at) * 72 / ax.figure.dpi),
            textcoords="offset points", va="center", ha="left", color=colour, clip_on=False, annotation_clip=False,
        )  # fmt: skip


def spread_out(places, gap: float, low: float, high: float):
    """Positions at least `gap` apart within [low, high], as near as may be to `places`; None where they cannot fit.

    >>> spread_out(np.array([5.0, 5.0]), 2.0, 0.0, 10.0).tolist()
    [4.0, 6.0]
    """
    if gap * (len(places) - 1) > high - low:
        return None
    order = np.argsort(places, kind="stable")
    clusters = [[place, 1] for place in np.clip(np.asarray(places, float)[order], low, high)]  # centre, how many
    index = 0
    while index + 1 < len(clusters):
        (left, count), (right, more) = clusters[index : index + 2]
        if right - left >= gap * (count + more) / 2 - 1e-9:
            index += 1
            continue
        half = gap * (count + more - 1) / 2
        centre = np.clip((left * count + right * more) / (count + more), low + half, high - half)
        clusters[index : index + 2] = [[centre, count + more]]
        index = max(0, index - 1)
    result = np.empty(len(order))
    result[order] = np.concatenate([centre + gap * (np.arange(count) - (count - 1) / 2) for centre, count in clusters])
    return result
