"""A reader in JupyterLab: the door and a notebook of each kind (MEMLENS_BROWSER=all: every one), run to the end, one slider moved."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHOTS = ROOT / "build" / "screenshots"
BOOKS = ROOT / "notebooks"
EVERY = sorted(str(path.relative_to(BOOKS).with_suffix("")) for path in BOOKS.glob("**/[!.]*.ipynb"))
SOME = {
    "00-start-here", "attention/flashattention", "memory/based", "kv/h2o", "kv/quantised", "kv/what-is-remembered", "kv/frontier",
    "optim/galore", "routing/moe_lrc",
}  # fmt: skip
NAMES = [name for name in EVERY if name in SOME or os.environ.get("MEMLENS_BROWSER") == "all"]
pytestmark = pytest.mark.browser


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_and_its_slider_moves_the_picture(reader, name):
    reader.open(f"notebooks/{name}.ipynb")
    reader.run_all()
    views = reader.views()
    assert views, f"{name} has no live view"
    waited = reader.move(views[0])
    print(f"{name}: slider to picture {waited:.2f} s")
    reader.whole(SHOTS / f"{name.replace('/', '-')}.png")
    reader.no_trouble()
