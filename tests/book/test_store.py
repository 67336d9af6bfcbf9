"""Notebooks as they are stored, and what the checker finds in those that are not."""

import nbformat
import pytest

from memlens.book.check import findings
from memlens.book.notebook import read, verdicts
from memlens.book.store import store

from .conftest import code, text, whole


def test_a_stored_notebook_has_no_findings_and_no_live_output(put):
    path = put(whole())
    store(path)
    assert list(findings(path)) == []
    live = next(cell for cell in read(path).cells if "live" in cell.metadata.get("tags", []))
    assert live.outputs == []
    assert live.execution_count == 3
    ((row, varies),) = verdicts(read(path))
    assert (row.key, row.verdict, varies) == ("kv/h2o", "holds", False)


def test_a_notebook_that_fails_is_not_written(put):
    path = put(whole("x = 1 / 0"))
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="failed in code cell 2: ZeroDivisionError"):
        store(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda book: book.cells[2].update(execution_count=7), "execution counts"),
        (lambda book: book.metadata.update(widgets={}), "widget state"),
        (lambda book: book.metadata.pop("kernelspec"), "kernelspec"),
        (lambda book: book.cells[2].update(outputs=[nbformat.v4.new_output("stream", name="stderr", text="w")]), "stderr"),
        (
            lambda book: book.cells[2].update(
                outputs=[nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])]
            ),
            "an error",
        ),
        (
            lambda book: book.cells[2].update(
                outputs=[nbformat.v4.new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}})]
            ),
            "widget-view",
        ),
        (lambda book: book.cells[2].update(source="open('/ho" + "me/me/x')"), "a local path"),
        (lambda book: book.cells[2].update(source="a = 1\n" * 40), "lines"),
        (lambda book: book.cells[2].update(source="draw(a);"), "semicolon"),
        (lambda book: book.cells[0].update(source="x" * 400_000), "KB stored"),
        (lambda book: book.cells[3].metadata.update(tags=["live"]), "lacks the tag"),
        (lambda book: book.cells.__delitem__(slice(5, 9)), "tagged 'solution'"),
        (lambda book: book.cells[4].update(outputs=[]), "no verdict"),
        (lambda book: book.cells[0].update(source="no title"), "no title"),
    ],
)
def test_the_checker_finds(put, spoil, message):
    path = put(whole())
    store(path)
    book = read(path)
    spoil(book)
    nbformat.write(book, path)
    assert any(message in line for line in findings(path)), list(findings(path))


def test_the_door_needs_no_exercises(put):
    path = put(
        [text("# Start"), code('size = "full"', "parameters"), code("1", "live", "nbval-ignore-output")], "00-start-here"
    )
    store(path)
    assert list(findings(path)) == []


def test_a_notebook_of_no_single_paper_has_exercises_and_no_verdict(put):
    cells = whole()
    path = put([cell for cell in cells if "catalog.verdict" not in cell.source], "kv/what-is-remembered")
    store(path)
    assert list(findings(path)) == []
    path = put(cells, "kv/what-is-remembered")
    store(path)
    assert list(findings(path)) == ["verdicts, though it is listed as a notebook without"]
    path = put(cells[:5], "kv/what-is-remembered")
    store(path)
    assert any("tagged 'solution'" in line for line in findings(path))
