"""Student copies of the notebooks: solutions blanked, checks kept, and the proof that each check can fail and can pass."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from nbformat import NotebookNode
from rich.console import Console

from memlens.book.execute import Run, execute, run
from memlens.book.notebook import clean, code_cells, read, tags, write
from memlens.book.place import notebooks, root

__all__ = ["make_workshop", "prove", "student"]


def blank(source: str) -> str:
    """The leading comment lines of a solution, then a gap to fill.

    >>> print(blank("# the share that is kept\\nshare = kept / total"))
    # the share that is kept
    ...  # your code here
    """
    lines = source.splitlines()
    kept = next((i for i, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")), len(lines))
    return "\n".join([*lines[:kept], "...  # your code here"])


def student(book: NotebookNode) -> NotebookNode:
    """A copy without outputs and with every cell tagged `solution` blanked."""
    copy = clean(NotebookNode(book.copy()))
    copy.cells = [NotebookNode(cell.copy()) for cell in book.cells]
    for cell in code_cells(copy):
        cell.outputs, cell.execution_count = [], None
        if "solution" in tags(cell):
            cell.source = blank(cell.source)
    return copy


def _failures(done: Run) -> dict[int, list[str]]:
    """Cells that raised, by number, with their tags."""
    return {
        number: tags(cell)
        for number, cell in enumerate(code_cells(done.book), 1)
        if any(output.output_type == "error" for output in cell.outputs)
    }


def prove(path: Path, blanked: NotebookNode) -> list[str]:
    """What is wrong with the pair: the solved one must pass, the student's fail at every check and nowhere else."""
    with TemporaryDirectory() as figures:  # those of a small run are not the project's
        return _wrong(path, blanked, Path(figures))


def _wrong(path: Path, blanked: NotebookNode, figures: Path) -> list[str]:
    wrong = []
    solved = execute(path, parameters={"size": "small"}, figures=figures)
    if solved.error:
        wrong.append(f"the solved copy fails in code cell {solved.failed_cell}: {solved.error}")
    small = NotebookNode(blanked.copy())
    small.cells = [NotebookNode(cell.copy()) for cell in blanked.cells]
    for cell in code_cells(small):
        if "parameters" in tags(cell):
            cell.source += "\nsize = 'small'"
    failed = _failures(run(small, path.parent, allow_errors=True, figures=figures))
    checks = {number for number, cell in enumerate(code_cells(small), 1) if "check" in tags(cell)}
    wrong += [f"code cell {number} fails, though it is no check" for number in sorted(set(failed) - checks)]
    wrong += [f"the check in code cell {number} passes without a solution" for number in sorted(checks - set(failed))]
    return wrong


def make_workshop(out: Path | None = None) -> int:
    """Write student copies of every notebook into `out` (default workshop/) and prove each; 0 if all are proven."""
    console, bad = Console(), 0
    out = out or root() / "workshop"
    shutil.rmtree(out, ignore_errors=True)
    for name, path in notebooks().items():
        copy = student(read(path))
        target = out / f"{name}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        write(copy, target)
        wrong = prove(path, copy)
        bad += bool(wrong)
        console.print(f"{'[red]wrong[/]' if wrong else '[green]proven[/]'} {name}", *wrong, sep="\n  ")
    console.print(f"student copies in {out.relative_to(root())}/")
    return int(bool(bad))
