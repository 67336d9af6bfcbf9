"""The look of each series: a colour that is safe for all eyes, with its own marker, dash and hatch so that grey suffices.

Colours are Okabe and Ito's (2008), without the yellow that vanishes on white, in an order in which neighbours
differ in lightness.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["BASELINE", "COLOURS", "DASHES", "HATCHES", "MAP", "MARKERS", "MOST_MARKS", "SWELL", "Look", "darker", "look"]

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#6A3D00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ((), (6, 2), (2, 1.5), (7, 2, 1.5, 2), (9, 3), (4, 1.5, 1, 1.5, 1, 1.5))  # points on, points off
HATCHES = ("", "////", "xxx", "\\\\\\\\", "---", "++", "|||")  # lines only: dots make an SVG heavy
MAP = "cividis"  # sequential, the same to all eyes, even in grey
SWELL = {"^": 1.25, "v": 1.25, "P": 1.2, "X": 1.2, "*": 1.6}  # markers that look smaller than they are
MOST_MARKS = 40  # points on a line that are still marked one by one
BASELINE = ("#000000", "#7F7F7F", "#4D4D4D")


class Look(NamedTuple):
    colour: str
    marker: str
    dash: tuple[float, ...]
    hatch: str


def look(index: int, style: int | None = None, *, baseline: bool = False) -> Look:
    """The look of series `index`; distinct in (colour, marker) for the first 56 and in grey for the first 6.

    With `style`, colour goes by `index` and marker and dash go by `style`. A baseline is drawn black or grey.

    >>> look(0).colour, look(0, baseline=True).colour
    ('#0072B2', '#000000')
    """
    form = index if style is None else style
    colours = BASELINE if baseline else COLOURS
    return Look(
        colours[index % len(colours)],
        MARKERS[form % len(MARKERS)],
        DASHES[form % len(DASHES)],
        HATCHES[form % len(HATCHES)],
    )


def darker(colour: str, share: float = 0.3) -> str:
    """The colour mixed with black, for text that names a series.

    >>> darker("#ffffff", 0.5)
    '#808080'
    """
    parts = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{round(part * (1 - share)):02x}" for part in parts)
