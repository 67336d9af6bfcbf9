"""The same charts as the stored figures, drawn by holoviews with bokeh: hover, zoom, and fast enough for a slider."""

from __future__ import annotations

import numpy as np

from memlens.viz.palette import MAP
from memlens.viz.spec import FigureSpec
from memlens.viz.static import short
from memlens.viz.tidy import Axis, Chart, Series, charts, frontier

__all__ = ["to_holoviews"]

BOKEH_MARKS = {
    "o": "circle",
    "s": "square",
    "^": "triangle",
    "D": "diamond",
    "v": "inverted_triangle",
    "P": "cross",
    "X": "x",
    "*": "star",
}
PIXELS = 96  # an inch on screen


def to_holoviews(data, spec: FigureSpec):
    """The figure of a specification as a holoviews object: an element, or a layout of several.

    Call `memlens.viz.live()` once before, which loads bokeh.
    """
    import holoviews as hv

    groups = [charts(data, panel) for panel in spec.panels]
    parts = [chart for group in groups for chart in group]
    columns = min(spec.columns or 3, len(parts))
    width = int(spec.width * PIXELS * 1.15 / columns)
    height = int((spec.height or 0) * PIXELS) or int(min(max(0.62 * width, 240), 340))
    ranges = {id(chart): _limits(group) for group in groups for chart in group}
    drawn = [_draw(hv, chart, width, height, ranges[id(chart)]) for chart in parts]
    if len(drawn) == 1:
        return drawn[0]
    return (
        hv.Layout(drawn)
        .cols(columns)
        .opts(hv.opts.Layout(shared_axes=len(groups) == 1, toolbar=None, title=spec.title or ""))
    )


def _limits(group: list[Chart]) -> tuple[float, float] | None:
    grids = [chart.grid.values for chart in group if chart.grid is not None]
    return (min(map(np.nanmin, grids)), max(map(np.nanmax, grids))) if grids else None


def _draw(hv, chart: Chart, width: int, height: int, limits):
    common = {"width": width, "height": height, "title": chart.title or "", "toolbar": None, "fontscale": 1.0}
    if chart.grid is not None:
        return _heatmap(hv, chart, limits).opts(**common)
    draw = {"lines": _line, "points": _scatter, "bars": _bar}[chart.panel.plot]
    elements = [element for index, one in enumerate(chart.series) for element in draw(hv, chart, one, index)]
    elements = [*_references(hv, chart), *elements, *_frontier(hv, chart)]
    overlay = hv.Overlay(elements)
    named = any(one.label for one in chart.series)
    return overlay.opts(
        hv.opts.Overlay(
            **common, **_axis_options(chart), show_legend=named and chart.panel.labels != "none", legend_position="top",
            legend_cols=min(3, max(1, len(chart.series))), show_grid=True, active_tools=[],
        )
    )  # fmt: skip


def _axis_options(chart: Chart) -> dict:
    turned = chart.panel.plot == "bars" and chart.panel.horizontal
    across, down = (chart.y, chart.x) if turned else (chart.x, chart.y)
    options = {"xlabel": across.label, "ylabel": down.label, "logx": across.log, "logy": down.log}
    for name, axis in (("x", across), ("y", down)):
        if axis.limits:
            options[f"{name}lim"] = axis.limits
        if axis.categories is not None:
            options[f"{name}ticks"] = [(place, text) for place, text in enumerate(axis.categories)]
        elif axis.log and (ticks := _few(chart, name)):
            options[f"{name}ticks"] = ticks
    if turned:
        options["invert_yaxis"] = True
    return options


def _few(chart: Chart, name: str) -> list | None:
    values = np.unique(np.concatenate([getattr(one, name) for one in chart.series]))
    return [(value, short(value, 4)) for value in values] if name == "x" and len(values) <= 9 else None


def _dims(hv, chart: Chart) -> tuple:
    return hv.Dimension("x", label=chart.x.label or "x"), hv.Dimension("y", label=chart.y.label or "y")


def _line(hv, chart: Chart, one: Series, index: int):
    across, down = _dims(hv, chart)
    if one.low is not None:
        yield hv.Area((one.x, one.low, one.high), across, [down, "high"]).opts(
            color=one.look.colour, alpha=0.18, line_alpha=0
        )
    dash = [round(2 * part) for part in one.look.dash] or "solid"
    yield hv.Curve((one.x, one.y), across, down, label=one.label).opts(
        color=one.look.colour, line_dash=dash, line_width=2, tools=["hover"]
    )
    if chart.panel.markers and len(one.x) <= 40:
        yield _marks(hv, chart, one, 6)


def _marks(hv, chart: Chart, one: Series, size: int):
    across, down = _dims(hv, chart)
    marker = BOKEH_MARKS[one.look.marker]
    return hv.Scatter((one.x, one.y), across, down, label=one.label).opts(
        color=one.look.colour, marker=marker, size=size, line_color="white", tools=["hover"]
    )


def _scatter(hv, chart: Chart, one: Series, index: int):
    if one.low is not None:
        yield hv.Segments((one.x, one.low, one.x, one.high)).opts(color=one.look.colour)
    yield _marks(hv, chart, one, 9)
    if one.text:
        yield hv.Labels((one.x, one.y, list(one.text)), ["x", "y"], "text").opts(
            text_font_size="8pt", text_color="#444444", text_align="left", xoffset=0
        )


def _bar(hv, chart: Chart, one: Series, index: int):
    count = len(chart.series)
    panel = chart.panel
    if panel.stack:
        below = sum((_at(other, one.x) for other in chart.series[:index]), np.zeros(len(one.x)))
        left, right = one.x - 0.4, one.x + 0.4
    else:
        thick = 0.8 / count
        below = np.zeros(len(one.x))
        left = one.x + (index - count / 2) * thick
        right = left + thick * 0.94
    box = (below, left, below + one.y, right) if panel.horizontal else (left, below, right, below + one.y)
    yield hv.Rectangles(box, label=one.label).opts(color=one.look.colour, line_color="white", tools=["hover"])


def _at(series: Series, places: np.ndarray) -> np.ndarray:
    found = dict(zip(series.x, series.y))
    return np.array([found.get(place, 0.0) for place in places])


def _heatmap(hv, chart: Chart, limits):
    grid, panel = chart.grid, chart.panel
    rows, columns = grid.values.shape
    low, high = limits
    image = hv.Image(
        (np.arange(columns), np.arange(rows), grid.values)
        if min(rows, columns) > 1
        else (range(columns), range(rows), grid.values),
        [hv.Dimension("x", label=chart.x.label), hv.Dimension("y", label=chart.y.label)],
        hv.Dimension("value", label=grid.label),
    )
    options = {"xticks": _grid_ticks(chart.x, grid.across), "yticks": _grid_ticks(chart.y, grid.down)}
    return image.opts(
        cmap=panel.cmap or MAP, invert_yaxis=True, colorbar=True, clabel=grid.label, tools=["hover"],
        clim=(panel.vmin if panel.vmin is not None else low, panel.vmax if panel.vmax is not None else high), **options,
    )  # fmt: skip


def _grid_ticks(axis: Axis, values) -> list:
    step = max(1, -(-len(values) // (16 if axis.categories is None else 24)))
    return [(place, str(values[place])) for place in range(0, len(values), step)]


def _references(hv, chart: Chart):
    for line in chart.panel.reference or []:
        which = "x" if "x" in line else "y"
        value = line[which]
        stands = (which == "x") != (chart.panel.plot == "bars" and chart.panel.horizontal)
        if isinstance(value, list):
            yield (hv.VSpan if stands else hv.HSpan)(*value).opts(color="#999999", alpha=0.18)
        else:
            yield (hv.VLine if stands else hv.HLine)(value).opts(color="#666666", line_dash="dashed", line_width=1)


def _frontier(hv, chart: Chart):
    if chart.panel.pareto:
        x, y = (np.concatenate([getattr(one, name) for one in chart.series]) for name in "xy")
        best = frontier(x, y, chart.panel.pareto)
        across, down = _dims(hv, chart)
        yield hv.Curve((x[best], y[best]), across, down).opts(color="#888888", line_dash="dashed", line_width=1)
