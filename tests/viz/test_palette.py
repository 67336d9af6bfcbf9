"""Colours that all eyes tell apart, and marks that do when there is no colour."""

from itertools import combinations

import numpy as np
from matplotlib.colors import to_rgb

from memlens.viz.palette import BASELINE, COLOURS, MAP, look

# Viénot, Brettel and Mollon (1999): what a protanope and a deuteranope see, in linear RGB.
SEEN = {
    "protan": [[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]],
    "deutan": [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> np.ndarray:
    part = np.array(to_rgb(colour))
    return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    x, y, z = np.cbrt(np.maximum(XYZ @ rgb / (XYZ @ np.ones(3)), 1e-6))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_the_first_six_colours_differ_to_every_eye():
    for matrix in [np.eye(3), *map(np.array, SEEN.values())]:
        seen = [lab(np.clip(matrix @ linear(colour), 0, 1)) for colour in COLOURS[:6]]
        assert min(np.linalg.norm(one - other) for one, other in combinations(seen, 2)) > 11


def test_every_colour_stands_out_from_white():
    for colour in (*COLOURS, *BASELINE):
        assert lab(linear(colour))[0] < 75


def test_without_colour_the_first_six_series_still_differ():
    marks = [(look(i).marker, look(i).dash) for i in range(6)]
    assert len({marker for marker, _ in marks}) == len({dash for _, dash in marks}) == 6


def test_series_are_told_apart_well_beyond_the_palette():
    assert len({look(i)[:2] for i in range(56)}) == 56


def test_the_map_rises_evenly_in_lightness():
    from matplotlib import colormaps

    lightness = [lab(linear(colour))[0] for colour in colormaps[MAP](np.linspace(0, 1, 32))]
    assert (np.diff(lightness) > 0).all()
