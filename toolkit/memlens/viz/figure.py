"""A whole static figure: panels or small multiples, names of series beside or above the plots, the right size."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from matplotlib import rc_context, rc_params_from_file
from matplotlib.figure import Figure

from memlens import check
from memlens.viz.fit import fit_text
from memlens.viz.labels import name_lines, name_series
from memlens.viz.size import columns_of, height_of
from memlens.viz.spec import FigureSpec, specify
from memlens.viz.static import draw_chart
from memlens.viz.tidy import Chart, as_dataset, charts

__all__ = ["DPI", "STYLES", "Drawing", "compose", "draw", "look_of", "small_png"]

STYLES = {"memlens": 6.5, "neurips": 5.5, "slides": 10.0, "poster": 16.0}  # and the width they are made for, in inches
DPI = 100
MAX_BYTES = 60_000


def look_of(style: str | None) -> dict:
    """The rcParams of a style: the house's, then those of `neurips`, `slides` or `poster`.

    Raises:
        ValueError: an unknown style, with the nearest.
    """
    check.one_of("figures", STYLES, style=style or "memlens")
    here = Path(__file__).parent
    params: dict = {}
    for name in dict.fromkeys(("memlens", style or "memlens")):
        params |= rc_params_from_file(here / f"{name}.mplstyle", use_default_template=False)
    return params


class Drawing(Figure):
    """A matplotlib Figure that shows itself in a notebook as one small PNG, with or without pyplot."""

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        return shown(small_png(self))


def shown(png: bytes) -> tuple[dict, dict]:
    """What a notebook displays and stores: one PNG and a constant line of text."""
    return {"image/png": base64.b64encode(png).decode(), "text/plain": "<figure>"}, {}


def draw(data, plot: str | None = None, *, ax=None, **options):
    """Draw labelled data; returns the figure, or the artists when `ax` is given. Writes no file.

    Args:
        data: xarray Dataset or DataArray; axis text is `long_name` and `units` of what is drawn.
        plot: `lines`, `points`, `bars` or `heatmap`; or `panels=[{"plot": ..., ...}, ...]` for several plots.
        ax: matplotlib axes to draw one plain plot on (no legend outside, no size).
        options: the fields of `memlens.viz.Panel` and, for the figure, `title`, `width`, `height` (inches), `columns`,
            `sharex`, `sharey`, `widths`.
    Raises:
        TypeError: an unknown option; ValueError: an unknown kind, a name the data lack, a dimension left over.
    """
    spec = specify(plot, **options)
    data = as_dataset(data)
    if ax is None:
        return compose(data, spec)
    parts = [chart for panel in spec.panels for chart in charts(data, panel)]
    if len(parts) != 1:
        check.fail("draw", f"{len(parts)} plots on one ax", "one plot", "leave ax out")
    with rc_context(look_of(None)):
        artists = draw_chart(ax, parts[0])
        if not name_lines(ax, parts[0], direct=parts[0].panel.labels == "direct"):
            ax.legend(loc="best", title=parts[0].legend or None)
    return artists


def compose(data, spec: FigureSpec, *, style: str | None = None, width: float | None = None) -> Drawing:
    """The figure of a specification in a style, `width` inches wide (default the specification's, or the style's)."""
    params = look_of(style)
    width = width or (spec.width if style in (None, "memlens") else STYLES[style])
    groups = [charts(data, panel) for panel in spec.panels]
    parts = [chart for group in groups for chart in group]
    font = params["font.size"]
    with rc_context(params):
        columns = columns_of(spec, len(parts), width, font)
        figure = Drawing(figsize=(width, height_of(spec, parts, columns, width, font)), dpi=DPI, layout="constrained")
        figure.params = params
        axes = _axes(figure, spec, len(parts), columns)
        images = _fill(axes, groups)
        _share(axes, groups, spec)
        _name_axes_once(axes, groups, columns)
        _colourbars(figure, axes, groups, images)
        if spec.title:
            figure.suptitle(spec.title, x=0.01, ha="left")
        fit_text(figure)
        name_series(figure, axes, groups, columns)
    return figure


def _axes(figure, spec: FigureSpec, count: int, columns: int) -> list:
    ratios = spec.widths if spec.widths and len(spec.widths) == columns else None
    axes = list(figure.subplots(-(-count // columns), columns, squeeze=False, width_ratios=ratios).ravel())
    for spare in axes[count:]:
        spare.remove()
    return axes[:count]


def _fill(axes, groups: list[list[Chart]]) -> list:
    images, place = [], 0
    for group in groups:
        grids = [chart.grid.values for chart in group if chart.grid is not None]
        limits = (min(map(np.nanmin, grids)), max(map(np.nanmax, grids))) if grids else None
        for chart in group:
            images.append(draw_chart(axes[place], chart, limits))
            place += 1
    return images


def _share(axes, groups: list[list[Chart]], spec: FigureSpec) -> None:
    """Small multiples share both axes; panels share where asked."""
    place = 0
    for group in groups:
        row = axes[place : place + len(group)]
        for ax in row[1:]:
            if group[0].grid is None:
                ax.sharex(row[0])
                ax.sharey(row[0])
        if group[0].grid is None:
            row[0].autoscale_view()
        place += len(group)
    for ax in axes[1:]:
        if spec.sharex:
            ax.sharex(axes[0])
        if spec.sharey:
            ax.sharey(axes[0])


def _name_axes_once(axes, groups: list[list[Chart]], columns: int) -> None:
    """In small multiples only the left column names y and only the lowest plot of a column names x."""
    if len(groups) > 1:
        return
    for index, ax in enumerate(axes):
        if index % columns:
            ax.set_ylabel("")
            ax.tick_params(labelleft=False)
        if index + columns < len(axes):
            ax.set_xlabel("")
            ax.tick_params(labelbottom=False)


def _colourbars(figure, axes, groups, images) -> None:
    place = 0
    for group in groups:
        if group[0].grid is not None:
            row = axes[place : place + len(group)]
            bar = figure.colorbar(images[place], ax=row, label=group[0].grid.label, pad=0.02, aspect=25)
            bar.outline.set_visible(False)
        place += len(group)


def small_png(figure, *, limit: int = MAX_BYTES) -> bytes:
    """The figure as a PNG of 256 colours or fewer that stays under `limit` bytes, DPI dots an inch where that fits."""
    from PIL import Image

    params = getattr(figure, "params", {})
    for dpi, colours in ((DPI, 256), (DPI, 64), (80, 64), (60, 32), (40, 16)):
        raw = io.BytesIO()
        with rc_context(params):
            figure.savefig(raw, format="png", dpi=dpi, metadata={"Software": None})
        packed = io.BytesIO()
        Image.open(raw).convert("RGB").quantize(colours, dither=Image.Dither.NONE).save(packed, "png", optimize=True)
        if packed.tell() <= limit:
            break
    return packed.getvalue()
