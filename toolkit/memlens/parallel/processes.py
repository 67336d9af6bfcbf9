"""Other processes that work for this one, and that cannot outlive it.

    with hire("memlens.parallel.attention_worker:serve", workers=2) as team:
        team.comm.send(x, to=1)

Each worker is a fresh interpreter (nothing of this process's main module is run again, so it works in a notebook, in a test
and in a script without a guard). It holds the reading end of a pipe; when this process ends, however it ends, the pipe
closes and the worker leaves.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from memlens import check
from memlens.parallel.comm import Comm

__all__ = ["Team", "hire", "main"]


class Team:
    """This process as rank 0, and its workers as ranks 1 to n."""

    def __init__(self, comm: Comm, workers: list[subprocess.Popen]):
        self.comm, self.workers = comm, workers

    def alive(self) -> list[bool]:
        """Which workers still run."""
        return [worker.poll() is None for worker in self.workers]

    def check(self) -> None:
        """Raise if a worker has ended.

        Raises:
            RuntimeError: naming the rank and its exit code.
        """
        for rank, worker in enumerate(self.workers, 1):
            if (code := worker.poll()) is not None:
                raise RuntimeError(f"hire: rank {rank} ended with code {code}; open a new team")


@contextmanager
def hire(job: str, workers: int = 1, *, timeout_s: float = 60.0, **options: Any) -> Iterator[Team]:
    """Start `workers` processes that run `job(comm, **options)`; all have ended when the `with` is left.

    Args:
        job: "package.module:function", importable in a fresh interpreter with this one's `sys.path`.
        timeout_s: for the start, and for every message from then on.
        options: handed to the job; plain numbers, strings and lists.
    Raises:
        ValueError: no workers.
        RuntimeError: a worker did not come up in time.
    """
    check.at_least("hire", 1, workers=workers)
    folder = Path(tempfile.mkdtemp(prefix="memlens-"))
    started: list[subprocess.Popen] = []
    try:
        for rank in range(1, workers + 1):
            order = {"job": job, "rank": rank, "world": workers + 1, "meeting": str(folder / "meeting"), "options": options}
            started.append(_start(order))
        yield Team(_meet(folder / "meeting", workers + 1, timeout_s, started), started)
    finally:
        _end(started)
        shutil.rmtree(folder, ignore_errors=True)


def _start(order: dict) -> subprocess.Popen:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    code = "import sys; from memlens.parallel.processes import main; main(sys.argv[1])"
    return subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(order)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )


def _meet(meeting: Path, world: int, timeout_s: float, started: list[subprocess.Popen]) -> Comm:
    """Join the group once every worker is there; a worker that dies before is noticed at once."""
    limit = time.monotonic() + timeout_s
    while not all(meeting.with_name(f"ready{rank}").exists() for rank in range(1, world)):
        dead = [rank for rank, worker in enumerate(started, 1) if worker.poll() is not None]
        if dead or time.monotonic() > limit:
            why = (
                f"rank {dead[0]} ended with code {started[dead[0] - 1].returncode}" if dead else f"{timeout_s:.0f} s passed"
            )
            raise RuntimeError(f"hire: the workers did not come up ({why}); see what they wrote to the error stream")
        time.sleep(0.005)
    return Comm(0, world, meeting, timeout_s=timeout_s)


def _end(started: list[subprocess.Popen]) -> None:
    for worker in started:
        worker.stdin.close()  # the signal to leave
    for worker in started:
        try:
            worker.wait(2.0)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def main(text: str) -> None:
    """What a worker runs: meet the others, do the job, leave when the pipe from rank 0 closes."""
    order = json.loads(text)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    module, _, name = order["job"].partition(":")
    job = getattr(import_module(module), name)
    import torch

    torch.set_num_threads(1)
    meeting = Path(order["meeting"])
    meeting.with_name(f"ready{order['rank']}").touch()
    job(Comm(order["rank"], order["world"], meeting), **order["options"])


def _leave_with_parent() -> None:
    os.read(0, 1)  # returns when the last writing end is closed; no buffered reader, whose lock would outlive the job
    os._exit(0)
