"""What a figure shows, as plain values: one `Panel` per plot and a `Figure` around them, checked and kept as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from memlens import check

__all__ = ["KINDS", "FigureSpec", "Panel", "specify"]

KINDS = ("lines", "points", "bars", "heatmap")
LABELS = ("auto", "direct", "legend", "none")
LOG = ("", "x", "y", "xy")


@dataclass(frozen=True)
class Panel:
    """One plot of one Dataset. Names are those of its variables, dimensions and coordinates."""

    plot: str = "lines"  # lines | points | bars | heatmap
    x: str | None = None  # across: a dimension, coordinate or variable; default the dimension that nothing else uses
    y: str | list[str] | None = None  # the value, or several; heatmap: the dimension that runs down
    value: str | None = None  # heatmap: the variable that is coloured
    hue: str | None = None  # dimension told apart by colour, marker and dash
    style: str | None = None  # second dimension, told apart by marker and dash alone
    col: str | None = None  # dimension laid out as small multiples
    over: str | None = None  # dimension averaged away; its standard deviation becomes the error
    error: str | list[str] | None = None  # variable of half-widths, or [low, high] variables
    select: dict[str, Any] | None = None  # labels picked before drawing, {"method": "h2o"}
    log: str = ""  # "", "x", "y" or "xy"
    reference: list[dict] | None = None  # {"y": 1.0, "label": "full"}, {"x": 64}, {"y": [0.1, 0.2], "label": "band"}
    baseline: list[str] | None = None  # values of `hue` drawn in black and grey
    pareto: list[str] | None = None  # points: ["min", "max"] draws the frontier of small x and large y
    text: str | None = None  # points: coordinate or variable written beside each point
    annotate: bool = False  # bars, heatmap: write the numbers
    horizontal: bool = False  # bars: lie down, for long names
    stack: bool = False  # bars: pile the hues up
    markers: bool = True  # lines: mark the measured points
    labels: str = "auto"  # auto | direct | legend | none
    title: str | None = None
    xlabel: str | None = None
    ylabel: str | None = None
    clabel: str | None = None
    xlim: list[float] | None = None
    ylim: list[float] | None = None
    vmin: float | None = None
    vmax: float | None = None
    cmap: str | None = None


@dataclass(frozen=True)
class FigureSpec:
    """Panels side by side (or the small multiples of one), with the size in inches."""

    panels: list[Panel] = field(default_factory=list)
    title: str | None = None
    width: float = 6.5
    height: float | None = None  # default by the number of rows
    columns: int | None = None  # how many plots stand side by side
    sharex: bool = False  # panels; small multiples always share
    sharey: bool = False
    widths: list[float] | None = None  # of the panels, relative

    def to_json(self) -> str:
        """One line of JSON, defaults left out, keys sorted."""
        full = asdict(self)
        plain = {name: value for name, value in full.items() if name != "panels" and value != _DEFAULTS[FigureSpec][name]}
        plain["panels"] = [
            {name: value for name, value in panel.items() if value != _DEFAULTS[Panel][name]} for panel in full["panels"]
        ]
        return json.dumps(plain, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> FigureSpec:
        """The inverse of `to_json`, with the same checks as `specify`."""
        options = json.loads(text)
        return specify(None, **options)


_DEFAULTS = {kind: {each.name: each.default for each in fields(kind)} for kind in (Panel, FigureSpec)}


def specify(plot: str | None = None, *, panels: list[dict] | None = None, **options) -> FigureSpec:
    """The checked specification of `draw(data, plot, **options)`.

    Raises:
        ValueError: an unknown kind or value; TypeError: an unknown option, with the nearest one.
    """
    outer = {name: options.pop(name) for name in list(options) if name in _DEFAULTS[FigureSpec] and name != "panels"}
    if panels is None:
        if "title" in outer:
            options["title"] = outer.pop("title")
        panels = [{"plot": plot or "lines", **options}]
    elif plot not in (None, "panels"):
        check.fail("draw", f"plot={plot!r} together with panels", "one of the two", "put the kind into each panel")
    elif options:
        panels = [{**options, **panel} for panel in panels]
    if not panels:
        check.fail("draw", "panels=[]", "at least one panel")
    return FigureSpec(panels=[_panel(**panel) for panel in panels], **_plain(outer))


def _panel(**options) -> Panel:
    for name in options:
        if name not in _DEFAULTS[Panel]:
            fix = check.nearest(name, _DEFAULTS[Panel])
            check.fail("draw", f"unknown option {name!r}", "an option of memlens.viz.Panel", fix, error=TypeError)
    options = _plain(options)
    for name in ("reference", "baseline"):
        if options.get(name) is not None and not isinstance(options[name], list):
            options[name] = [options[name]]
    if isinstance(options.get("y"), list) and len(options["y"]) == 1:
        options["y"] = options["y"][0]
    panel = Panel(**options)
    check.one_of("draw", KINDS, plot=panel.plot)
    check.one_of("draw", LABELS, labels=panel.labels)
    check.one_of("draw", LOG, log=panel.log)
    for line in panel.reference or []:
        if len({"x", "y"} & set(line)) != 1 or set(line) - {"x", "y", "label"}:
            check.fail("draw", f"reference={line}", "{'y': 1.0, 'label': 'full'} or {'x': [lo, hi]}")
    return panel


def _plain(options: dict) -> dict:
    """The options as JSON would give them back: tuples become lists, numpy scalars numbers."""
    try:
        return json.loads(
            json.dumps(options, default=lambda value: value.tolist() if hasattr(value, "tolist") else _refuse(value))
        )
    except TypeError as error:
        check.fail("draw", str(error), "options that are text, numbers, lists or mappings", error=TypeError)


def _refuse(value):
    raise TypeError(f"an option of type {type(value).__name__}")
