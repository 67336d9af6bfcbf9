"""Every kind of live view, in a real page without a network: drawn, redrawn by its slider, and an error shown as one."""

from pathlib import Path

import nbformat
import pytest

SHOTS = Path(__file__).resolve().parents[2] / "build" / "screenshots"
pytestmark = pytest.mark.browser

DATA = """
import numpy as np, xarray as xr
from memlens import viz

def scores(seed):
    draw = np.random.default_rng(seed)
    weight = np.tril(draw.random((24, 24))) ** 4
    coords = {"method": ["full", "H2O", "SnapKV"], "budget": [8, 16, 32, 64, 128], "part": ["payload", "scales"]}
    kept = np.sort(draw.random((3, 5)), 1)
    return xr.Dataset({
        "weight": (("query", "key"), weight / weight.sum(1, keepdims=True), {"long_name": "attention weight"}),
        "mass": (("method", "budget"), kept, {"long_name": "attention mass kept", "units": "share"}),
        "sd": (("method", "budget"), 0.1 * kept),
        "bytes": (("method", "part"), draw.random((3, 2)), {"long_name": "memory held", "units": "MiB"}),
    }, coords)
"""
VIEWS = {
    "lines": 'dict(y="mass", hue="method", log="x", error="sd", baseline="full", reference={"y": 0.5, "label": "half"})',
    "points": 'dict(y="mass", x="budget", hue="method", pareto=["min", "max"])',
    "bars": 'dict(y="bytes", x="method", hue="part", stack=True, horizontal=True)',
    "heatmap": 'dict(value="weight", x="key", y="query")',
    "panels": 'dict(panels=[dict(plot="heatmap", value="weight", title="a head"), dict(y="mass", hue="method", log="x")])',
}


def notebook(*cells: str):
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in cells])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return book


def test_every_kind_is_drawn_and_redrawn(reader):
    cells = [
        f"def view(seed, size):\n    return viz.View(scores(seed), {None if kind == 'panels' else kind!r}, {options})\n"
        "viz.explore(view, seed=(0, 9), size=[1, 2])"
        for kind, options in VIEWS.items()
    ]
    hv = "viz.explore(lambda n: scores(n).mass.hvplot.line(x='budget', by='method'), n=(1, 9))"
    nbformat.write(notebook(DATA, *cells, hv), reader.folder / "live.ipynb")
    reader.open("live.ipynb")
    reader.run_all()
    views = reader.views()
    assert len(views) == len(VIEWS) + 1
    waits = {kind: reader.move(view) for kind, view in zip([*VIEWS, "hvplot"], views, strict=True)}
    print({kind: f"{wait:.2f} s" for kind, wait in waits.items()})
    reader.whole(SHOTS / "live-views.png")
    reader.no_trouble()
