"""A clone in miniature: a folder with notebooks, an entry to judge, and notebooks made of a few cells."""

from pathlib import Path

import nbformat
import pytest


def code(source: str, *tags: str):
    return nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)} if tags else {})


def text(source: str):
    return nbformat.v4.new_markdown_cell(source)


VERDICT = 'from memlens import catalog\n_ = catalog.verdict("kv/h2o", "c", kind="exact", measured=x, band="<= 2")'


def whole(value: str = "x = 1.0", *, solution: str = "y = x + 1") -> list:
    """The cells of a notebook that has every part."""
    return [
        text("# A method"),
        code('size = "full"', "parameters"),
        code(value),
        code("print(x)", "live", "nbval-ignore-output"),
        code(VERDICT),
        code("# the next number\n" + solution, "solution"),
        code("assert y == x + 1", "check"),
        code("# its double\nz = 2 * y", "solution"),
        code("assert z == 2 * y", "check"),
    ]


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    for folder in ("notebooks/kv", "toolkit/memlens", "figures"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def put(clone):
    """`put(cells, name)` writes a notebook and returns its path."""

    def write(cells, name="kv/h2o") -> Path:
        path = clone / "notebooks" / f"{name}.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        return path

    return write
