"""Live views in Jupyter: sliders that drive a function, and its picture drawn again as they move, with the network off."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple
from uuid import uuid4

from memlens import check
from memlens.viz import page
from memlens.viz.spec import specify

__all__ = ["View", "explore", "live", "widget_for"]

PAUSE = 0.02  # seconds in which the moves of a dragged slider become one


class View(NamedTuple):
    """What a function given to `explore` returns: labelled data and how to draw them."""

    data: Any  # xarray Dataset or DataArray
    plot: str | None = None
    options: dict[str, Any] = {}  # noqa: RUF012 - never written to


def live() -> None:
    """Make holoviews and `.hvplot` draw in this notebook from the installed packages, with no network.

    `explore` calls it; call it yourself before showing `.hvplot` pictures. It puts a megabyte of script into the cell's
    output: tag that cell `live`, so that it is not stored.
    """
    import holoviews
    from holoviews.util import extension
    from IPython.utils.capture import capture_output

    # the extension for notebooks fetches style sheets from the network and takes a second longer: hvplot is given the plain one
    for_notebooks, holoviews.extension = holoviews.extension, extension
    try:
        with capture_output():  # of an hvplot that was there before
            if "bokeh" not in holoviews.Store.renderers:
                holoviews.extension("bokeh")
            import hvplot.xarray  # noqa: F401 - registers .hvplot, and must come after the extension
    finally:
        holoviews.extension = for_notebooks
    page.load()
    page.register()


def explore(fn: Callable[..., Any], **widgets):
    """Sliders and menus that call `fn(**values)` and show what it returns, again whenever one moves.

    Args:
        fn: called with the values by name; returns a `View`, an xarray object, a holoviews or hvplot object, or anything
            else that a notebook can show.
        widgets: for each argument `(low, high)` or `(low, high, step)` for a slider, which starts at `low` (or at `value`
            in `(low, high, step, value)`), a list or a mapping for a menu, a bool for a tick box, or any ipywidgets widget.
    Returns:
        the ipywidgets box that the cell shows.
    Raises:
        TypeError: a widget of another form; what `fn` raises at the first call; later errors stand in the picture's place.
    """
    import ipywidgets

    live()
    controls = {name: widget_for(name, given) for name, given in widgets.items()}
    screen = Screen()
    screen.show(fn(**_values(controls)))
    mover = Mover(lambda: screen.attempt(fn, **_values(controls)))
    for control in controls.values():
        control.observe(mover, "value")
    row = ipywidgets.HBox(list(controls.values()), layout={"flex_flow": "row wrap"})
    return ipywidgets.VBox([row, screen.box]).add_class("memlens-view")


def _values(controls: dict) -> dict:
    return {name: control.value for name, control in controls.items()}


class Mover:
    """Calls `update` soon after a change; changes that come close together become one call."""

    def __init__(self, update: Callable[[], None]):
        self.update, self.waiting = update, None

    def __call__(self, change=None) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # outside a kernel
            self.update()
            return
        if self.waiting is not None:
            self.waiting.cancel()
        self.waiting = loop.call_later(PAUSE, self.update)


class Screen:
    """Where a live view shows its picture: a place on the page for bokeh, and an Output for anything else."""

    def __init__(self):
        import ipywidgets

        self.place = uuid4().hex
        self.picture = ipywidgets.HTML(f'<div id="{self.place}" class="memlens-picture"></div>')
        self.other = ipywidgets.Output()
        self.box = ipywidgets.VBox([self.picture, self.other]).add_class("memlens-screen")

    def show(self, result) -> None:
        """Draw what a function returned."""
        import holoviews

        drawn = drawable(result)
        if isinstance(drawn, holoviews.core.Dimensioned):
            self._put("", {page.script_type: page.script_of(drawn, self.place)})
        else:
            from IPython.core.formatters import DisplayFormatter

            self._put("none", *DisplayFormatter().format(drawn))

    def attempt(self, fn: Callable, **values) -> None:
        """Show what `fn` returns, or the error it raises."""
        try:
            self.show(fn(**values))
        except Exception as error:
            self._put("none", {"text/plain": "".join(traceback.format_exception_only(error))})

    def _put(self, shown: str, data: dict, metadata: dict | None = None) -> None:
        self.picture.layout.display = shown or None
        self.other.outputs = ({"output_type": "display_data", "data": data, "metadata": metadata or {}},)


def drawable(result):
    """The holoviews object for a `View` or labelled data; anything else as it is."""
    import xarray

    from memlens.viz.interactive import to_holoviews

    if isinstance(result, (xarray.Dataset, xarray.DataArray)):
        result = View(result)
    if isinstance(result, View):
        return to_holoviews(result.data, specify(result.plot, **result.options))
    return result


def widget_for(name: str, given):
    """The ipywidgets widget for one argument of `explore`."""
    import ipywidgets

    style = {"description": name.replace("_", " "), "style": {"description_width": "initial"}}
    if isinstance(given, ipywidgets.Widget):
        return given
    if isinstance(given, bool):
        return ipywidgets.Checkbox(value=given, indent=False, **style)
    if isinstance(given, (list, dict)):
        return ipywidgets.Dropdown(options=given, **style)
    if (
        not isinstance(given, tuple)
        or len(given) not in (2, 3, 4)
        or not all(isinstance(one, (int, float)) for one in given)
    ):
        check.fail(
            "explore", f"{name}={given!r}", "(low, high, step), a list, a bool or an ipywidgets widget", error=TypeError
        )
    whole = all(isinstance(one, int) for one in given)
    low, high, step, value = (*given, *(None,) * (4 - len(given)))
    step = step if step is not None else 1 if whole else (high - low) / 20
    slider = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
    return slider(value=low if value is None else value, min=low, max=high, step=step, **style)
