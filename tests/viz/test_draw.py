"""What is drawn: data, axis text, scales, names of series. Pixels are nobody's business."""

from itertools import pairwise

import numpy as np
import pytest
import xarray as xr

from memlens import viz


def texts(figure) -> list[str]:
    return [child.get_text() for ax in figure.axes for child in ax.texts]


def legend_names(figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def inside(figure, artist) -> bool:
    """Whether an artist lies over the axes that hold data."""
    box = artist.get_window_extent()
    return any(box.overlaps(ax.get_window_extent().padded(-2)) for ax in figure.axes)


def test_lines_carry_the_data_and_their_labels(data):
    figure = viz.draw(data, "lines", y="loss", hue="method", log="x")
    ax = figure.axes[0]
    assert [line.get_label() for line in ax.lines] == ["h2o", "random", "full"]
    for line, values in zip(ax.lines, data.loss.values, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), values)
        np.testing.assert_array_equal(line.get_xdata(), data.budget)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("budget (tokens)", "divergence (nats)")
    assert ax.get_xscale() == "log"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["16", "32", "64", "128"]


@pytest.mark.parametrize("labels", ["auto", "direct", "legend"])
def test_every_series_is_named_once_and_no_name_covers_data(data, labels):
    figure = viz.draw(data, "lines", y="loss", hue="method", log="x", labels=labels)
    figure.draw_without_rendering()
    named = [text for ax in figure.axes for text in ax.texts] or figure.legends[0].get_texts()
    assert sorted(text.get_text() for text in named) == ["full", "h2o", "random"]
    assert not any(inside(figure, text) for text in named)
    if labels == "direct":
        boxes = [text.get_window_extent() for text in named]
        assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


def test_crowded_ends_fall_back_to_a_legend(data):
    close = (
        data.loss * 0 + 1 + 0.001 * xr.DataArray(np.arange(3), dims="method") + xr.DataArray([0, 1, 2, 3], dims="budget")
    )
    assert legend_names(viz.draw(close.rename("loss"), "lines", hue="method", x="budget", height=1.2)) == [
        "h2o",
        "random",
        "full",
    ]


def test_a_line_that_ends_early_is_named_in_the_legend(data):
    short = data.loss.where((data.method != "h2o") | (data.budget < 100))
    assert legend_names(viz.draw(short, "lines", hue="method")) == ["h2o", "random", "full"]


def test_series_differ_without_colour(data):
    lines = viz.draw(data, "lines", y="loss", hue="method").axes[0].lines
    assert len({(line.get_marker(), str(line.get_linestyle()), str(line._dash_pattern)) for line in lines}) == 3


def test_baselines_are_black_and_leave_the_first_colour_to_the_others(data):
    lines = viz.draw(data, "lines", y="loss", hue="method", baseline="full").axes[0].lines
    assert [line.get_color() for line in lines] == ["#0072B2", "#E69F00", "#000000"]


@pytest.mark.parametrize("error", ["sd", ["low", "high"]])
def test_error_bands(data, error):
    data = data.assign(low=data.loss - 0.02, high=data.loss + 0.03)
    band = viz.draw(data, "lines", y="loss", hue="method", error=error).axes[0].collections[0]
    heights = band.get_paths()[0].vertices[:, 1]
    wanted = (0.9 * 0.1, 1.1 * 0.8) if error == "sd" else (0.1 - 0.02, 0.8 + 0.03)
    np.testing.assert_allclose((heights.min(), heights.max()), wanted)


def test_seeds_are_averaged_with_their_spread(data):
    ax = viz.draw(data, "lines", y="runs", hue="method", over="seed").axes[0]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), data.loss[0])
    heights = ax.collections[0].get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose(heights.max(), 0.8 + data.runs.std("seed").values[0, 0])


def test_two_variables_are_two_series(data):
    data = data.assign(twice=(2 * data.loss).assign_attrs(long_name="twice", units="nats"))
    ax = viz.draw(data, "lines", y=["loss", "twice"], select={"method": "h2o"}).axes[0]
    assert [line.get_label() for line in ax.lines] == ["divergence", "twice"]
    np.testing.assert_allclose(ax.lines[1].get_ydata(), 2 * data.loss[0])
    styled = viz.draw(data, "lines", y=["loss", "twice"], hue="method").axes[0]
    assert [line.get_label() for line in styled.lines][:2] == ["h2o, divergence", "h2o, twice"]
    assert styled.lines[0].get_color() == styled.lines[1].get_color()


def test_lines_run_along_a_measured_x(data):
    ax = viz.draw(data, "lines", x="held", y="loss", hue="method").axes[0]
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), data.held[0])
    assert ax.get_xlabel() == "memory held (MiB)"


def test_points_and_their_frontier(data):
    ax = viz.draw(data, "points", x="held", y="loss", hue="method", pareto=["min", "min"]).axes[0]
    line = next(line for line in ax.lines if line.get_label() == "_frontier")
    x, y = data.held.values.ravel(), data.loss.values.ravel()
    beaten = [((x <= a) & (y <= b) & ((x < a) | (y < b))).any() for a, b in zip(x, y, strict=True)]
    assert set(zip(line.get_xdata(), line.get_ydata(), strict=True)) == {
        (a, b) for a, b, lost in zip(x, y, beaten, strict=True) if not lost
    }


def test_points_carry_names_that_do_not_cover_each_other(data):
    figure = viz.draw(data, "points", x="held", y="loss", hue="method", select={"budget": 16}, text="method")
    assert sorted(texts(figure)) == ["full", "h2o", "random"]
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert not any(one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[:place])


@pytest.mark.parametrize("horizontal", [False, True])
@pytest.mark.parametrize("stack", [False, True])
def test_bars(data, horizontal, stack):
    ax = viz.draw(data, "bars", y="parts", x="method", hue="part", horizontal=horizontal, stack=stack).axes[0]
    length = "get_width" if horizontal else "get_height"
    got = np.array([[getattr(bar, length)() for bar in group] for group in ax.containers])
    np.testing.assert_allclose(got, data.parts.values.T)
    bottoms = [getattr(bar, "get_x" if horizontal else "get_y")() for bar in ax.containers[1]]
    np.testing.assert_allclose(bottoms, data.parts.values[:, 0] if stack else 0)
    ticks = ax.get_yticklabels() if horizontal else ax.get_xticklabels()
    assert [tick.get_text() for tick in ticks] == ["h2o", "random", "full"]
    assert len({bar[0].get_hatch() for bar in ax.containers}) == 2


def test_a_heatmap_has_queries_running_down(data):
    ax, bar = viz.draw(data, "heatmap", value="weight", x="key", y="query").axes
    np.testing.assert_array_equal(ax.images[0].get_array(), data.weight)
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    assert (ax.get_xlabel(), ax.get_ylabel(), bar.get_ylabel()) == ("key", "query", "attention weight")
    assert ax.images[0].get_cmap().name == "cividis"


def test_small_multiples_share_their_colours_and_name_axes_once(data):
    first, second, _ = viz.draw(data, "heatmap", value="maps", x="key", y="query", col="head").axes
    assert first.images[0].get_clim() == second.images[0].get_clim() == (0.0, 2 * data.weight.values.max())
    assert [first.get_title("left"), second.get_title("left")] == ["head 3", "head 5"]
    assert (first.get_ylabel(), second.get_ylabel()) == ("query", "")


def test_panels_stand_in_one_figure(data):
    panels = [{"plot": "heatmap", "value": "weight"}, {"y": "loss", "hue": "method", "title": "cost"}]
    figure = viz.draw(data, panels=panels, title="both")
    assert figure.get_suptitle() == "both"
    assert len(figure.axes) == 3
    assert legend_names(figure) == ["h2o", "random", "full"]
    figure.draw_without_rendering()
    assert not inside(figure, figure.legends[0])
    assert not figure.legends[0].get_window_extent().overlaps(figure._suptitle.get_window_extent())


def test_panels_with_other_series_have_their_own_legends(data):
    panels = [{"y": "loss", "hue": "method", "title": "one"}, {"plot": "bars", "y": "parts", "x": "method", "hue": "part"}]
    figure = viz.draw(data, panels=panels)
    figure.draw_without_rendering()
    named = [[text.get_text() for text in ax.get_legend().get_texts()] for ax in figure.axes]
    assert named == [["h2o", "random", "full"], ["payload", "scales"]]
    for ax in figure.axes:
        assert ax.get_legend().get_window_extent().y0 >= ax.get_window_extent().y1 - 2
    assert figure.axes[0]._left_title.get_window_extent().y0 >= figure.axes[0].get_legend().get_window_extent().y1 - 2


def test_four_small_multiples_stand_two_by_two(data):
    figure = viz.draw(
        data.expand_dims(layer=4), "lines", y="loss", hue="method", col="layer", reference={"y": 0.5, "label": "b"}
    )
    figure.draw_without_rendering()
    corners = [ax.get_window_extent().p0 for ax in figure.axes]
    assert (corners[0][1], corners[0][0]) == pytest.approx((corners[1][1], corners[2][0]))
    assert [len(ax.texts) for ax in figure.axes] == [0, 1, 0, 0]  # the reference is named at the right edge, once


@pytest.mark.parametrize("plot", ["bars", "heatmap"])
def test_tick_labels_never_touch(plot):
    names = [f"a rather long name {place}" for place in range(9)]
    table = xr.DataArray(np.eye(9), dims=("row", "name"), coords={"name": names}, name="value")
    options = {"x": "name", "y": "row"} if plot == "heatmap" else {"x": "name", "select": {"row": 0}}
    figure = viz.draw(table, plot, **options)
    figure.draw_without_rendering()
    ticks = figure.axes[0].get_xticklabels()
    assert [tick.get_text() for tick in ticks] == names
    assert ticks[0].get_rotation() in (30, 90)
    assert figure.axes[0].get_window_extent().height > 100  # turned words make the figure taller, not the plot smaller
    numbers = viz.draw(table.assign_coords(row=2.0 ** np.arange(9, 18)), "lines", x="row", hue="name", log="x", width=2)
    boxes = [tick.get_window_extent() for tick in numbers.axes[0].get_xticklabels() if tick.get_text()]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_reference_lines_are_named_at_the_edge(data):
    marks = [{"y": 0.5, "label": "bound"}, {"x": [20, 30]}, {"x": 64, "label": "here"}]
    figure = viz.draw(data, "lines", y="loss", hue="method", labels="legend", reference=marks)
    assert sorted(texts(figure)) == ["bound", "here"]
    assert [line.get_ydata()[0] for line in figure.axes[0].lines if len(set(line.get_ydata())) == 1][-1] == 0.5


def test_on_given_axes_it_returns_artists_and_makes_no_figure(data):
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    lines = viz.draw(data, "lines", ax=ax, y="loss", hue="method")
    assert [line.axes for line in lines] == [ax] * 3


def test_long_labels_wrap_inside_the_figure(data):
    long = data.assign(
        loss=data.loss.assign_attrs(long_name="the divergence of what the short cache says from what the full one says")
    )
    figure = viz.draw(long, "lines", y="loss", hue="method", height=1.6)
    figure.draw_without_rendering()
    box = figure.axes[0].yaxis.label.get_window_extent()
    assert box.y0 >= 0
    assert box.y1 <= figure.bbox.y1


def test_a_log_axis_leaves_out_what_it_cannot_show(data):
    ax = viz.draw(data.assign(loss=data.loss - 0.05), "lines", y="loss", hue="method", log="y").axes[0]
    assert len(ax.lines[2].get_ydata()) == 0


def test_the_picture_is_small_and_says_nothing_else(data):
    import base64

    shown, _ = viz.draw(data, "heatmap", value="weight")._repr_mimebundle_()
    assert set(shown) == {"image/png", "text/plain"}
    assert len(base64.b64decode(shown["image/png"])) < 60_000


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"plot": "line"}, ValueError, "did you mean 'lines'"),
        ({"hues": "method"}, TypeError, "unknown option 'hues'.*did you mean 'hue'"),
        ({"y": "los", "hue": "method"}, ValueError, "no 'los'.*did you mean 'loss'"),
        ({"hue": "method"}, ValueError, "one of them by name"),
        ({"y": "runs", "hue": "method"}, ValueError, "over="),
        ({"y": "loss", "hue": "method", "log": "z"}, ValueError, "log='z'"),
        ({"y": "loss", "hue": "method", "reference": {"z": 1}}, ValueError, "reference="),
        ({"plot": "heatmap", "value": "maps"}, ValueError, "pick or average"),
        ({"panels": []}, ValueError, "at least one"),
        ({"y": "loss", "cmap": object}, TypeError, "text, numbers, lists"),
    ],
)
def test_bad_options_say_the_way_out(data, options, error, message):
    with pytest.raises(error, match=message):
        viz.draw(data, **options)


def test_nothing_to_draw_is_an_error(data):
    with pytest.raises(ValueError, match="no finite number"):
        viz.draw(data.assign(loss=data.loss * np.nan), "lines", y="loss", hue="method")
    with pytest.raises(TypeError, match="xarray"):
        viz.draw(np.zeros(3), "lines")
