"""The ledger: every verdict that the stored notebooks show, for the terminal, the README and the door's gallery."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rich.table import Table

from memlens.book.notebook import read, verdicts, write
from memlens.book.place import notebooks, root
from memlens.catalog import FAMILIES, entries
from memlens.catalog.verdict import Verdict
from memlens.files import replace_text

__all__ = ["as_table", "refresh", "stale", "stored"]

BEGIN, END = "<!-- generated: {} -->", "<!-- end: {} -->"
COLOURS = {"holds": "green", "partly": "yellow", "not reproduced here": "red"}


def stored() -> dict[str, list[Verdict]]:
    """The verdicts of every stored notebook that has any, by notebook name."""
    found = {name: [row for row, _ in verdicts(read(path))] for name, path in notebooks().items()}
    return {name: rows for name, rows in found.items() if rows}


def as_table(rows: Iterable[Verdict]) -> Table:
    """The ledger for a terminal."""
    table = Table(show_lines=False, pad_edge=False)
    for column in ("paper", "claim", "kind", "baseline", "claimed", "measured", "band", "verdict"):
        table.add_column(column, overflow="fold")
    for row in rows:
        word = f"[{COLOURS[row.verdict]}]{row.verdict}[/]"
        table.add_row(row.key, row.claim, row.kind, row.baseline, row.claimed, row.measured, row.band, word)
    return table


def _cells(*texts: str) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def verdict_table(link: str) -> str:
    """Every verdict as a Markdown table; `link` leads from the file that holds it to the project's top."""
    lines = [_cells("paper", "claim", "claimed", "measured", "band", "verdict"), _cells(*["---"] * 6)]
    for name, rows in stored().items():
        for row in rows:
            paper = f"[{row.key}]({link}notebooks/{name}.ipynb)"
            lines.append(_cells(paper, row.claim, row.claimed, row.measured, row.band, f"**{row.verdict}**"))
    return "\n".join(lines)


def method_table(link: str) -> str:
    """One row a method: what its verdicts say, and the first that was measured."""
    lines = [_cells("paper", "verdicts", "for instance", "measured", "band", "verdict"), _cells(*["---"] * 6)]
    for name, found in stored().items():
        for key in dict.fromkeys(row.key for row in found):
            rows = [row for row in found if row.key == key]
            one = next((row for row in rows if row.kind == "measured"), rows[0])
            paper = f"[{key}]({link}notebooks/{name}.ipynb)"
            lines.append(_cells(paper, _tally(rows), one.claim, one.measured, one.band, f"**{one.verdict}**"))
    return "\n".join(lines)


def _tally(rows: Iterable[Verdict]) -> str:
    return "<br>".join(f"{count} {word}" for word, count in Counter(row.verdict for row in rows).items())


def family_table() -> str:
    """Papers known and papers working, by family."""
    known = Counter(entry.family for entry in entries().values())
    working = Counter(entry.family for entry in entries().values() if entry.status == "working")
    lines = [_cells("family", "papers", "working"), _cells("---", "---", "---")]
    lines += [_cells(f"`memlens.{name}`", str(known[name]), str(working[name])) for name in FAMILIES]
    return "\n".join([*lines, _cells("all", str(known.total()), str(working.total()))])


def gallery(link: str) -> str:
    """One row a method: its figure, what is done, and the words of our verdicts."""
    rows = [row for found in stored().values() for row in found]
    lines = [_cells("figure", "method", "verdicts"), _cells("---", "---", "---")]
    for entry in entries().values():
        own = [row for row in rows if row.key == entry.name]
        if entry.status != "working" or not own:
            continue
        figure = f"figures/{entry.notebook.removeprefix('notebooks/').removesuffix('.ipynb').replace('/', '-')}.png"
        picture = f'<img src="{link}{figure}" width="260">' if (root() / figure).exists() else ""
        method = f"[**{entry.key}**]({link}{entry.notebook}): {entry.summary}"
        lines.append(_cells(picture, method, _tally(own)))
    return "\n".join(lines)


PARTS = {
    "README.md": {"families": lambda: family_table(), "methods": lambda: method_table("")},
    "docs/verdicts.md": {"verdicts": lambda: verdict_table("../")},
    "notebooks/00-start-here.ipynb": {"gallery": lambda: gallery("../")},
}


def _replaced(text: str, parts: dict) -> str:
    for name, make in parts.items():
        begin, end = BEGIN.format(name), END.format(name)
        if begin in text:
            head, rest = text.split(begin, 1)
            text = f"{head}{begin}\n\n{make()}\n\n{end}{rest.split(end, 1)[1]}"
    return text


def _current(path: Path, parts: dict):
    """The file's content with every generated part made anew; a notebook or a text."""
    if path.suffix != ".ipynb":
        return _replaced(path.read_text(encoding="utf-8"), parts)
    book = read(path)
    for cell in book.cells:
        if cell.cell_type == "markdown":
            cell.source = _replaced(cell.source, parts)
    return book


def stale() -> list[str]:
    """The generated parts that no longer say what the notebooks and the catalogue say."""
    out = []
    for name, parts in PARTS.items():
        path = root() / name
        old = read(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
        if old != _current(path, parts):
            out.append(name)
    return out


def refresh() -> list[str]:
    """Write the generated parts anew and return the files that changed."""
    changed = stale()
    for name in changed:
        path = root() / name
        content = _current(path, PARTS[name])
        if path.suffix == ".ipynb":
            write(content, path)
        else:
            replace_text(path, content)
    return changed
