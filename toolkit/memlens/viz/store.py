"""Stored figures: `<name>.nc` holds the data and the plot, `<name>.svg` and `<name>.png` are drawn from it.

A figure is rewritten only when its data changed, so that a run on another machine leaves the tree as it was.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib import rc_context

from memlens import check
from memlens.files import replace_files
from memlens.viz.figure import compose, small_png
from memlens.viz.spec import FigureSpec, specify
from memlens.viz.tidy import as_dataset

__all__ = ["Picture", "changed", "figures_folder", "picture_bytes", "read_figure", "save_figure", "write_pictures"]

LIMIT = 4_000_000  # bytes of data in one figure
VERSIONED = ("memlens", "torch", "numpy", "xarray", "matplotlib", "transformers")


class Picture:
    """What a cell shows for a stored figure: its PNG and one constant line of text."""

    def __init__(self, name: str, png: bytes):
        self.name, self.png = name, png

    def __repr__(self) -> str:
        return f"<figure {self.name}>"

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        return {"image/png": base64.b64encode(self.png).decode(), "text/plain": repr(self)}, {}


def figures_folder() -> Path:
    """Where stored figures lie: $MEMLENS_FIGURES, else `figures/` of the repository around the current directory, else of
    the one this package is installed from, else `figures/` here."""
    if chosen := os.environ.get("MEMLENS_FIGURES"):
        return Path(chosen)
    for start in (Path.cwd(), Path(__file__).resolve().parent):
        for folder in (start, *start.parents):
            if (folder / "toolkit" / "memlens").is_dir() and (folder / "pyproject.toml").is_file():
                return folder / "figures"
    return Path.cwd() / "figures"


def save_figure(
    name: str, data, plot: str | None = None, *, rtol: float | None = 0.02, refresh: bool = False, **options
) -> Picture:
    """Store a figure (data, plot, SVG, PNG) if it changed, and return the picture that is stored.

    Args:
        name: file name without an ending: lower case letters, digits, `-` and `_`.
        data: xarray Dataset or DataArray, at most 4 MB.
        plot, options: as in `memlens.viz.draw`.
        rtol: stored data within this relative distance stay. None, for timings: data stay whatever they are, unless
            names, shapes or options changed.
        refresh: rewrite in any case, as $MEMLENS_REFRESH=1 does for all.
    Raises:
        ValueError: a bad name or option, too much data; OSError: the folder cannot be written, or the stored data cannot
            be read. The stored figure is then as it was.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        check.fail("save_figure", f"name={name!r}", "lower case letters, digits, '-' and '_'")
    spec = specify(plot, **options)
    data = _storable(name, as_dataset(data))
    folder = figures_folder()
    stored = folder / f"{name}.nc"
    refresh = refresh or os.environ.get("MEMLENS_REFRESH") == "1"
    if not refresh and stored.exists():
        old, old_spec = read_figure(stored)
        if old_spec == spec and not changed(old, data, rtol, _logs(spec)):
            data = old
            if all(_drawn(folder / f"{name}.{ending}") for ending in ("svg", "png")):
                return Picture(name, (folder / f"{name}.png").read_bytes())
    raw = _netcdf(data, spec)
    pictures = picture_bytes(compose(_parse(raw)[0], spec))  # from the bytes that are stored, as redrawing will
    write_pictures(folder, {f"{name}.svg": pictures["svg"], f"{name}.png": pictures["png"], f"{name}.nc": raw})
    return Picture(name, pictures["png"])


def picture_bytes(figure, formats: tuple[str, ...] = ("svg", "png")) -> dict[str, bytes]:
    """The drawn figure in each format, with no date, path or random id in it."""
    made = {}
    for ending in formats:
        if ending == "png":
            made[ending] = small_png(figure)
            continue
        empty = {"svg": ("Date", "Creator"), "pdf": ("CreationDate", "Creator", "Producer")}[ending]
        raw = io.BytesIO()
        with rc_context(figure.params):
            figure.savefig(raw, format=ending, metadata=dict.fromkeys(empty))
        made[ending] = raw.getvalue()
    return made


def write_pictures(folder: Path, contents: dict[str, bytes]) -> None:
    """`replace_files` into a folder of figures.

    Raises:
        OSError: naming the file and the way out; every old file is whole, and the last one is the last to change.
    """
    try:
        replace_files(folder, contents)
    except OSError as error:
        raise type(error)(
            f"save_figure: cannot write {error.filename or folder} ({error.strerror or error}); expected a folder "
            "that can be written, with room left; set MEMLENS_FIGURES to one. The stored data are as they were"
        ) from error


def _drawn(path: Path) -> bool:
    """Whether a picture is there and not cut short."""
    ends = {".svg": b"</svg>", ".png": b"IEND\xaeB`\x82"}
    return path.exists() and path.read_bytes().rstrip(b"\n").endswith(ends[path.suffix])


def read_figure(path: Path) -> tuple[xr.Dataset, FigureSpec]:
    """The data and the specification of a stored figure.

    Raises:
        OSError: the file is missing, damaged or not a memlens figure; the message names it and the way out.
    """
    path = Path(path)
    try:
        return _parse(path.read_bytes())
    except Exception as error:  # h5py, xarray and json each have their own for a damaged file
        raise OSError(
            f"figures: {path.name} cannot be read ({type(error).__name__}: {error}); expected a figure that memlens "
            "stored; delete it and rerun the notebook that draws it"
        ) from error


def _parse(raw: bytes) -> tuple[xr.Dataset, FigureSpec]:
    data = xr.load_dataset(io.BytesIO(raw), engine="h5netcdf")
    spec = FigureSpec.from_json(data.attrs.pop("memlens_plot"))
    data.attrs.pop("memlens_made_with", None)
    return data, spec


def _netcdf(data: xr.Dataset, spec: FigureSpec) -> bytes:
    marked = data.assign_attrs(memlens_plot=spec.to_json(), memlens_made_with=json.dumps(_versions(), sort_keys=True))
    packed = {name: {"zlib": True, "complevel": 5} for name, array in data.data_vars.items() if array.nbytes > 4096}
    return bytes(marked.to_netcdf(engine="h5netcdf", encoding=packed))


def _versions() -> dict[str, str]:
    found = {}
    for package in VERSIONED:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package).partition("+")[0]
    return found


def _storable(name: str, data: xr.Dataset) -> xr.Dataset:
    """The data with plain attributes, words as text and nothing remembered of where they came from."""
    if data.nbytes > LIMIT:
        size = f"the data hold {data.nbytes / 1e6:.1f} MB"
        check.fail(
            "save_figure", size, f"at most {LIMIT / 1e6:.0f} MB in figures/{name}.nc", "keep only what the figure shows"
        )
    for each in list(data.indexes):
        if data.indexes[each].nlevels > 1:
            check.fail(
                "save_figure", f"{each!r} is a stacked index", "plain dimensions", f"unstack it or reset_index({each!r})"
            )
    plain = data.drop_encoding().copy()
    plain.attrs = {}
    for array in plain.variables.values():
        array.attrs = {key: array.attrs[key] for key in ("long_name", "units") if key in array.attrs}
    words = [key for key, array in plain.variables.items() if array.dtype.kind not in "iufb"]
    return plain.assign_coords({key: plain[key].astype(str) for key in words if key in plain.coords}).assign(
        {key: plain[key].astype(str) for key in words if key in plain.data_vars}
    )


def changed(old: xr.Dataset, new: xr.Dataset, rtol: float | None, log: bool = False) -> bool:
    """Whether `new` shows something else than `old`.

    Numbers differ when they are apart by more than `rtol` of themselves and, unless an axis is logarithmic, by more than
    a tenth of `rtol` of the largest: what no eye sees is no change. Names, shapes, words and attributes must be equal.
    With `rtol=None` numbers of data variables are not compared.
    """
    if set(old.variables) != set(new.variables) or dict(old.sizes) != dict(new.sizes):
        return True
    for name, array in new.variables.items():
        was = old.variables[name]
        if array.dims != was.dims or array.attrs != was.attrs:
            return True
        if array.dtype.kind not in "iuf" or was.dtype.kind not in "iuf":
            if not np.array_equal(array.values.astype(str), was.values.astype(str)):
                return True
        elif (name in new.coords or rtol is not None) and _numbers_differ(was.values, array.values, rtol or 0.0, log):
            return True
    return False


def _numbers_differ(old: np.ndarray, new: np.ndarray, rtol: float, log: bool) -> bool:
    finite = np.abs(old[np.isfinite(old)])
    unseen = 0.0 if log or not finite.size else 0.1 * rtol * finite.max()
    return not np.allclose(new, old, rtol=rtol, atol=unseen, equal_nan=True)


def _logs(spec: FigureSpec) -> bool:
    return any(panel.log for panel in spec.panels)
