"""Draw stored figures again, in the house style or for a paper, slides or a poster, from their `.nc` alone (no torch)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from memlens import check
from memlens.viz.figure import STYLES, compose
from memlens.viz.store import figures_folder, picture_bytes, read_figure, write_pictures

__all__ = ["FORMATS", "inches", "redraw", "stored_names"]

FORMATS = ("pdf", "svg", "png")
_UNITS = {"in": 1.0, "": 1.0, "cm": 1 / 2.54, "mm": 1 / 25.4, "pt": 1 / 72.27}


def stored_names() -> list[str]:
    """The names of all stored figures."""
    return sorted(path.stem for path in figures_folder().glob("*.nc"))


def inches(width: str | float | None) -> float | None:
    """A width in inches from `3.25in`, `8.2cm`, `82mm`, `240pt` or a number.

    >>> inches("3.25in"), inches("82mm")
    (3.25, 3.2283)
    """
    if width is None:
        return None
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(in|cm|mm|pt|)\s*", str(width))
    size = round(float(match[1]) * _UNITS[match[2]], 4) if match else 0.0
    if not 1.0 <= size <= 60.0:
        check.fail("figures", f"width={width!r}", "1 to 60 inches, such as 3.25in, 82mm or 240pt")
    return size


def redraw(
    names: Iterable[str] = (), *, style: str | None = None, format: str | None = None, width: str | float | None = None,
    out: str | Path | None = None,
) -> list[Path]:  # fmt: skip
    """Draw figures again from their stored data and return the files, the same bytes each time.

    Args:
        names: stored figures; none for all.
        style: `memlens` (the default), `neurips`, `slides` or `poster`.
        format: `pdf`, `svg` or `png`; default SVG and PNG.
        width: `3.25in`, `82mm`, ...; default what the figure or the style says.
        out: folder; default `figures/` itself when nothing is changed, else `build/figures`.
    Raises:
        KeyError: a name that is not stored, with the nearest; ValueError: an unknown style or format, a bad width;
        OSError: a damaged `.nc`, a folder that cannot be written.
    """
    check.one_of("figures", STYLES, style=style or "memlens")
    check.one_of("figures", FORMATS, format=format or "svg")
    size = inches(width)
    known = stored_names()
    for name in (names := list(names) or known):
        if name not in known:
            fix = check.nearest(name, known) if known else f"{figures_folder().name}/ holds none; run the notebooks first"
            raise KeyError(f"figures: no stored figure {name!r}; {fix}")
    as_stored = style in (None, "memlens") and format in (None, "svg", "png") and size is None
    folder = Path(out) if out else figures_folder() if as_stored else Path("build") / "figures"
    formats = (format,) if format else ("svg", "png")
    written = []
    for name in names:
        figure = compose(*read_figure(figures_folder() / f"{name}.nc"), style=style, width=size)
        write_pictures(folder, {f"{name}.{ending}": raw for ending, raw in picture_bytes(figure, formats).items()})
        written += [folder / f"{name}.{ending}" for ending in formats]
    return written
