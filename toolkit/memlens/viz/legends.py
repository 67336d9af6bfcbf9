"""Legends outside the data: one for all plots of a figure, or one above each plot."""

from __future__ import annotations

from matplotlib import rcParams

from memlens.viz.tidy import Chart

__all__ = ["legend_of_all", "legends_above"]


def legend_of_all(figure, ax, chart: Chart) -> None:
    """One legend over the whole figure: above the plots, or below them where the figure has a title."""
    handles, names = ax.get_legend_handles_labels()
    where = "outside lower left" if figure.get_suptitle() else "outside upper left"
    columns = fit_columns(names, figure.get_figwidth())
    legend = figure.legend(handles, names, loc=where, ncols=columns, **_titled(chart))
    high = figure.get_figheight()
    figure.set_figheight(high + 0.025 * rcParams["font.size"] * len(names))  # room to lay it out, then what it takes
    figure.draw_without_rendering()
    figure.set_figheight(high + legend.get_window_extent().height / figure.dpi)


def legends_above(figure, axes, plots: list[tuple], columns: int) -> None:
    """A legend between each plot and its title; the titles of a row stay level."""
    tallest: dict[int, float] = {}
    high = figure.get_figheight()
    figure.set_figheight(
        high + 0.025 * rcParams["font.size"] * max(len(chart.series) for _, chart in plots) * len(axes) / columns
    )
    for ax, chart in plots:
        row = axes.index(ax) // columns
        handles, names = ax.get_legend_handles_labels()
        wide = ax.get_window_extent().width / figure.dpi
        legend = ax.legend(
            handles, names, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.1, borderpad=0.1, labelspacing=0.25,
            handlelength=2.2, handletextpad=0.5, ncols=fit_columns(names, wide), **_titled(chart),
        )  # fmt: skip
        figure.draw_without_rendering()
        tallest[row] = max(tallest.get(row, 0.0), legend.get_window_extent().height / figure.dpi)
    for place, ax in enumerate(axes):
        if tall := tallest.get(place // columns):
            ax.set_title(ax.get_title("left"), pad=tall * 72 + rcParams["axes.titlepad"])
    figure.set_figheight(high + sum(tallest.values()))


def _titled(chart: Chart) -> dict:
    return {"title": chart.legend or None, "alignment": "left", "title_fontsize": rcParams["legend.fontsize"]}


def fit_columns(names: list[str], width: float) -> int:
    """As many columns as `width` inches hold, in rows of about equal length; a column is as wide as its longest name."""
    room = width * 72 / rcParams["font.size"]
    for rows in range(1, len(names) + 1):
        columns = [names[start : start + rows] for start in range(0, len(names), rows)]
        if sum(0.57 * max(map(len, column)) + 5.2 for column in columns) <= room:
            return len(columns)
    return 1
