"""From a labelled Dataset and a `Panel` to what any backend draws: charts of series, or grids, with their axis text."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import xarray as xr

from memlens import check
from memlens.viz.palette import Look, look
from memlens.viz.spec import Panel

__all__ = ["Axis", "Chart", "Grid", "Series", "as_dataset", "charts", "frontier", "label_of"]


class Axis(NamedTuple):
    label: str
    log: bool = False
    categories: tuple[str, ...] | None = None  # positions 0, 1, ... carry these names
    limits: tuple[float, float] | None = None


class Series(NamedTuple):
    label: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None
    text: tuple[str, ...] | None
    look: Look
    baseline: bool = False


class Grid(NamedTuple):
    values: np.ndarray  # (down, across)
    down: np.ndarray
    across: np.ndarray
    label: str


class Chart(NamedTuple):
    panel: Panel
    title: str | None
    x: Axis
    y: Axis
    series: tuple[Series, ...] = ()
    grid: Grid | None = None
    legend: str = ""  # what the hue means


def label_of(array: xr.DataArray) -> str:
    """`long_name (units)` from the attributes, else the name in words.

    >>> label_of(xr.DataArray(0, name="kl", attrs={"long_name": "divergence", "units": "nats"}))
    'divergence (nats)'
    """
    name = array.attrs.get("long_name") or str(array.name or "value").replace("_", " ")
    units = array.attrs.get("units", "")
    return f"{name} ({units})" if units not in ("", "1", None) else name


def as_dataset(data: xr.Dataset | xr.DataArray) -> xr.Dataset:
    """A Dataset as it is; a DataArray under its name (`value` without one)."""
    if isinstance(data, xr.DataArray):
        return data.to_dataset(name=data.name or "value")
    if not isinstance(data, xr.Dataset):
        check.fail("draw", f"data is {type(data).__name__}", "an xarray Dataset or DataArray", error=TypeError)
    return data


def charts(data: xr.Dataset, panel: Panel) -> list[Chart]:
    """One chart, or one for each value of `panel.col`, in order.

    Raises:
        ValueError: a name the data lack, a dimension left over, nothing finite to draw.
    """
    data = as_dataset(data)
    if panel.select:
        _known(data, *panel.select)
        data = data.sel(panel.select)
    if panel.col is None:
        return [_chart(data, panel)]
    _known(data, panel.col)
    names = [_named(data[panel.col], value) for value in data[panel.col].values]
    parts = [data.isel({panel.col: index}, drop=True) for index in range(data.sizes[panel.col])]
    inner = replace(panel, col=None, select=None)
    return [_chart(part, inner)._replace(title=name) for part, name in zip(parts, names)]


def _chart(data: xr.Dataset, panel: Panel) -> Chart:
    return _grid_chart(data, panel) if panel.plot == "heatmap" else _series_chart(data, panel)


def _known(data: xr.Dataset, *names: str | None) -> None:
    for name in names:
        if name is not None and name not in data.variables and name not in data.dims:
            options = [str(known) for known in (*data.variables, *data.dims)]
            check.fail(
                "draw", f"the data have no {name!r}", "a variable, coordinate or dimension", check.nearest(name, options)
            )


def _only_variable(data: xr.Dataset, *used) -> str:
    rest = [str(name) for name in data.data_vars if name not in used]
    if len(rest) != 1:
        check.fail("draw", f"variables {rest}", "one of them by name", "pass y= (or value= for a heatmap)")
    return rest[0]


def _grid_chart(data: xr.Dataset, panel: Panel) -> Chart:
    name = panel.value or _only_variable(data)
    _known(data, name, panel.x, panel.y if isinstance(panel.y, str) else None)
    array = data[name]
    if panel.over:
        array = array.mean(panel.over, keep_attrs=True)
    down = panel.y or next((str(dim) for dim in array.dims if dim != panel.x), None)
    across = panel.x or next((str(dim) for dim in array.dims if dim != down), None)
    if {down, across} != set(array.dims) or array.ndim != 2:
        check.fail(
            "draw", f"{name} has dims {array.dims}", f"({down}, {across})", "pick or average the others, or pass col="
        )
    array = array.transpose(down, across)
    _some_finite(name, array.values)
    grid = Grid(array.values.astype(float), array[down].values, array[across].values, panel.clabel or label_of(array))
    x = Axis(panel.xlabel or label_of(array[across]), categories=_categories(array[across]))
    y = Axis(panel.ylabel or label_of(array[down]), categories=_categories(array[down]))
    return Chart(panel, panel.title, x, y, grid=grid)


def _series_chart(data: xr.Dataset, panel: Panel) -> Chart:
    data, panel = _gather(data, panel)
    _known(data, panel.y, panel.x, panel.hue, panel.style, panel.text, panel.over, *_listed(panel.error))
    data, panel = _averaged(data, panel)
    panel = replace(panel, x=panel.x or _free_dim(data[panel.y], panel))
    across = data[panel.x]
    categories = _categories(across, force=panel.plot == "bars")
    series = tuple(_each_series(data, panel, categories))
    _some_finite(panel.y, *(one.y for one in series))
    x = Axis(panel.xlabel or label_of(across), "x" in panel.log, categories, _pair(panel.xlim))
    y = Axis(panel.ylabel or label_of(data[panel.y]), "y" in panel.log, None, _pair(panel.ylim))
    return Chart(panel, panel.title, x, y, series, legend=_meaning(data, panel.hue))


def _meaning(data: xr.Dataset, hue: str | None) -> str:
    """The legend's title: what the numbers are; words speak for themselves."""
    return label_of(data[hue]) if hue and data[hue].dtype.kind in "iuf" else ""


def _gather(data: xr.Dataset, panel: Panel) -> tuple[xr.Dataset, Panel]:
    """Several variables become one with a new dimension `variable`, told apart as hue (or as style beside a hue)."""
    used = (panel.x, panel.text, *_listed(panel.error))
    if not isinstance(panel.y, list):
        return data, replace(panel, y=panel.y or _only_variable(data, *used))
    _known(data, *panel.y)
    index = xr.DataArray(
        [_short(data[name]) for name in panel.y], dims="variable", name="variable", attrs={"long_name": ""}
    )
    joined = xr.concat([data[name] for name in panel.y], dim=index, coords="minimal", compat="override", join="outer")
    units = {data[name].attrs.get("units", "") for name in panel.y}
    joined.attrs = {"long_name": panel.ylabel or "value", "units": units.pop() if len(units) == 1 else ""}
    rest = data.drop_vars([name for name in panel.y if name != panel.x])
    where = {"style": "variable"} if panel.hue else {"hue": "variable"}
    return rest.assign(_value=joined), replace(panel, y="_value", **where)


def _short(array: xr.DataArray) -> str:
    return str(array.attrs.get("long_name") or str(array.name).replace("_", " "))


def _averaged(data: xr.Dataset, panel: Panel) -> tuple[xr.Dataset, Panel]:
    if panel.over is None:
        return data, panel
    spread = data[panel.y].std(panel.over)
    mean = data.mean(panel.over, keep_attrs=True)
    if panel.error is None:
        return mean.assign(_spread=spread), replace(panel, over=None, error="_spread")
    return mean, replace(panel, over=None)


def _free_dim(array: xr.DataArray, panel: Panel) -> str:
    free = [str(dim) for dim in array.dims if dim not in (panel.hue, panel.style)]
    if len(free) != 1:
        check.fail("draw", f"{array.name} has dims {array.dims}", "one left for x", "name x=, hue=, style=, col= or over=")
    return free[0]


def _each_series(data: xr.Dataset, panel: Panel, categories):
    hues = range(data.sizes[panel.hue]) if panel.hue else [None]
    styles = range(data.sizes[panel.style]) if panel.style else [None]
    colour = marked = 0
    for hue in hues:
        name = _named(data[panel.hue], data[panel.hue].values[hue], short=True) if panel.hue else ""
        base = bool(panel.hue) and _is_baseline(data[panel.hue].values[hue], name, panel)
        place, colour, marked = (marked, colour, marked + 1) if base else (colour, colour + 1, marked)
        for style in styles:
            at = {dim: index for dim, index in ((panel.hue, hue), (panel.style, style)) if index is not None}
            second = _named(data[panel.style], data[panel.style].values[style]) if panel.style else ""
            label = ", ".join(part for part in (name, second) if part)
            yield _series(data.isel(at), panel, categories, label, look(place, style, baseline=base), base)


def _is_baseline(value, name: str, panel: Panel) -> bool:
    return value in (panel.baseline or []) or name in (panel.baseline or [])


def _series(part: xr.Dataset, panel: Panel, categories, label: str, looks: Look, base: bool) -> Series:
    y, x = xr.broadcast(part[panel.y], part[panel.x])
    if y.ndim > 1 and panel.plot != "points":
        check.fail(
            "draw", f"{panel.y} has dims {part[panel.y].dims} left", "one along x", "name hue=, style=, col= or over="
        )
    names = _texts(x) if categories else None
    across = np.array([categories.index(name) for name in names], float) if categories else x.values.astype(float).ravel()
    flat = y.values.astype(float).ravel()
    low, high = _bounds(part, panel, y)
    text = tuple(_texts(part[panel.text].broadcast_like(y))) if panel.text else None
    keep = np.isfinite(flat) & np.isfinite(across)
    for axis, values in (("x", across), ("y", flat)):
        if axis in panel.log:
            keep &= values > 0  # what a logarithm cannot show
    if low is not None and "y" in panel.log:
        low = np.maximum(low, flat / 10)  # an error larger than the value reaches down by a decade
    pick = lambda values: None if values is None else values[keep]  # noqa: E731
    return Series(
        label, across[keep], flat[keep], pick(low), pick(high), text and tuple(np.array(text)[keep]), looks, base
    )  # fmt: skip


def _bounds(part: xr.Dataset, panel: Panel, y: xr.DataArray):
    if panel.error is None:
        return None, None
    if isinstance(panel.error, str):
        half = part[panel.error].broadcast_like(y).transpose(*y.dims).values.astype(float).ravel()
        flat = y.values.astype(float).ravel()
        return flat - half, flat + half
    return tuple(part[name].broadcast_like(y).transpose(*y.dims).values.astype(float).ravel() for name in panel.error)


def _categories(array: xr.DataArray, *, force: bool = False) -> tuple[str, ...] | None:
    if not force and array.dtype.kind in "iuf":
        return None
    return tuple(dict.fromkeys(_texts(array)))


def _texts(array: xr.DataArray) -> list[str]:
    return [_plain(value) for value in np.ravel(array.values)]


def _plain(value) -> str:
    """A coordinate value as text: 3 for 3.0, 1e-05 for tiny numbers, the word itself for words."""
    return f"{value:g}" if isinstance(value, (float, np.floating)) else str(value)


def _named(array: xr.DataArray, value, *, short: bool = False) -> str:
    """How a series or a small multiple is called: words as they are, numbers after their name."""
    if array.dtype.kind not in "iuf" or short:
        return _plain(value)
    return f"{array.attrs.get('long_name') or str(array.name).replace('_', ' ')} {_plain(value)}"


def _listed(value) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _pair(limits) -> tuple[float, float] | None:
    return tuple(limits) if limits else None


def _some_finite(name: str, *arrays: np.ndarray) -> None:
    if not any(np.isfinite(array).any() for array in arrays if array.size):
        check.fail(
            "draw",
            f"{name} has no finite number",
            "something to draw",
            "look at what produced it (or at a zero on a log axis)",
        )


def frontier(x: np.ndarray, y: np.ndarray, senses: list[str]) -> np.ndarray:
    """Indices of the points that no other point beats, sorted by x. `senses` is `["min" | "max"] * 2`.

    >>> frontier(np.array([1.0, 2, 3]), np.array([5.0, 9, 7]), ["min", "max"]).tolist()
    [0, 1]
    """
    sign = [1 if sense == "min" else -1 for sense in senses]
    order = np.lexsort((sign[1] * y, sign[0] * x))
    best, kept = np.inf, []
    for index in order:
        if sign[1] * y[index] < best:
            best = sign[1] * y[index]
            kept.append(index)
    return np.array(sorted(kept, key=lambda index: x[index]), int)
