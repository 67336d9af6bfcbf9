"""How large a figure is and how its plots stand: columns that fit the width, heights that suit what is drawn."""

from __future__ import annotations

import numpy as np

from memlens.viz.spec import FigureSpec
from memlens.viz.tidy import Chart

__all__ = ["columns_of", "height_of"]

NARROWEST = 1.75  # inches of a plot with its labels, at 9 points


def columns_of(spec: FigureSpec, count: int, width: float, font: float) -> int:
    """How many of `count` plots stand side by side in `width` inches with text of `font` points."""
    fit = max(1, int(width / (NARROWEST * font / 9)))
    most = min(spec.columns or (4 if count in (4, 7, 8) or count > 9 else 3), count, fit)
    rows = -(-count // most)
    return most if spec.columns else -(-count // rows)  # 4 plots where 3 fit stand 2 by 2


def height_of(spec: FigureSpec, parts: list[Chart], columns: int, width: float, font: float) -> float:
    """Inches from top to bottom, without the legend; a height in the specification is for its own width."""
    rows = [parts[start : start + columns] for start in range(0, len(parts), columns)]
    if spec.height:
        return spec.height * max(width / spec.width, 0.7)
    return sum(max(_tall(chart, width / columns, font) for chart in row) for row in rows) + 0.15 * font / 9


def _tall(chart: Chart, wide: float, font: float) -> float:
    """Height of one plot in a cell `wide` inches across; text around the axes takes about five lines."""
    unit = font / 9
    if chart.grid is not None:
        rows, columns = chart.grid.values.shape
        return min(max((wide - 1.1 * unit) * np.clip(rows / columns, 0.3, 1.0), 1.0 * unit), 3.6 * unit) + 0.65 * unit
    if chart.panel.plot == "bars" and chart.panel.horizontal:
        bars = len(chart.x.categories or ()) * (1 if chart.panel.stack else max(1, 0.8 * len(chart.series)))
        return (0.75 + 0.2 * bars + 0.06 * len(chart.x.categories or ())) * unit
    return min(max(0.62 * wide, 1.9 * unit), 3.2 * unit)
