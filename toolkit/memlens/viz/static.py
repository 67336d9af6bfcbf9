"""One chart on given matplotlib axes."""

from __future__ import annotations

import numpy as np
from matplotlib import rcParams
from matplotlib.container import BarContainer
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from memlens.viz.palette import MAP, MOST_MARKS, SWELL
from memlens.viz.tidy import Axis, Chart, Series, frontier
from memlens.viz.words import short, ticks_at

__all__ = ["draw_chart"]


def draw_chart(ax, chart: Chart, limits: tuple[float, float] | None = None):
    """Draw a chart on `ax` and return what was drawn: the artists of its series, or the image of a heatmap.

    Args:
        limits: the colour range that a row of heatmaps shares, (lowest, highest).
    """
    if chart.grid is not None:
        artists = _heatmap(ax, chart, limits)
    else:
        artists = {"lines": _lines, "points": _points, "bars": _bars}[chart.panel.plot](ax, chart)
        _references(ax, chart)
    if chart.title:
        ax.set_title(chart.title)
    return artists


def _lines(ax, chart: Chart) -> list:
    drawn = []
    for order, one in enumerate(chart.series):
        style = {
            "color": one.look.colour,
            "linestyle": (0, one.look.dash) if one.look.dash else "-",
            "zorder": 3 + 0.01 * order,
        }
        if chart.panel.markers and len(one.x) <= MOST_MARKS:
            style |= {"marker": one.look.marker, "markeredgecolor": "white", "markersize": _size(one)}
        drawn += ax.plot(one.x, one.y, label=one.label, **style)
        if one.low is not None:
            ax.fill_between(one.x, one.low, one.high, color=one.look.colour, alpha=0.18, linewidth=0, zorder=2)
    _axes(ax, chart)
    return drawn


def _size(one: Series) -> float:
    return rcParams["lines.markersize"] * SWELL.get(one.look.marker, 1.0)


def _points(ax, chart: Chart) -> list:
    drawn = []
    for one in chart.series:
        if one.low is not None:
            spread = (one.y - one.low, one.high - one.y)
            ax.errorbar(one.x, one.y, yerr=spread, fmt="none", ecolor=one.look.colour, elinewidth=1, capsize=2, zorder=2)
        marks = {"marker": one.look.marker, "markeredgecolor": "white", "markersize": 1.4 * _size(one)}
        drawn += ax.plot(one.x, one.y, linestyle="none", color=one.look.colour, label=one.label, zorder=3, **marks)
    if chart.panel.pareto:
        x, y = (np.concatenate([getattr(one, name) for one in chart.series]) for name in "xy")
        best = frontier(x, y, chart.panel.pareto)
        ax.plot(x[best], y[best], color="#888888", linewidth=1, dashes=(3, 2), zorder=1, label="_frontier")
    _axes(ax, chart)
    return drawn


def _bars(ax, chart: Chart) -> list[BarContainer]:
    drawn, base = [], {}
    count = 1 if chart.panel.stack else len(chart.series)
    thick = 0.8 / count
    put = ax.barh if chart.panel.horizontal else ax.bar
    size = "height" if chart.panel.horizontal else "width"
    for order, one in enumerate(chart.series):
        shift = 0 if chart.panel.stack else (order - (count - 1) / 2) * thick
        below = np.array([base.get(place, 0.0) for place in one.x])
        paint = {
            "color": one.look.colour,
            "hatch": one.look.hatch,
            "edgecolor": "white",
            "linewidth": 0.6,
            "label": one.label,
        }
        start = {"left" if chart.panel.horizontal else "bottom": below} if chart.panel.stack else {}
        drawn.append(put(one.x + shift, one.y, **{size: thick * (0.94 if count > 1 else 0.8)}, **start, **paint))
        base |= dict(zip(one.x, below + one.y))
        if one.low is not None:
            which = "xerr" if chart.panel.horizontal else "yerr"
            spots = (one.y, one.x + shift) if chart.panel.horizontal else (one.x + shift, one.y)
            ax.errorbar(
                *spots,
                **{which: (one.y - one.low, one.high - one.y)},
                fmt="none",
                ecolor="#333333",
                elinewidth=1,
                capsize=2,
            )
        if chart.panel.annotate and not chart.panel.stack:
            ax.bar_label(drawn[-1], labels=[short(value) for value in one.y], padding=2, fontsize="small", color="#333333")
    _axes(ax, chart)
    if chart.panel.annotate:
        ax.margins(**{"x" if chart.panel.horizontal else "y": 0.12})
    return drawn


def _heatmap(ax, chart: Chart, limits) -> object:
    grid, panel = chart.grid, chart.panel
    low, high = limits or (np.nanmin(grid.values), np.nanmax(grid.values))
    low = panel.vmin if panel.vmin is not None else low
    high = panel.vmax if panel.vmax is not None else high
    image = ax.imshow(
        grid.values, cmap=panel.cmap or MAP, vmin=low, vmax=high, aspect="auto", origin="upper", interpolation="nearest"
    )
    ax.grid(False)
    for which, axis, values in (("x", chart.x, grid.across), ("y", chart.y, grid.down)):
        _grid_ticks(getattr(ax, f"{which}axis"), axis, values)
    ax.set(xlabel=chart.x.label, ylabel=chart.y.label)
    for spine in ax.spines.values():
        spine.set_visible(False)
    if panel.annotate:
        for (row, column), value in np.ndenumerate(grid.values):
            if np.isfinite(value):
                light = image.cmap(image.norm(value))
                ink = "white" if np.dot(light[:3], (0.299, 0.587, 0.114)) < 0.55 else "black"
                ax.text(column, row, short(value, 2), ha="center", va="center", color=ink, fontsize="small")
    return image


def _grid_ticks(axis, described: Axis, values) -> None:
    names = described.categories or [f"{value:g}" for value in values]
    if len(values) <= 16 or described.categories:
        step = max(1, -(-len(values) // 24))
        axis.set_major_locator(FixedLocator(range(0, len(values), step)))
    else:
        axis.set_major_locator(MaxNLocator(8, integer=True))
    axis.set_major_formatter(FuncFormatter(lambda place, _: names[int(place)] if 0 <= place < len(names) else ""))


def _axes(ax, chart: Chart) -> None:
    """Scales, limits, ticks and labels; bars that lie down swap the axes and read from the top."""
    across, down = ("y", "x") if chart.panel.plot == "bars" and chart.panel.horizontal else ("x", "y")
    for which, axis in ((across, chart.x), (down, chart.y)):
        if axis.log:
            getattr(ax, f"set_{which}scale")("log")
        if axis.limits:
            getattr(ax, f"set_{which}lim")(*axis.limits)
        if axis.log:
            _log_ticks(getattr(ax, f"{which}axis"), *getattr(ax, f"get_{which}lim")())
        elif max(map(abs, getattr(ax, f"get_{which}lim")())) >= 1e5:
            getattr(ax, f"{which}axis").set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        getattr(ax, f"set_{which}label")(axis.label)
        if axis.categories is not None:
            getattr(ax, f"{which}axis").set_major_locator(FixedLocator(range(len(axis.categories))))
            getattr(ax, f"{which}axis").set_major_formatter(lambda place, _, names=axis.categories: _at(names, place))
            ax.grid(False, axis=which)
    if chart.x.log and chart.x.categories is None:
        _ticks_at_data(getattr(ax, f"{across}axis"), chart.series)
    if across == "y":
        ax.invert_yaxis()


def _at(names: tuple[str, ...], place: float) -> str:
    index = round(place)
    return names[index] if abs(place - index) < 1e-6 and 0 <= index < len(names) else ""


def _log_ticks(axis, low: float, high: float) -> None:
    """Ticks at 1, 2, 5 over less than two decades, written as plain numbers where those are short."""
    decades = np.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,), numticks=9))
    axis.set_minor_formatter(NullFormatter())
    if low >= 8e-4:
        axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def _ticks_at_data(axis, series: tuple[Series, ...]) -> None:
    """On a log axis with few measured values, the ticks are those values."""
    if found := ticks_at(np.concatenate([one.x for one in series])):
        names = dict(found)
        axis.set_major_locator(FixedLocator(list(names)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: names.get(value, "")))


def _references(ax, chart: Chart) -> None:
    for line in chart.panel.reference or []:
        which = "x" if "x" in line else "y"
        value = line[which]
        turned = chart.panel.plot == "bars" and chart.panel.horizontal
        stands = (which == "x") != turned
        if isinstance(value, list):
            (ax.axvspan if stands else ax.axhspan)(*value, color="#999999", alpha=0.18, linewidth=0, zorder=0.5)
            value = sum(value) / 2
        else:
            (ax.axvline if stands else ax.axhline)(value, color="#666666", linewidth=1, dashes=(4, 2), zorder=1.5)
        if stands and line.get("label"):  # a horizontal line is named at the right edge, with the series
            ax.annotate(
                line["label"], (value, 1), xycoords=("data", "axes fraction"), xytext=(0, 2), textcoords="offset points",
                ha="center", va="bottom", color="#555555", fontsize="small", clip_on=False,
            )  # fmt: skip
