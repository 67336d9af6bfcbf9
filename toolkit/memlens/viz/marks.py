"""What stands inside the axes of a live view, as holoviews elements: lines, points, bars, a heatmap, reference lines."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from memlens.viz.palette import MAP, MOST_MARKS, SWELL
from memlens.viz.tidy import Chart, Series, frontier

__all__ = ["bars", "frontier_line", "heatmap", "lines", "points", "reference_lines"]

MARKS = dict(zip("os^DvPX*", ["circle", "square", "triangle", "diamond", "inverted_triangle", "cross", "x", "star"]))
HATCHES = {
    "": None, "////": "right_diagonal_line", "xxx": "diagonal_cross", "\\\\\\\\": "left_diagonal_line",
    "---": "horizontal_line", "++": "cross", "|||": "vertical_line",
}  # fmt: skip


def _tips(dims, name: str) -> list[tuple[str, str]]:
    across, down = dims
    rows = [(across.label, f"@{{{across.name}}}{{0.[0000]}}"), (down.label, f"@{{{down.name}}}{{0.[0000]}}")]
    return [("", name), *rows] if name else rows


def lines(hv, chart: Chart, dims) -> Iterator:
    """A band, a line and its marks for each series."""
    for one in chart.series:
        if one.low is not None:
            area = hv.Area((one.x, one.low, one.high), dims[0], [dims[1], "high"])
            yield area.opts(color=one.look.colour, alpha=0.18, line_alpha=0)
        dash = [max(1, round(2 * part)) for part in one.look.dash] or "solid"
        marked = chart.panel.markers and len(one.x) <= MOST_MARKS
        curve = hv.Curve((one.x, one.y), *dims, label=one.label)
        hover = {} if marked else {"tools": ["hover"], "hover_tooltips": _tips(dims, one.label)}
        yield curve.opts(color=one.look.colour, line_dash=dash, line_width=2, **hover)
        if marked:
            yield _marks(hv, one, dims, size=7)


def _marks(hv, one: Series, dims, size: int):
    swollen = size * SWELL.get(one.look.marker, 1.0)
    return hv.Scatter((one.x, one.y), *dims, label=one.label).opts(
        color=one.look.colour, marker=MARKS[one.look.marker], size=swollen, line_color="white", tools=["hover"],
        hover_tooltips=_tips(dims, one.label),
    )  # fmt: skip


def points(hv, chart: Chart, dims) -> Iterator:
    """Marks for each series, with error bars and names."""
    for one in chart.series:
        if one.low is not None:
            spread = hv.Segments((one.x, one.low, one.x, one.high), [*dims, "x_end", "y_end"])
            yield spread.opts(color=one.look.colour)
        yield _marks(hv, one, dims, size=10)
        if one.text:
            named = hv.Labels((one.x, one.y, [f"  {text}" for text in one.text]), list(dims), "text")
            yield named.opts(text_font_size="8pt", text_color="#444444", text_align="left", text_baseline="bottom")


def bars(hv, chart: Chart, dims) -> Iterator:
    """Rectangles, side by side or piled up, with error bars."""
    piled: dict[float, float] = {}
    count = 1 if chart.panel.stack else len(chart.series)
    for order, one in enumerate(chart.series):
        middle = one.x + (0 if chart.panel.stack else (order - (count - 1) / 2) * 0.8 / count)
        half = 0.4 * (0.94 if count > 1 else 0.8) / count
        below = np.array([piled.get(place, 0.0) if chart.panel.stack else 0.0 for place in one.x])
        piled |= dict(zip(one.x, below + one.y))
        edges = _turned(chart, middle - half, below, middle + half, below + one.y)
        names = [chart.x.categories[int(place)] for place in one.x]
        box = hv.Rectangles((*edges, one.y, names), [*dims, "x_end", "y_end"], ["amount", "name"], label=one.label)
        tips = [("", ", ".join(filter(None, ["@name", one.label]))), (dims[1].label, "@amount{0.[0000]}")]
        hooks = [partial(_hatch, pattern=HATCHES[one.look.hatch])] if one.look.hatch else []
        yield box.opts(color=one.look.colour, line_color="white", tools=["hover"], hover_tooltips=tips, hooks=hooks)
        if one.low is not None:
            ends = _turned(chart, middle, one.low, middle, one.high)
            yield hv.Segments(ends, [*dims, "x_end", "y_end"]).opts(color="#333333")


def _hatch(plot, element, *, pattern: str) -> None:
    plot.handles["glyph"].update(hatch_pattern=pattern, hatch_color="white", hatch_alpha=0.7, hatch_scale=9)


def _turned(chart: Chart, x0, y0, x1, y1) -> tuple:
    return (y0, x0, y1, x1) if chart.panel.horizontal else (x0, y0, x1, y1)


def heatmap(hv, chart: Chart, dims, limits: tuple[float, float]):
    """The grid as an image whose first row is at the top."""
    grid, panel = chart.grid, chart.panel
    rows, columns = grid.values.shape
    bounds = (-0.5, -0.5, columns - 0.5, rows - 0.5)
    image = hv.Image(np.flipud(grid.values), list(dims), hv.Dimension("value", label=grid.label), bounds=bounds)
    low, high = limits
    counted = all(np.array_equal(values, np.arange(len(values))) for values in (grid.down, grid.across))
    tips = [(dims[0].label, "$x{0}"), (dims[1].label, "$y{0}")] if counted else []
    return image.opts(
        cmap=panel.cmap or MAP, invert_yaxis=True, colorbar=True, clabel=grid.label, tools=["hover"],
        hover_tooltips=[*tips, (grid.label, "@image{0.[0000]}")],
        clim=(low if panel.vmin is None else panel.vmin, high if panel.vmax is None else panel.vmax),
        colorbar_opts={
            "width": 12, "title_standoff": 10, "title_text_font_style": "normal", "title_text_font_size": "9pt",
            "major_label_text_font_size": "9pt",
        },
    )  # fmt: skip


def reference_lines(hv, chart: Chart, dims) -> Iterator:
    """Dashed lines and grey bands; a named one stands in the legend."""
    for line in chart.panel.reference or []:
        value = line["x"] if "x" in line else line["y"]
        stands = ("x" in line) != (chart.panel.plot == "bars" and chart.panel.horizontal)
        span = _extent(chart, "y" if "x" in line else "x")
        if isinstance(value, list):
            edges = (value[0], span[0], value[1], span[1]) if stands else (span[0], value[0], span[1], value[1])
            band = hv.Rectangles([edges], [*dims, "x_end", "y_end"], label=line.get("label", ""))
            yield band.opts(color="#999999", alpha=0.25, line_alpha=0)
            continue
        ends = ([value, value], span) if stands else (span, [value, value])
        curve = hv.Curve(ends, *dims, label=line.get("label", ""))
        yield curve.opts(color="#666666", line_dash=[4, 4], line_width=1.5)


def _extent(chart: Chart, name: str) -> list[float]:
    values = np.concatenate([getattr(one, name) for one in chart.series])
    low, high = float(values.min()), float(values.max())
    if chart.panel.plot == "bars":
        return [min(low, 0.0), high] if name == "y" else [low - 0.5, high + 0.5]
    return [low, high]


def frontier_line(hv, chart: Chart, dims) -> Iterator:
    """The points that no other beats, joined."""
    if chart.panel.pareto:
        x, y = (np.concatenate([getattr(one, name) for one in chart.series]) for name in "xy")
        best = frontier(x, y, chart.panel.pareto)
        yield hv.Curve((x[best], y[best]), *dims).opts(color="#888888", line_dash=[6, 4], line_width=1.5)
