"""Live views without a browser: what the widgets are, what is drawn when they move, and what a stored run keeps."""

import json

import nbformat
import numpy as np
import pytest
import xarray as xr

from memlens import viz
from memlens.viz import notebook
from memlens.viz.interactive import to_holoviews
from memlens.viz.spec import specify

hv = pytest.importorskip("holoviews")
widgets = pytest.importorskip("ipywidgets")


@pytest.fixture(scope="module", autouse=True)
def _bokeh():
    viz.live()


def drawn(data, plot=None, **options):
    return hv.render(to_holoviews(data, specify(plot, **options)), backend="bokeh")


def columns(figure, kind: str) -> list[dict]:
    return [each.data_source.data for each in figure.renderers if type(each.glyph).__name__ == kind]


def test_lines_carry_the_data_and_the_axis_text(data):
    figure = drawn(data, "lines", y="loss", hue="method", log="x", error="sd", baseline="full")
    for source, values in zip(columns(figure, "Line"), data.loss.values, strict=True):
        np.testing.assert_array_equal(source["y0"], values)
    assert (figure.xaxis[0].axis_label, figure.yaxis[0].axis_label) == ("budget (tokens)", "divergence (nats)")
    assert type(figure.x_scale).__name__ == "LogScale"
    assert [item.label.value for item in figure.legend[0].items] == ["h2o", "random", "full"]
    assert [each.glyph.line_color for each in figure.renderers if type(each.glyph).__name__ == "Line"][-1] == "#000000"


def test_a_heatmap_has_the_first_query_at_the_top(data):
    figure = drawn(data, "heatmap", value="weight", x="key", y="query")
    (source,) = columns(figure, "Image")
    np.testing.assert_array_equal(source["image"][0], data.weight)
    assert figure.y_range.start > figure.y_range.end


@pytest.mark.parametrize("horizontal", [False, True])
@pytest.mark.parametrize("stack", [False, True])
def test_bars_are_as_long_as_their_numbers(data, horizontal, stack):
    figure = drawn(data, "bars", y="parts", x="method", hue="part", horizontal=horizontal, stack=stack)
    low, high = ("left", "right") if horizontal else ("bottom", "top")
    lengths = [source[high] - source[low] for source in columns(figure, "Quad")]
    np.testing.assert_allclose(lengths, data.parts.values.T)
    np.testing.assert_allclose(columns(figure, "Quad")[1][low], data.parts.values[:, 0] if stack else 0)


def test_every_kind_is_drawn_both_ways(data):
    panels = [
        {"plot": "points", "x": "held", "y": "loss", "hue": "method", "pareto": ["min", "min"], "error": "sd"},
        {"plot": "heatmap", "value": "maps", "col": "head", "x": "key", "y": "query"},
        {"plot": "lines", "y": "loss", "hue": "method", "reference": [{"y": 0.5, "label": "bound"}, {"x": [20, 30]}]},
    ]
    assert len(to_holoviews(data, specify(panels=panels))) == 4
    assert drawn(data, panels=panels)
    assert len(viz.draw(data, panels=panels).axes) == 5


def values(box) -> dict:
    return {child.description: child.value for child in box.children[0].children}


def test_the_picture_follows_the_slider(data):
    seen = []

    def view(size, method, on, share):
        seen.append((size, method, on, share))
        return viz.View(data.loss.sel({"method": method}) * size, "lines")

    box = viz.explore(view, size=(1, 5), method=["h2o", "random"], on=True, share=(0.0, 1.0, 0.25, 0.5))
    assert values(box) == {"size": 1, "method": "h2o", "on": True, "share": 0.5}
    screen = box.children[1].children[1]
    before = screen.outputs
    box.children[0].children[0].value = 3
    box.children[0].children[1].value = "random"
    assert seen == [(1, "h2o", True, 0.5), (3, "h2o", True, 0.5), (3, "random", True, 0.5)]
    assert screen.outputs != before


def test_moves_that_come_together_are_drawn_once():
    import asyncio

    calls = []

    async def drag():
        mover = notebook.Mover(lambda: calls.append(1))
        for _ in range(20):
            mover()
        await asyncio.sleep(5 * notebook.PAUSE)

    asyncio.run(drag())
    assert calls == [1]


def test_an_error_is_raised_at_first_and_shown_later(data):
    def view(size):
        if size > 1:
            raise ValueError("too large")
        return data.loss[0]

    box = viz.explore(view, size=(0, 3))
    box.children[0].children[0].value = 2
    picture, other = box.children[1].children
    assert other.outputs[0]["data"]["text/plain"] == "ValueError: too large\n"
    assert picture.layout.display == "none"
    box.children[0].children[0].value = 1
    assert picture.layout.display is None
    with pytest.raises(ValueError, match="too large"):
        viz.explore(view, size=(2, 3))


@pytest.mark.parametrize("bad", ["abc", 3, (1,), ("a", "b"), None])
def test_a_widget_of_another_form_is_refused(bad):
    with pytest.raises(TypeError, match="explore: size=.*ipywidgets widget"):
        notebook.widget_for("size", bad)


def test_anything_else_is_shown_as_it_is():
    box = viz.explore(lambda size: {"size": size}, size=(1, 2))
    assert box.children[1].children[1].outputs[0]["data"]["text/plain"] == "{'size': 1}"


def test_a_notebook_runs_without_a_browser_and_says_nothing_on_stderr(tmp_path):
    from nbclient import NotebookClient

    cells = [
        "import numpy as np, xarray as xr\nfrom memlens import viz",
        "viz.explore(lambda n: xr.DataArray(np.arange(n) ** 2.0, dims='i', name='square'), n=(3, 9))",
        "viz.explore(lambda n: xr.DataArray(np.arange(n) ** 2.0, dims='i', name='square').hvplot.line(), n=(3, 9))",
        "xr.DataArray(np.arange(4.0), dims='i', name='square').hvplot.line()",
        "viz.draw(xr.DataArray(np.arange(4.0), dims='i', name='square'))",
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(book, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in book.cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type in ("stream", "error")]
    assert "https://cdn.holoviz" not in json.dumps(outputs)
    assert len(book.cells[2].outputs) == 1  # the script is put on the page once
    assert set(book.cells[4].outputs[0].data) == {"image/png", "text/plain"}


def test_views_of_a_dataarray_need_no_options():
    assert isinstance(notebook.drawable(xr.DataArray(np.arange(3.0), dims="i", name="a")), hv.Overlay)
