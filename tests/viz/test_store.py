"""Stored figures: what comes back, when they are rewritten, and that no fault leaves half of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from memlens import viz
from memlens.viz import store
from memlens.viz.redraw import inches, redraw, stored_names

OPTIONS = {"y": "loss", "hue": "method", "log": "x"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def stored(figures, data):
    viz.save_figure("demo", data, "lines", **OPTIONS)
    return figures


def test_it_writes_data_plot_and_pictures(stored, data):
    assert set(contents(stored)) == {"demo.nc", "demo.svg", "demo.png"}
    back, spec = viz.read_figure(stored / "demo.nc")
    xr.testing.assert_equal(back, data)
    assert back.loss.attrs == {"long_name": "divergence", "units": "nats"}
    assert spec.panels == [viz.Panel(plot="lines", **OPTIONS)]


def test_it_holds_no_place_time_or_machine(stored):
    raw = xr.open_dataset(stored / "demo.nc", engine="h5netcdf")
    assert set(raw.attrs) == {"memlens_plot", "memlens_made_with"}
    assert (
        {"memlens", "numpy", "xarray", "matplotlib"}
        <= set(json.loads(raw.attrs["memlens_made_with"]))
        <= set(store.VERSIONED)
    )
    text = (stored / "demo.svg").read_text()
    assert "dc:date" not in text
    assert str(stored) not in text


def test_the_picture_is_small_and_its_text_constant(stored, data):
    picture = viz.save_figure("demo", data, "lines", **OPTIONS)
    shown, _ = picture._repr_mimebundle_()
    assert picture.png == (stored / "demo.png").read_bytes()
    assert len(picture.png) < 60_000
    assert shown["text/plain"] == "<figure demo>"


@pytest.mark.parametrize("change", [1.0, 1.015])
def test_a_rerun_within_rounding_changes_no_byte(stored, data, change):
    before = contents(stored)
    data = data.assign(loss=(data.loss * change).assign_attrs(data.loss.attrs))
    viz.save_figure("demo", data, "lines", **OPTIONS)
    assert contents(stored) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda data, options: (data.assign(loss=(data.loss * 1.05).assign_attrs(data.loss.attrs)), options),
        lambda data, options: (data, {**options, "log": "xy"}),
        lambda data, options: (data.isel(budget=slice(3)), options),
        lambda data, options: (data.assign_coords(method=["h2o", "random", "none"]), options),
        lambda data, options: (data.assign(loss=data.loss.assign_attrs(units="bits")), options),
        lambda data, options: (data, {**options, "refresh": True, "rtol": 0.5}),
    ],
    ids=["numbers", "options", "shape", "words", "units", "refresh"],
)
def test_a_visible_change_is_written(stored, data, change):
    (stored / "demo.svg").write_text("old")
    data, options = change(data, OPTIONS)
    viz.save_figure("demo", data, "lines", **options)
    assert (stored / "demo.svg").read_text() != "old"


def test_timings_stay_until_asked(stored, data, monkeypatch):
    before = contents(stored)
    slow = data.assign(loss=(data.loss * 3).assign_attrs(data.loss.attrs))
    viz.save_figure("demo", slow, "lines", rtol=None, **OPTIONS)
    assert contents(stored) == before
    monkeypatch.setenv("MEMLENS_REFRESH", "1")
    viz.save_figure("demo", slow, "lines", rtol=None, **OPTIONS)
    assert contents(stored) != before


def test_a_small_change_shows_on_a_log_axis():
    old, new = (xr.Dataset({"error": ("step", [1.0, tiny])}) for tiny in (1e-4, 2e-4))
    assert not store.changed(old, new, rtol=0.02)
    assert store.changed(old, new, rtol=0.02, log=True)
    gap = xr.Dataset({"error": ("step", [1.0, np.nan])})
    assert store.changed(old, gap, rtol=0.02)
    assert not store.changed(gap, gap, rtol=0.02)


def test_a_missing_picture_is_drawn_from_the_stored_data(stored, data):
    before = contents(stored)
    (stored / "demo.svg").unlink()
    viz.save_figure("demo", data.assign(loss=(data.loss * 1.01).assign_attrs(data.loss.attrs)), "lines", **OPTIONS)
    assert contents(stored) == before


@pytest.mark.parametrize("ending", ["svg", "png"])
@pytest.mark.parametrize("kept", [0, 100])
def test_a_picture_that_was_cut_short_is_drawn_again(stored, data, ending, kept):
    before, path = contents(stored), stored / f"demo.{ending}"
    path.write_bytes(path.read_bytes()[:kept])
    viz.save_figure("demo", data, "lines", **OPTIONS)
    assert contents(stored) == before


@pytest.mark.parametrize("options", [{}, {"style": "neurips", "format": "pdf", "width": "3.25in"}, {"style": "poster"}])
def test_redrawing_twice_gives_the_same_bytes(stored, tmp_path, options):
    first, second = (redraw(["demo"], out=tmp_path / name, **options) for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_redrawing_in_the_house_style_gives_the_stored_figure(stored):
    before = contents(stored)
    assert redraw() == [stored / "demo.svg", stored / "demo.png"]
    assert contents(stored) == before


def test_svg_and_pdf_hold_real_text(stored, tmp_path):
    assert ">divergence (nats)</text>" in (stored / "demo.svg").read_text()
    (pdf,) = redraw(["demo"], format="pdf", out=tmp_path)
    raw = pdf.read_bytes()
    assert b"/FontFile2" in raw  # TrueType, which editors can edit; Type 3 would be outlines
    assert b"/Type3" not in raw
    assert b"CreationDate" not in raw


def test_a_width_is_what_the_picture_has(stored, tmp_path):
    (svg,) = redraw(["demo"], style="neurips", format="svg", width="3.25in", out=tmp_path)
    assert 'width="234pt"' in svg.read_text()
    assert inches("25.4mm") == pytest.approx(1.0)
    for bad in ("wide", "0.2in", "3 feet"):
        with pytest.raises(ValueError, match="3.25in"):
            inches(bad)


def test_an_unknown_name_or_style_suggests_the_nearest(stored):
    assert stored_names() == ["demo"]
    with pytest.raises(KeyError, match="did you mean 'demo'"):
        redraw(["dema"])
    with pytest.raises(ValueError, match="did you mean 'neurips'"):
        redraw(["demo"], style="neurips24")
    with pytest.raises(ValueError, match="'pdf', 'svg', 'png'"):
        redraw(["demo"], format="gif")


def test_drawing_and_redrawing_never_import_torch(stored, tmp_path):
    script = (
        "import sys; from memlens import viz; from memlens.viz.redraw import redraw\n"
        f"redraw(['demo'], style='slides', format='pdf', out={str(tmp_path)!r})\n"
        "viz.save_figure('demo', viz.read_figure(viz.store.figures_folder() / 'demo.nc')[0], 'lines', **"
        f"{OPTIONS!r})\n"
        "heavy = ('torch', 'triton', 'transformers', 'holoviews', 'matplotlib.pyplot')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize("junk", [b"", b"not a figure", "truncated"])
def test_a_damaged_file_is_named_with_the_way_out(stored, data, junk):
    path = stored / "demo.nc"
    path.write_bytes(path.read_bytes()[:2000] if junk == "truncated" else junk)
    before = contents(stored)
    for call in (lambda: redraw(["demo"]), lambda: viz.save_figure("demo", data, "lines", **OPTIONS)):
        with pytest.raises(OSError, match=r"demo\.nc cannot be read.*delete it and rerun the notebook"):
            call()
    assert contents(stored) == before


def test_a_netcdf_that_is_no_figure_is_refused(stored, data):
    data.to_netcdf(stored / "other.nc", engine="h5netcdf")
    with pytest.raises(OSError, match=r"other\.nc cannot be read"):
        redraw(["other"])


@pytest.mark.parametrize("fails", ["write_bytes", "replace"])
def test_a_full_disk_leaves_the_old_data_and_no_rubbish(stored, data, monkeypatch, fails):
    before = contents(stored)["demo.nc"]
    real, calls = getattr(Path, fails), []

    def broken(self, *args):
        calls.append(self)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", str(self))
        return real(self, *args)

    monkeypatch.setattr(Path, fails, broken)
    with pytest.raises(OSError, match="No space left on device.*MEMLENS_FIGURES"):
        viz.save_figure("demo", data * 2, "bars", y="parts", x="method", hue="part")
    assert len(calls) >= 2
    assert set(contents(stored)) == {"demo.nc", "demo.svg", "demo.png"}
    assert contents(stored)["demo.nc"] == before
    monkeypatch.undo()
    os.environ["MEMLENS_FIGURES"] = str(stored)
    viz.save_figure("demo", data * 2, "bars", y="parts", x="method", hue="part")
    assert viz.read_figure(stored / "demo.nc")[1].panels[0].plot == "bars"


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path, data, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MEMLENS_FIGURES", str(tmp_path / "file" / "figures"))
    with pytest.raises(OSError, match="save_figure: cannot write.*MEMLENS_FIGURES"):
        viz.save_figure("demo", data, "lines", **OPTIONS)
    assert (tmp_path / "file").read_text() == "in the way"


def test_what_cannot_be_stored_is_refused_with_the_reason(figures, data):
    with pytest.raises(ValueError, match="name='Demo 1'"):
        viz.save_figure("Demo 1", data, "lines", **OPTIONS)
    with pytest.raises(ValueError, match="at most 4 MB"):
        viz.save_figure("big", xr.DataArray(np.zeros((900, 900)), dims=("query", "key")), "heatmap")
    stacked = data.loss.stack(pair=("method", "budget"))
    with pytest.raises(ValueError, match="stacked index"):
        viz.save_figure("stacked", stacked, "points")
    assert not figures.exists()


def test_the_folder_is_the_repository_s(monkeypatch, tmp_path):
    monkeypatch.delenv("MEMLENS_FIGURES", raising=False)
    monkeypatch.chdir(tmp_path)
    repository = Path(store.__file__).parents[3]
    assert store.figures_folder() == repository / "figures"
    (tmp_path / "toolkit" / "memlens").mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert store.figures_folder() == tmp_path / "figures"
