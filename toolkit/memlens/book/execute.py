"""Run one notebook in a fresh kernel and say what happened, also when a cell fails or the kernel dies."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from memlens.book.notebook import code_cells, read, tags

__all__ = ["THREADS", "Run", "execute"]

TIMEOUT = 180  # seconds for one cell
# kernels share the cores: a waiting thread that spins for a millisecond takes them from the others, one that sleeps at once is
# slow to wake in a kernel that has them alone
THREADS = {"GOMP_SPINCOUNT": "1000"}


class Run(NamedTuple):
    book: NotebookNode  # with the outputs of this run
    seconds: float
    failed_cell: int | None = None  # 1-based, among the code cells; None where none had started
    error: str = ""  # one line


def execute(
    path: Path, *, timeout: int = TIMEOUT, allow_errors: bool = False, parameters: dict | None = None,
    figures: Path | None = None,
) -> Run:  # fmt: skip
    """Run every cell of the notebook at `path` in its own folder, without writing to it.

    Args:
        timeout: seconds for one cell.
        allow_errors: go on after a failing cell.
        parameters: values put after the cell tagged `parameters`, like papermill's.
        figures: the folder that `save_figure` writes to, where it is not the project's own.
    """
    book = read(path)
    for cell in code_cells(book):
        cell.outputs, cell.execution_count = [], None
        if parameters and "parameters" in tags(cell):
            cell.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    return run(book, path.parent, timeout=timeout, allow_errors=allow_errors, figures=figures)


def run(
    book: NotebookNode, folder: Path, *, timeout: int = TIMEOUT, allow_errors: bool = False, figures: Path | None = None
) -> Run:
    """Run a notebook that is held in memory, with `folder` as its working folder."""
    logging.getLogger("traitlets").setLevel(logging.CRITICAL)
    started: list[int] = []
    client = NotebookClient(
        book, timeout=timeout, kernel_name="python3", allow_errors=allow_errors, store_widget_state=False,
        resources={"metadata": {"path": str(folder)}}, record_timing=False,
        on_cell_start=lambda cell, cell_index: started.append(cell_index),
    )  # fmt: skip
    start, error = time.perf_counter(), ""
    try:
        # the kernel's own notices (its transport, its shutdown) go nowhere; what cells print is captured in their outputs
        environment = {**THREADS, **os.environ}
        environment |= {"MEMLENS_FIGURES": str(figures)} if figures else {}
        asyncio.run(client.async_execute(stderr=subprocess.DEVNULL, env=environment))
    except CellExecutionError as failure:
        error = f"{failure.ename}: {failure.evalue}".splitlines()[0]
    except CellTimeoutError:
        error = f"took longer than {timeout} s"
    except DeadKernelError:
        error = "the kernel died (out of memory, or killed)"
    code = [cell.cell_type == "code" and bool(cell.source.strip()) for cell in book.cells]
    failed = sum(code[: started[-1] + 1]) if error and started else None
    return Run(book, time.perf_counter() - start, failed, error)
