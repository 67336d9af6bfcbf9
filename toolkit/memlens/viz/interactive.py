"""The same charts as the stored figures, drawn by holoviews with bokeh: with hover, and fast enough for a slider."""

from __future__ import annotations

from functools import partial

import numpy as np

from memlens.viz.marks import bars, frontier_line, heatmap, lines, points, reference_lines
from memlens.viz.spec import FigureSpec
from memlens.viz.tidy import Axis, Chart, charts
from memlens.viz.words import short, ticks_at

__all__ = ["to_holoviews"]

PIXELS = 110  # for an inch of the stored figure
GREY = "#555555"


def to_holoviews(data, spec: FigureSpec):
    """The figure of a specification as a holoviews object: an overlay, an image, or a layout of several.

    Call `memlens.viz.live()` once before, which loads bokeh.
    """
    import holoviews as hv

    groups = [charts(data, panel) for panel in spec.panels]
    parts = [(chart, group, f"{number}") for number, group in enumerate(groups) for chart in group]
    columns = min(spec.columns or 3, len(parts))
    width = int(spec.width * PIXELS / columns)
    height = int((spec.height or 0) * PIXELS) or max(_tall(chart, width) for chart, *_ in parts)
    size = {"width": width, "height": height}
    drawn = [_draw(chart, _colour_range(group), hv, tag, width).opts(**size) for chart, group, tag in parts]
    if len(drawn) == 1:
        return drawn[0]
    title = {"title": spec.title} if spec.title else {}
    return hv.Layout(drawn).cols(columns).opts(shared_axes=len(groups) == 1, toolbar=None, **title)


def _tall(chart: Chart, width: int) -> int:
    """Pixels from top to bottom; a map of few rows is low, a square one high."""
    if chart.grid is None:
        return int(np.clip(0.62 * width, 300, 350))
    rows, columns = chart.grid.values.shape
    return int(np.clip((width - 160) * rows / columns, 150, 400)) + 80


def _colour_range(group: list[Chart]) -> tuple[float, float] | None:
    grids = [chart.grid.values for chart in group if chart.grid is not None]
    return (min(map(np.nanmin, grids)), max(map(np.nanmax, grids))) if grids else None


def _draw(chart: Chart, limits, hv, tag: str, width: int):
    """One chart; `tag` keeps the axes of different panels apart, which holoviews ties together by name."""
    dims = (hv.Dimension(f"x{tag}", label=chart.x.label or "x"), hv.Dimension(f"y{tag}", label=chart.y.label or "y"))
    style = partial(_house_style, meaning=chart.legend)
    common = {"title": chart.title or "", "toolbar": None, "hooks": [style], "active_tools": []}
    if chart.grid is not None:
        across, down = _grid_ticks(chart.x, chart.grid.across, width // 60), _grid_ticks(chart.y, chart.grid.down, 10)
        ticks = {"xticks": across, "yticks": down, **_rotation(across, width - 60)}
        return heatmap(hv, chart, dims, limits).opts(**common, **ticks)
    draw = {"lines": lines, "points": points, "bars": bars}[chart.panel.plot]
    elements = [*reference_lines(hv, chart, dims), *frontier_line(hv, chart, dims), *draw(hv, chart, dims)]
    names = len(chart.series) + len(chart.panel.reference or [])
    named = any(one.label for one in chart.series) and chart.panel.labels != "none"
    legend = {"show_legend": named, "legend_position": "top", "legend_cols": _legend_columns(chart, names)}
    axes = _axis_options(chart)
    axes |= _rotation(axes.get("xticks"), width)
    return hv.Overlay(elements).opts(**common, **axes, **legend, show_grid=True, padding=(0.03, 0.08))


def _legend_columns(chart: Chart, names: int) -> int:
    longest = max((len(one.label) for one in chart.series), default=1)
    return max(1, min(names, 90 // (longest + 6)))


def _axis_options(chart: Chart) -> dict:
    turned = chart.panel.plot == "bars" and chart.panel.horizontal
    across, down = (chart.y, chart.x) if turned else (chart.x, chart.y)
    options = {"xlabel": across.label, "ylabel": down.label, "logx": across.log, "logy": down.log}
    for name, axis in (("x", across), ("y", down)):
        if axis.limits:
            options[f"{name}lim"] = axis.limits
        if axis.categories is not None:
            options[f"{name}ticks"] = list(enumerate(axis.categories))
        elif axis.log and axis is chart.x and (ticks := ticks_at(np.concatenate([one.x for one in chart.series]))):
            options[f"{name}ticks"] = ticks
    if chart.panel.plot == "bars" and (top := _bar_top(chart)) and not chart.y.limits:
        options["xlim" if turned else "ylim"] = (0, top)
    if turned:
        options["invert_yaxis"] = True
    return options


def _bar_top(chart: Chart) -> float | None:
    """Where the axis of bars that stand on zero ends; None where one hangs below it or the axis is logarithmic."""
    if chart.y.log or any((one.y < 0).any() for one in chart.series):
        return None
    piles: dict[float, float] = {}
    for one in chart.series:
        for place, high in zip(one.x, one.y if one.high is None else one.high):
            piles[place] = piles.get(place, 0.0) + high if chart.panel.stack else max(piles.get(place, 0.0), high)
    return 1.06 * max(piles.values(), default=0.0) or None


def _grid_ticks(axis: Axis, values, most: int) -> list:
    names = axis.categories or [short(value, 4) for value in values]
    steps = (step * ten for ten in (1, 10, 100, 1000, 10_000) for step in (1, 2, 5))
    least = len(names) / (most if axis.categories is None else 24)
    step = next(step for step in steps if step >= least)
    return [(place, names[place]) for place in range(0, len(names), step)]


def _rotation(ticks: list | None, width: int) -> dict:
    """Words below an axis stand upright where they would touch side by side."""
    words = [text for _, text in ticks or []]
    return {"xrotation": 90} if sum(len(text) * 6 + 12 for text in words) > width - 90 else {}


def _house_style(plot, element, *, meaning: str) -> None:
    """Upright text in the sizes of the stored figures, no frame, the legend close to the plot."""
    figure = plot.state
    figure.outline_line_color = None
    figure.title.update(text_font_size="11pt", text_font_style="normal", text_color="#222222")
    for axis in figure.axis:
        axis.update(
            axis_label_text_font_style="normal", axis_label_text_font_size="10pt", major_label_text_font_size="9pt",
            minor_tick_line_color=None, axis_line_color="#444444", major_tick_line_color="#444444",
        )  # fmt: skip
    for legend in figure.legend:
        legend.update(
            border_line_alpha=0, background_fill_alpha=0, label_text_font_size="9pt", margin=0, padding=2, spacing=14,
            label_text_color=GREY, glyph_width=28, title=meaning or None, title_text_font_style="normal",
            title_text_font_size="9pt",
        )  # fmt: skip
