"""Live views in Jupyter: sliders that drive a function, and its picture drawn again as they move, with the network off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from memlens import check
from memlens.viz.spec import specify

__all__ = ["View", "explore", "live", "widget_for"]


class View(NamedTuple):
    """What a function given to `explore` returns: labelled data and how to draw them."""

    data: Any  # xarray Dataset or DataArray
    plot: str | None = None
    options: dict[str, Any] = {}  # noqa: RUF012 - never written to


def live() -> None:
    """Load bokeh and holoviews into the notebook page from the installed packages, then hvplot. Needs no network.

    `explore` calls it; call it before drawing with `.hvplot` by hand. The script it puts on the page is what makes a cell
    heavy: tag that cell `live`, so that it is not stored.
    """
    import holoviews

    holoviews.extension("bokeh", inline=True, logo=False)
    import hvplot.xarray  # noqa: F401 - registers .hvplot, and must come after the extension


def explore(fn: Callable[..., Any], **widgets):
    """Sliders and menus that call `fn(**values)` and show what it returns, again whenever one moves.

    Args:
        fn: returns a `View`, an xarray object (drawn as lines or a heatmap), or a holoviews or hvplot object; called with
            the values by name.
        widgets: for each argument `(low, high)` or `(low, high, step)` for a slider, a list for a menu, a bool for a
            tick box, or any ipywidgets widget.
    Returns:
        the ipywidgets box that the cell shows.
    Raises:
        TypeError: a widget of another form. An error in `fn` is shown in place of the picture.
    """
    import ipywidgets

    live()
    controls = {name: widget_for(name, given) for name, given in widgets.items()}
    screen = ipywidgets.Output()

    def update(_=None) -> None:
        show(screen, fn(**{name: control.value for name, control in controls.items()}))

    for control in controls.values():
        control.observe(update, "value")
    update()
    return ipywidgets.VBox([ipywidgets.HBox(list(controls.values()), layout={"flex_flow": "row wrap"}), screen])


def show(screen, result) -> None:
    """Put a result on an Output widget in one step, so that nothing flickers."""
    data, metadata = bundle(picture(result))
    screen.outputs = ({"output_type": "display_data", "data": data, "metadata": metadata},)


def bundle(drawn) -> tuple[dict, dict]:
    """What a notebook shows for an object, as (data, metadata); an error while it is drawn is raised, not shown."""
    import holoviews
    from IPython.core.formatters import DisplayFormatter

    if isinstance(drawn, holoviews.core.Dimensioned):
        return holoviews.renderer("bokeh").components(drawn)
    return DisplayFormatter().format(drawn)


def picture(result):
    """The holoviews object for what `fn` returned; anything that is not data is shown as it is."""
    import xarray

    from memlens.viz.interactive import to_holoviews
    from memlens.viz.tidy import as_dataset

    if isinstance(result, (xarray.Dataset, xarray.DataArray)):
        result = View(result)
    if isinstance(result, View):
        return to_holoviews(as_dataset(result.data), specify(result.plot, **result.options))
    return result


def widget_for(name: str, given):
    """The ipywidgets widget for one argument of `explore`."""
    import ipywidgets

    style = {"description": name.replace("_", " "), "style": {"description_width": "initial"}}
    if isinstance(given, ipywidgets.Widget):
        return given
    if isinstance(given, bool):
        return ipywidgets.Checkbox(value=given, **style)
    if isinstance(given, (list, dict)):
        return ipywidgets.Dropdown(options=given, **style)
    if isinstance(given, tuple) and len(given) in (2, 3) and all(isinstance(one, (int, float)) for one in given):
        low, high, step = (
            *given,
            1 if isinstance(given[0], int) and isinstance(given[1], int) else (given[1] - given[0]) / 50,
        )[:3]
        kind = ipywidgets.IntSlider if all(isinstance(one, int) for one in (low, high, step)) else ipywidgets.FloatSlider
        return kind(value=low + step * round((high - low) / step / 2), min=low, max=high, step=step, **style)
    came = f"{name}={given!r}"
    check.fail("explore", came, "(low, high, step), a list, a bool or an ipywidgets widget", error=TypeError)
