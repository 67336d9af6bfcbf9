"""Execute a notebook and write it back as it is stored: `memlens store notebooks/kv/h2o.ipynb`."""

from __future__ import annotations

import sys
from pathlib import Path

from memlens.book.check import findings
from memlens.book.execute import execute
from memlens.book.notebook import clean, write

__all__ = ["store"]


def store(path: Path, *, timeout: int = 180) -> float:
    """Run the notebook, write it back without live outputs and return the seconds it took.

    Raises:
        RuntimeError: a cell failed; the file on disk is left as it was.
    """
    path = Path(path)
    done = execute(path, timeout=timeout)
    if done.error:
        raise RuntimeError(
            f"store: {path.name} failed in code cell {done.failed_cell}: {done.error}; the file is unchanged"
        )
    write(clean(done.book), path)
    return done.seconds


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"{name}: {store(Path(name)):.1f} s")
        print("\n".join(f"  {finding}" for finding in findings(Path(name))))
