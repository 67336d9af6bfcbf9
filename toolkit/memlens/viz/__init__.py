"""Pictures of labelled data: `draw` one, `save_figure` into `figures/`, `explore` it with sliders.

    viz.draw(data, "lines", x="budget", y="kl", hue="method", log="x")      a matplotlib figure, no file
    viz.save_figure("h2o-budget", data, "lines", hue="method")              figures/h2o-budget.{nc,svg,png}, a small picture
    viz.explore(fn, budget=(8, 128, 8), layer=[0, 1, 2])                    sliders; fn returns viz.View(data, "lines", ...)

Axis text comes from `long_name` and `units`. `Panel` lists every option of a plot, `FigureSpec` those of a figure.
`memlens.viz.redraw` draws stored figures again for a paper. Nothing here imports torch; holoviews loads for a live view.
"""

from memlens.lazy import attach

_HOME = {
    "draw": "figure", "Drawing": "figure", "STYLES": "figure", "Panel": "spec", "FigureSpec": "spec",
    "save_figure": "store", "Picture": "store", "read_figure": "store", "View": "notebook", "live": "notebook",
    "explore": "notebook", "label_of": "tidy", "frontier": "tidy",
}  # fmt: skip
__all__, __getattr__, __dir__ = attach(__name__, _HOME)
