"""Bokeh on a notebook page without a network: its script from the installed package, its pictures swapped in place."""

from __future__ import annotations

import json
from functools import lru_cache
from uuid import uuid4

__all__ = ["as_bokeh", "html_of", "load", "register", "script_of", "script_type"]

script_type = "application/javascript"

# Puts Bokeh's own script on the page unless that version is there.
_LOAD = """(() => {
  if (window.Bokeh && window.Bokeh.version === %(version)s) return;
  const script = document.createElement("script");
  script.textContent = %(code)s;
  document.head.appendChild(script);
})()"""

# Draws an item out of sight in the place with this id and then takes the picture before it away, so that nothing flickers.
_DRAW = """(async () => {
  const item = %(item)s, id = %(place)s;
  const pause = (ms) => new Promise((done) => setTimeout(done, ms));
  const missing = () => !window.Bokeh || !document.getElementById(id);
  for (let turn = 0; turn < 200 && missing(); turn++) await pause(50);
  const place = document.getElementById(id);
  if (!place) return;
  if (!window.Bokeh) { place.textContent = "The picture needs its script: run this cell again."; return; }
  const turn = (place.turn = (place.turn || 0) + 1), old = place.shown;
  const fresh = document.createElement("div");
  fresh.id = item.target_id;
  if (old) fresh.style.cssText = "position: absolute; visibility: hidden";
  place.appendChild(fresh);
  const views = await window.Bokeh.embed.embed_item(item);
  if (place.turn !== turn) { fresh.remove(); return; }
  place.replaceChildren(fresh);
  fresh.style.cssText = "";
  place.shown = views;
  if (old) {
    const past = old.roots.map((view) => view.model.document);
    old.clear();
    window.Bokeh.documents.splice(0, Infinity, ...window.Bokeh.documents.filter((each) => !past.includes(each)));
  }
})()"""


@lru_cache(maxsize=1)
def _library() -> str:
    """The script of Bokeh's core, a little over a megabyte."""
    from bokeh import __version__
    from bokeh.resources import Resources

    code = "\n".join(Resources(mode="inline", components=["bokeh"]).js_raw)
    return _LOAD % {"version": json.dumps(__version__), "code": _quoted(code)}


def _quoted(value) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(value).replace("</", "<\\/")


def as_bokeh(drawn):
    """The bokeh model of a holoviews or hvplot object."""
    import holoviews

    return holoviews.render(drawn, backend="bokeh")


def script_of(drawn, place: str) -> str:
    """The JavaScript that draws a holoviews object in the element whose id is `place`."""
    from bokeh.embed import json_item

    item = json_item(as_bokeh(drawn), target=uuid4().hex)
    return _DRAW % {"item": _quoted(item), "place": json.dumps(place)}


def html_of(drawn) -> tuple[dict, dict]:
    """What a notebook shows for a holoviews object at the end of a cell, as (data, metadata)."""
    place = uuid4().hex
    return {
        "text/html": f'<div id="{place}"></div><script>{script_of(drawn, place)}</script>',
        "text/plain": "<live picture>",
    }, {}


_loaded_by: list[str | None] = []  # the cells that put the script on the page


def load() -> None:
    """Put Bokeh's script on the page, once a kernel, and again when the cell that did so is run again."""
    from IPython import get_ipython
    from IPython.display import display

    if (shell := get_ipython()) is None:
        return
    cell = getattr(shell, "get_parent", dict)().get("metadata", {}).get("cellId")
    if not _loaded_by or (cell is not None and cell in _loaded_by):
        display({script_type: _library(), "text/plain": ""}, raw=True)
        _loaded_by.append(cell)


def register() -> None:
    """Have IPython show every holoviews object through `html_of`, which asks nothing of the network."""
    import holoviews
    from IPython import get_ipython

    if shell := get_ipython():
        shell.display_formatter.mimebundle_formatter.for_type(holoviews.core.Dimensioned, html_of)
