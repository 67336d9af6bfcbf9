"""What nbval does not see in a stored notebook: is it whole, small, silent, offline, and does it end in verdicts?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from memlens.book.notebook import IGNORE, code_cells, read, tags, verdicts
from memlens.book.place import notebooks
from memlens.catalog.verdict import MIME

__all__ = ["check_all", "findings"]

# belong to no single paper and claim nothing for one; what they print is compared like any output
WITHOUT_VERDICTS = ("00-start-here", "kv/what-is-remembered")
WITHOUT_EXERCISES = ("00-start-here",)
MAX_KILOBYTES = 300
MAX_LINES = 25
LIVE_MIMES = ("widget", "holoviews", "bokeh", "javascript")
LOCAL_PATH = re.compile(r"(?<![\w.<])/(?:home|root|tmp|work|Users|usr/lib|var)/\w")
LINK = re.compile(r"https?://(?!arxiv\.org|doi\.org|github\.com|aclanthology\.org|openreview\.net)\S+")


def findings(path: Path) -> Iterator[str]:
    """Each defect of the stored notebook at `path`, as one line."""
    book = read(path)
    code = code_cells(book)
    if (size := path.stat().st_size / 1024) > MAX_KILOBYTES:
        yield f"{size:.0f} KB stored, over {MAX_KILOBYTES}"
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        yield f"execution counts are not 1..{len(code)}; run `memlens store`"
    if book.metadata.get("kernelspec", {}).get("name") != "python3":
        yield "the kernelspec is not python3"
    if "widgets" in book.metadata:
        yield "widget state is stored"
    for number, cell in enumerate(code, 1):
        yield from (f"code cell {number}: {what}" for what in _cell(cell))
    yield from _anatomy(path, book)


def _cell(cell) -> Iterator[str]:
    if cell.source.count("\n") >= MAX_LINES:
        yield f"{cell.source.count(chr(10)) + 1} lines; functions belong in the library"
    if cell.source.rstrip().endswith(";"):
        yield "its last line ends in a semicolon, which hides the picture"
    if LOCAL_PATH.search(cell.source) or LOCAL_PATH.search(str(cell.outputs)):
        yield "a local path"
    for output in cell.outputs:
        if output.get("name") == "stderr":
            yield "stores stderr"
        if output.output_type == "error":
            yield "stores an error"
        for mime in output.get("data", {}):
            if any(word in mime for word in LIVE_MIMES) and mime != MIME:
                yield f"stores {mime}"


def _anatomy(path: Path, book) -> Iterator[str]:
    """The parts that every method's notebook has; what the special ones lack is named at the top of this file."""
    folder = path.parent.name
    name = path.stem if folder == "notebooks" else f"{folder}/{path.stem}"
    seen = [tag for cell in book.cells for tag in tags(cell)]
    wanted = {"parameters": 1, "live": 1} | ({} if name in WITHOUT_EXERCISES else {"solution": 2, "check": 2})
    for tag, least in wanted.items():
        if seen.count(tag) < least:
            yield f"{seen.count(tag)} cells tagged {tag!r}, at least {least} expected"
    for cell in book.cells:
        if "live" in tags(cell) and IGNORE not in tags(cell):
            yield f"the live cell lacks the tag {IGNORE}"
    if book.cells[0].cell_type != "markdown" or not book.cells[0].source.startswith("# "):
        yield "the first cell is no title"
    if (name in WITHOUT_VERDICTS) == bool(verdicts(book)):
        yield "verdicts, though it is listed as a notebook without" if name in WITHOUT_VERDICTS else "no verdict"


def check_all() -> dict[str, list[str]]:
    """Findings by notebook name; empty where all is well."""
    found = {name: list(findings(path)) for name, path in notebooks().items()}
    return {name: lines for name, lines in found.items() if lines}
