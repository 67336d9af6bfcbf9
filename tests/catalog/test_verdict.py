"""A verdict: bands, words, the line, what is shown of a number, what is refused, and the closing table."""

import importlib
import json
import math

import pytest

from memlens import catalog
from memlens.catalog.verdict import KINDS, MIME, Verdict, judge, show

NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def rows(monkeypatch) -> list[Verdict]:
    """The verdicts of one test; the package's `verdict` is the function, so the module is asked for by name."""
    mine = []
    monkeypatch.setattr(importlib.import_module("memlens.catalog.verdict"), "_rows", mine)
    return mine


def give(measured, band, *, key="h2o", claim="a claim", kind="measured", **more) -> Verdict:
    return catalog.verdict(key, claim, kind=kind, measured=measured, band=band, **more)


@pytest.mark.parametrize(
    ("band", "inside", "outside"),
    [
        ("<= 0.65", [0.65, -1e9, -INF], [0.6500001, INF]),
        ("< 0.65", [0.64999], [0.65]),
        (">= 2", [2, 2.0, INF], [1.9999999]),
        (">2", [2.0000001], [2]),
        ("== 0", [0, -0.0], [1e-12]),
        ("0.9..1.1", [0.9, 1.0, 1.1], [0.8999, 1.1001]),
        (" -1 .. -.5 ", [-1, -0.5], [-1.01, 0.5]),
        ("2.0 +- 0.05", [1.96, 2.0, 2.04], [1.94, 2.06]),
        ("2.0 ± 0.05", [1.96], [2.06]),
        ("<= 1e-5", [9e-6], [2e-5]),
        (">= -2.5E+1", [-25], [-25.1]),
    ],
)
def test_a_band_holds_what_it_says(band, inside, outside):
    assert [judge(value, band) for value in inside] == [True] * len(inside)
    assert [judge(value, band) for value in outside] == [False] * len(outside)


@pytest.mark.parametrize("band", ["<= 1", ">= 1", "< 1", "> 1", "== 1", "0..2", "1 +- 5"])
def test_nan_lies_in_no_band(band):
    assert judge(NAN, band) is False


@pytest.mark.parametrize(
    "band", ["", "0.65", "about 2", "=> 2", "<= a", "<= 1 2", "1..", "..2", "2..1", "0 +- -1", "<= nan", 0.65]
)
def test_a_band_of_another_form_is_refused(band):
    with pytest.raises(ValueError, match=r"verdict: band=.*expected '<= 0.65'"):
        judge(1.0, band)


@pytest.mark.parametrize(
    ("value", "digits", "want"),
    [
        (0.53312, 2, "0.53"), (0.53312, 4, "0.5331"), (0.996, 2, "1"), (1234.5, 2, "1200"), (-1234.5, 3, "-1230"),
        (49152, 2, "49152"), (3.0, 2, "3"), (0.00012345, 2, "0.00012"), (0.0, 2, "0"), (-0.0, 2, "0"),
        (1.23456789, 8, "1.2345679"), (2.5e12, 2, "2.5e+12"),
        (NAN, 2, "nan"), (INF, 2, "inf"), (-INF, 2, "-inf"), ("as it is", 2, "as it is"), (None, 2, ""),
        ({"k": 0.12345, "v": 2}, 2, "k 0.12, v 2"),
    ],
)  # fmt: skip
def test_what_is_shown_of_a_number(value, digits, want):
    assert show(value, digits) == want


def test_the_kind_sets_the_digits_and_the_full_number_is_judged():
    shown = {kind: give(0.123456, "<= 0.1234", kind=kind, claim=kind) for kind in KINDS}
    assert [shown[kind].measured for kind in ("measured", "modelled", "exact")] == ["0.12", "0.123", "0.1235"]
    assert {row.verdict for row in shown.values()} == {"not reproduced here"}
    assert give(0.123456, "<= 1", digits=1).measured == "0.1"


@pytest.mark.parametrize(
    ("measured", "word"),
    [
        ({"a": 0.1, "b": 0.2}, "holds"), ({"a": 0.1, "b": 0.9}, "partly"), ({"a": 0.8, "b": 0.9}, "not reproduced here"),
        ({"a": 0.1, "b": NAN}, "partly"), (0.1, "holds"), (0.9, "not reproduced here"), (NAN, "not reproduced here"),
    ],
)  # fmt: skip
def test_parts_give_the_word(measured, word):
    assert give(measured, "<= 0.5").verdict == word


def test_each_part_has_its_own_band():
    row = give({"up": 3, "down": 0.2}, {"down": "<= 0.5", "up": ">= 2"})
    assert (row.verdict, row.measured, row.band) == ("holds", "up 3, down 0.2", "down <= 0.5, up >= 2")
    assert give({"up": 3, "down": 0.2}, {"down": "<= 0.1", "up": ">= 2"}).verdict == "partly"


@pytest.mark.parametrize(
    ("measured", "band"),
    [({"a": 1, "b": 2}, {"a": "<= 1"}), ({"a": 1}, {"a": "<= 1", "b": "<= 1"}), ({}, "<= 1"), (1, {"a": "<= 1"})],
)
def test_a_part_without_a_band_is_refused_and_nothing_is_kept(measured, band, rows, capsys):
    with pytest.raises(ValueError, match="expected one band for each part"):
        give(measured, band)
    assert (rows, capsys.readouterr().out) == ([], "")


def test_an_unknown_kind_and_an_unknown_paper_are_refused(rows):
    with pytest.raises(ValueError, match=r"verdict: kind='guessed'; expected one of 'exact', 'measured', 'modelled'"):
        give(1, "<= 1", kind="guessed")
    with pytest.raises(KeyError, match="did you mean 'h2o'"):
        give(1, "<= 1", key="h20")
    with pytest.raises(KeyError, match="optim/memo or cost/memo"):
        give(1, "<= 1", key="memo")
    assert rows == []


def test_the_line_has_one_form(capsys):
    row = give(
        0.5312,
        "<= 0.65",
        claim="KL at 20 % of the cache",
        baseline="recent window 1.0",
        claimed=0.5,
        n=3,
        spread=0.0413,
        note="three texts",
    )
    want = (
        "kv/h2o | KL at 20 % of the cache | measured | baseline recent window 1.0 | claimed 0.5 | measured 0.53 +- 0.04"
        " | band <= 0.65 | n 3 | holds | three texts"
    )
    assert str(row) == want
    assert capsys.readouterr().out == want + "\n"


def test_the_line_leaves_out_what_was_not_given(capsys):
    assert str(give(2, ">= 3", kind="exact")) == "kv/h2o | a claim | exact | measured 2 | band >= 3 | not reproduced here"
    assert capsys.readouterr().out.count("\n") == 1


def test_a_stored_verdict_reads_back_as_it_was():
    row = give({"a": 1.5, "b": 2}, "<= 3", n="3 texts", baseline={"random": 0.2})
    bundle = row._repr_mimebundle_()
    assert bundle["text/plain"] == str(row)
    assert Verdict(**json.loads(json.dumps(bundle[MIME]))) == row


def test_in_a_notebook_a_verdict_is_shown_once_even_as_a_cells_last_value():
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell()
    try:
        row = give(1, "<= 1")
        assert shell.display_formatter.format(row) == ({}, {})
    finally:
        type(shell).clear_instance()


def test_the_table_holds_the_last_verdict_of_each_claim_of_one_paper():
    give(0.9, "<= 0.5", claim="one")
    give(0.3, "<= 0.5", claim="two", kind="exact", n=4)
    give(0.1, "<= 0.5", claim="one")
    give(1, "<= 1", key="galore", claim="other paper")
    frame = catalog.table("kv/h2o")
    assert (frame.index.name, list(frame.index)) == ("claim", ["one", "two"])
    assert list(frame.columns) == ["kind", "baseline", "claimed", "measured", "band", "n", "verdict"]
    assert list(frame.verdict) == ["holds", "holds"]
    assert (frame.measured["one"], frame.n["two"]) == ("0.1", "4")
    assert len(catalog.table()) == 3
    assert catalog.table("snapkv").empty
    with pytest.raises(KeyError, match="no paper"):
        catalog.table("h20")


def test_the_spread_is_one_digit_and_text_bands_are_kept():
    row = give(math.pi, "3.1 ± 0.1", spread=0.0263, n="5")
    assert (row.measured, row.band, row.n, row.verdict) == ("3.1 +- 0.03", "3.1 ± 0.1", "5", "holds")
