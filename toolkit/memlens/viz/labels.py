"""Names of series: beside the ends of their lines where there is room, else in one legend outside the plots."""

from __future__ import annotations

import numpy as np
from matplotlib import rcParams

from memlens.viz.palette import darker
from memlens.viz.tags import tag_points
from memlens.viz.tidy import Chart

__all__ = ["name_lines", "name_series", "spread_out"]

MOST_DIRECT = 6
GREY = "#555555"


def name_series(figure, axes, groups: list[list[Chart]]) -> None:
    """Name every series once on the whole figure, and the reference lines at the right edge of each group.

    A legend makes the figure taller by its own height, so that the plots keep theirs.
    """
    figure.draw_without_rendering()
    legends: dict[str, tuple] = {}
    parts = [(chart, group) for group in groups for chart in group]
    for ax, (chart, group) in zip(axes, parts):
        alone = len(parts) == 1 or chart.panel.labels == "direct"
        if not name_lines(ax, chart, direct=alone, references=chart is group[-1]):
            for handle, name in zip(*ax.get_legend_handles_labels()):
                legends.setdefault(name, (handle, chart.legend))
    if legends:
        _legend_outside(figure, legends)
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


def _legend_outside(figure, legends: dict[str, tuple]) -> None:
    """Above the plots, or below them where the figure has a title."""
    titles = {title for _, title in legends.values()}
    handles = [handle for handle, _ in legends.values()]
    where = "outside lower left" if figure.get_suptitle() else "outside upper left"
    title = titles.pop() if len(titles) == 1 else None
    legend = figure.legend(
        handles, list(legends), loc=where, ncols=_columns(figure, list(legends)), title=title or None, alignment="left",
        title_fontsize=rcParams["legend.fontsize"],
    )  # fmt: skip
    figure.draw_without_rendering()
    figure.set_figheight(figure.get_figheight() + legend.get_window_extent().height / figure.dpi)


def _columns(figure, names: list[str]) -> int:
    """As many columns as the width holds, in rows of about equal length; a column is as wide as its longest name."""
    letter = rcParams["font.size"] / 72
    room = figure.get_figwidth() / letter
    for rows in range(1, len(names) + 1):
        columns = [names[start : start + rows] for start in range(0, len(names), rows)]
        if sum(0.57 * max(map(len, column)) + 5.2 for column in columns) <= room:
            return len(columns)
    return 1
