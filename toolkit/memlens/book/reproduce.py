"""Run every notebook in parallel, keep what changed, redraw the figures, and print the ledger: `memlens reproduce`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections import Counter
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from nbformat import NotebookNode
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from memlens.book.execute import execute
from memlens.book.ledger import as_table
from memlens.book.notebook import clean, read, shown, source_of, verdicts, write
from memlens.book.place import root, select, state
from memlens.catalog.verdict import WORDS, Verdict
from memlens.files import replace_text

__all__ = ["reproduce"]

FIGURE = re.compile(r"save_figure\(\s*[\"']([a-z0-9_-]+)")
CODE = ("toolkit/**/*.py", "kernels/**/*.py", "datasets/**/*", "toolkit/**/*.toml", "constraints.txt")


def fingerprint() -> str:
    """A hash over the code and data that results depend on."""
    digest = hashlib.sha256()
    for pattern in CODE:
        for path in sorted(root().glob(pattern)):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(path.relative_to(root()).as_posix().encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


class Progressed:
    """What this run has done, on disk after every notebook, so that an interrupted run goes on where it stopped."""

    def __init__(self, wanted: dict[str, Path]):
        self.path = state() / "reproduce.json"
        self.key = hashlib.sha256((fingerprint() + "\n".join(sorted(wanted))).encode()).hexdigest()
        old = self._read()
        self.done = old["done"] if old.get("key") == self.key and not old.get("finished") else {}

    def _read(self) -> dict:
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def save(self, *, finished: bool = False) -> None:
        replace_text(self.path, json.dumps({"key": self.key, "finished": finished, "done": self.done}))

    def fresh(self, name: str, path: Path) -> bool:
        """Whether this very notebook passed earlier in this run."""
        row = self.done.get(name)
        return bool(row) and not row["error"] and row["source"] == _hash(path)


def _hash(path: Path) -> str:
    return hashlib.sha256(source_of(read(path)).encode()).hexdigest()


def _failed(error: Exception) -> dict:
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    return {"seconds": 0.0, "error": line, "cell": None, "rows": [], "rewritten": False, "fell": [], "source": ""}


def run_one(path: Path) -> dict:
    """Run a notebook, rewrite it only if its verdicts changed beyond their rounding, and report."""
    try:
        before = read(path)
        done = execute(path)
    except Exception as error:  # a file that is no notebook, a kernel that does not start: the others go on
        return _failed(error)
    rewritten = False
    if not done.error and shown(done.book) != shown(before):
        write(clean(done.book), path)
        rewritten = True
    rows = [tuple(row) for row, _ in verdicts(done.book)]
    return {
        "seconds": done.seconds, "error": done.error, "cell": done.failed_cell, "rows": rows,
        "rewritten": rewritten, "fell": [] if done.error else fell(before, done.book), "source": _hash(path),
    }  # fmt: skip


def fell(before: NotebookNode, after: NotebookNode) -> list[str]:
    """The claims whose stored verdict was better than this run's; those that rest on times are left out."""
    old = {(row.key, row.claim): row.verdict for row, varies in verdicts(before) if not varies}
    rank = WORDS.index
    return [
        f"{row.claim}: {old[row.key, row.claim]}, now {row.verdict}"
        for row, varies in verdicts(after)
        if not varies and rank(row.verdict) > rank(old.get((row.key, row.claim), row.verdict))
    ]


def _line(name: str, row: dict) -> str:
    if row["error"]:
        cell = f", code cell {row['cell']}" if row["cell"] else ""
        return f"[red]FAILED[/] {name}: {row['seconds']:.0f} s{cell}: {row['error']}"
    words = Counter(Verdict(*fields).verdict for fields in row["rows"])
    told = ", ".join(f"{count} {word}" for word, count in words.items()) or "no verdicts"
    worse = "".join(f"\n  [red]fell[/] {claim}" for claim in row["fell"])
    return (
        f"[green]passed[/] {name}: {row['seconds']:.0f} s, {told}" + (", stored anew" if row["rewritten"] else "") + worse
    )


def _result(job: Future) -> dict:
    try:
        return job.result()
    except BrokenProcessPool as error:  # a worker was killed: every job that had not ended fails
        return _failed(error)


def _run_all(wanted: dict[str, Path], progressed: Progressed, workers: int, console: Console) -> None:
    todo = {name: path for name, path in wanted.items() if not progressed.fresh(name, path)}
    if len(todo) < len(wanted):
        console.print(f"resuming: {len(wanted) - len(todo)} of {len(wanted)} notebooks were done before the interruption")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as bar, ProcessPoolExecutor(workers) as pool:
        task = bar.add_task("notebooks", total=len(todo))
        jobs = {pool.submit(run_one, path): name for name, path in todo.items()}
        try:
            for job in as_completed(jobs):
                progressed.done[jobs[job]] = _result(job)
                progressed.save()
                bar.advance(task)
                bar.console.print(_line(jobs[job], progressed.done[jobs[job]]), soft_wrap=True)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise


def _figures_of(path: Path) -> list[str]:
    """The stored figures that a notebook draws, by the names in its `save_figure` calls; none for what is no notebook."""
    try:
        named = FIGURE.findall(source_of(read(path)))
    except ValueError:
        return []
    return [name for name in named if (root() / "figures" / f"{name}.nc").exists()]


def redraw_figures(wanted: dict[str, Path], console: Console) -> list[str]:
    """Draw the figures of these notebooks from their data into build/figures; the names that could not be drawn."""
    from memlens.viz.redraw import redraw

    failed, out = [], root() / "build" / "figures"
    stems = sorted(stem for path in wanted.values() for stem in _figures_of(path))
    for stem in stems:
        try:
            redraw([stem], out=out)
        except (OSError, ValueError, KeyError) as error:
            failed.append(stem)
            console.print(f"[red]FAILED[/] figure {stem}: {error}", soft_wrap=True)
    console.print(f"figures: {len(stems) - len(failed)} drawn from their data into build/figures")
    return failed


def reproduce(*, paper: str | None = None, family: str | None = None, workers: int | None = None) -> int:
    """Run the notebooks of a paper, a family, or all; print a line for each and the ledger.

    Returns:
        0 if all passed and no verdict fell below the stored one, else 1.
    """
    console = Console(width=None if os.isatty(1) else 160)
    wanted, start = select(paper=paper, family=family), time.perf_counter()
    progressed = Progressed(wanted)
    workers = workers or max(1, min(len(wanted), os.cpu_count() or 1))
    _run_all(wanted, progressed, workers, console)
    progressed.save(finished=True)
    results = {name: progressed.done[name] for name in wanted}
    failed = [name for name, row in results.items() if row["error"]]
    failed += redraw_figures(wanted, console)
    console.print(as_table(Verdict(*fields) for row in results.values() for fields in row["rows"]))
    console.print(
        f"{len(wanted)} notebooks, {len(failed)} failed, {time.perf_counter() - start:.0f} s on {workers} workers"
    )
    for name in failed:
        console.print(f"  [red]{name}[/] {results.get(name, {}).get('error', 'could not be drawn')}", soft_wrap=True)
    lost = [f"{name}: {claim}" for name, row in results.items() for claim in row["fell"]]
    for line in lost:
        console.print(f"  [red]a verdict fell[/] {line}", soft_wrap=True)
    return int(bool(failed or lost))
