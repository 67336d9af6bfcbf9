"""A reader's first hour: the door and a notebook of each family in JupyterLab, run to the end, one slider moved."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHOTS = ROOT / "build" / "screenshots"
NAMES = (
    "00-start-here", "attention/flashattention", "memory/based", "kv/h2o", "kv/snapkv", "optim/galore", "routing/moe_lrc",
)  # fmt: skip
HERE = [name for name in NAMES if (ROOT / "notebooks" / f"{name}.ipynb").exists()]
pytestmark = pytest.mark.browser


@pytest.mark.parametrize("name", HERE)
def test_a_notebook_runs_and_its_slider_moves_the_picture(reader, name):
    reader.open(f"notebooks/{name}.ipynb")
    reader.run_all()
    views = reader.views()
    assert views, f"{name} has no live view"
    waited = reader.move(views[0])
    print(f"{name}: slider to picture {waited:.2f} s")
    reader.whole(SHOTS / f"{name.replace('/', '-')}.png")
    reader.no_trouble()
