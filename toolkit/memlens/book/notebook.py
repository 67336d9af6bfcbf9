"""A notebook file: reading, tags, what it shows, and writing it back whole or not at all."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbformat import NotebookNode

from memlens.catalog.verdict import MIME, Verdict
from memlens.files import replace_text

__all__ = ["clean", "code_cells", "read", "shown", "source_of", "tags", "text_of", "verdicts", "write"]

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
IGNORE = "nbval-ignore-output"  # outputs vary between runs (times, live views) and are not compared


def read(path: Path) -> NotebookNode:
    """The notebook at `path`, in format 4.5."""
    return nbformat.read(path, as_version=4)


def write(book: NotebookNode, path: Path) -> None:
    """Write it whole or not at all, so that a failure leaves the old notebook."""
    replace_text(Path(path), text_of(book))


def text_of(book: NotebookNode) -> str:
    """The notebook as its file holds it."""
    return nbformat.writes(book).rstrip("\n") + "\n"


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def code_cells(book: NotebookNode) -> list[NotebookNode]:
    """The code cells that hold something."""
    return [cell for cell in book.cells if cell.cell_type == "code" and cell.source.strip()]


def source_of(book: NotebookNode) -> str:
    """All sources and tags, as one text: two notebooks with the same text run the same."""
    return "\n\n".join(f"{cell.cell_type} {tags(cell)}\n{cell.source}" for cell in book.cells)


def verdicts(book: NotebookNode) -> list[tuple[Verdict, bool]]:
    """Every verdict that the notebook shows, with whether its number varies between runs (a timing)."""
    return [
        (Verdict(**output.data[MIME]), IGNORE in tags(cell))
        for cell in code_cells(book)
        for output in cell.outputs
        if MIME in output.get("data", {})
    ]


def shown(book: NotebookNode) -> list[tuple]:
    """What its verdicts show, to their rounding. A timing is the machine's own: of it only the claim and the band count."""
    return [
        (row.key, row.claim, row.band) if varies else tuple(row)
        for row, varies in verdicts(book)
    ]  # fmt: skip


def clean(book: NotebookNode) -> NotebookNode:
    """As it is stored: no live outputs, no widget state, one kernelspec, no timing metadata."""
    book.metadata = NotebookNode(kernelspec=dict(KERNEL), language_info={"name": "python"})
    for cell in book.cells:
        kept = {"tags": tags(cell)} if tags(cell) else {}
        cell.metadata = NotebookNode(kept)
        if cell.cell_type != "code":
            continue
        if "live" in tags(cell):
            cell.outputs = []
        for output in cell.outputs:
            if "metadata" in output:
                output.metadata = NotebookNode({})
    return book
