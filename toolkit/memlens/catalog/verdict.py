"""Verdicts: what was measured against a band fixed beforehand, printed as one line that a notebook stores.

In Jupyter the line also carries its fields as JSON, from which the ledger, the README's table and the gallery are read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from memlens import check
from memlens.catalog.entries import find

__all__ = ["KINDS", "MIME", "WORDS", "Verdict", "judge", "table", "verdict"]

KINDS = ("exact", "measured", "modelled")
WORDS = ("holds", "partly", "not reproduced here")  # from best to worst
MIME = "application/vnd.memlens.verdict+json"
DIGITS = {"exact": 4, "modelled": 3, "measured": 2}
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_BANDS = {
    "<=": lambda x, a: x <= a,
    ">=": lambda x, a: x >= a,
    "<": lambda x, a: x < a,
    ">": lambda x, a: x > a,
    "==": lambda x, a: x == a,
}


class Verdict(NamedTuple):
    key: str  # family/key
    claim: str
    kind: str  # exact | measured | modelled
    baseline: str  # what it is compared with, e.g. "sink+recent 0.19"
    claimed: str  # the paper's figure
    measured: str  # ours, rounded
    band: str  # fixed beforehand
    n: str
    verdict: str  # one of WORDS
    note: str

    def __str__(self) -> str:
        fields = {name: getattr(self, name) for name in ("baseline", "claimed", "measured", "band", "n")}
        shown = [f"{name} {value}" for name, value in fields.items() if value]
        return " | ".join([self.key, self.claim, self.kind, *shown, self.verdict, *([self.note] if self.note else [])])

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        return {"text/plain": str(self), MIME: self._asdict()}

    def _ipython_display_(self) -> None:
        """Nothing more: `verdict` has shown the line, and a cell that ends in the call would show and count it twice."""


def judge(value: float, band: str) -> bool:
    """Whether a number lies in a band: `<= 0.65`, `>= 2`, `== 0`, `0.9..1.1` or `2.0 +- 0.05`. NaN lies in none.

    >>> judge(0.53, "<= 0.65"), judge(2.1, "2.0 +- 0.05"), judge(1.0, "0.9..1.1")
    (True, False, True)

    Raises:
        ValueError: a band of another form, or one that holds no number (`2..1`, `0 +- -1`).
    """
    value = float(value)
    text = str(band).replace("±", "+-").strip()
    if match := re.fullmatch(rf"(<=|>=|==|<|>)\s*({_NUMBER})", text):
        return not math.isnan(value) and _BANDS[match[1]](value, float(match[2]))
    match = re.fullmatch(rf"({_NUMBER})\s*\.\.\s*({_NUMBER})", text)
    if match and (low := float(match[1])) <= (high := float(match[2])):
        return low <= value <= high
    match = re.fullmatch(rf"({_NUMBER})\s*\+-\s*({_NUMBER})", text)
    if match and (slack := float(match[2])) >= 0:
        return abs(value - float(match[1])) <= slack
    check.fail("verdict", f"band={band!r}", "'<= 0.65', '>= 2', '== 0', '0.9..1.1' or '2.0 +- 0.05'")


def show(value, digits: int) -> str:
    """A number to `digits` significant digits, whole numbers in full; text as it is, None as none; a mapping by parts.

    >>> show(1234.5, 2), show(0.04567, 2), show(49152, 2), show({"k": 0.5, "v": 2.0}, 2)
    ('1200', '0.046', '49152', 'k 0.5, v 2')
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {show(part, digits)}" for name, part in value.items())
    value = float(value)
    if value.is_integer() and abs(value) < 1e9:
        return f"{int(value)}"
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:.{max(digits, 6)}g}"  # so that 1234.5 is 1200 and not 1.2e+03


def verdict(
    key: str, claim: str, *, kind: str, measured: float | Mapping[str, float], band: str | Mapping[str, str],
    baseline: float | str | Mapping | None = None, claimed: float | str | None = None, n: int | str | None = None,
    spread: float | None = None, note: str = "", digits: int | None = None,
) -> Verdict:  # fmt: skip
    """Judge a measurement against its band, print the line and return it.

    Args:
        key: a catalogue name, `h2o` or `kv/h2o`.
        claim: the sentence that is judged, at most 90 characters.
        kind: `exact` (arithmetic or a theorem), `measured` (a real model or data), `modelled` (a cost model).
        measured: one number, or named parts that are judged one by one: all in band holds, some is partly.
        band: `<= 0.65`, `>= 2`, `== 0`, `0.9..1.1`, `2.0 +- 0.05`; one for all parts, or one for each. Never moved.
        baseline, claimed: what it is compared with, and the paper's figure.
        n, spread: how many samples or seeds, and the standard deviation over them.
        digits: significant digits shown (2 measured, 3 modelled, 4 exact); the band is judged on the full number.
    Raises:
        KeyError: an unknown paper; ValueError: an unknown kind, a malformed band, parts without a band.
    """
    entry = find(key)
    check.one_of("verdict", KINDS, kind=kind)
    parts = dict(measured) if isinstance(measured, Mapping) else {"": measured}
    bands = dict(band) if isinstance(band, Mapping) else dict.fromkeys(parts, band)
    if set(parts) != set(bands) or not parts:
        check.fail("verdict", f"parts {sorted(parts)} and bands {sorted(bands)}", "one band for each part")
    held = [judge(value, bands[name]) for name, value in parts.items()]
    word = WORDS[0] if all(held) else WORDS[1] if any(held) else WORDS[2]
    digits = digits or DIGITS[kind]
    shown = show(measured, digits) + (f" +- {show(float(spread), 1)}" if spread is not None else "")
    row = Verdict(
        entry.name,
        claim,
        kind,
        show(baseline, digits),
        show(claimed, digits),
        shown,
        show(band, digits),
        show(n, 9),
        word,
        note,
    )
    _rows.append(row)
    _emit(row)
    return row


_rows: list[Verdict] = []  # of this process, for the table at a notebook's end


def _emit(row: Verdict) -> None:
    from sys import modules

    shell = modules.get("IPython") and modules["IPython"].get_ipython()
    if shell is None:
        print(row)
    else:
        from IPython.display import display

        display(row._repr_mimebundle_(), raw=True)


def table(key: str | None = None):
    """This session's verdicts (for one paper, or all) as a pandas table to end a notebook with."""
    import pandas

    name = find(key).name if key else None
    rows = {(row.key, row.claim): row for row in _rows if name in (None, row.key)}
    frame = pandas.DataFrame([row._asdict() for row in rows.values()], columns=Verdict._fields)
    return frame.drop(columns=["key", "note"]).set_index("claim")
