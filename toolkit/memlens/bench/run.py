"""`memlens bench`: each block against its peer, interleaved in one process, beside the machine's own ceilings.

Rows go to `build/bench.csv` with versions, in place of the rows that their family had there; the ones worth keeping are in
docs/benchmarks.md.
"""

from __future__ import annotations

import csv
import platform
import statistics
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from pkgutil import iter_modules
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from memlens import check
from memlens.bench.case import Case
from memlens.book.place import root
from memlens.files import replace_text

__all__ = ["bench", "ceilings", "measure"]

ROUNDS, BUDGET = 15, 12.0  # at most so many rounds, or so many seconds a case
PACKAGES = ("memlens", "transformers", "galore-torch", "kvpress")  # beside torch; the peers are requirements-peers.txt


class Row(NamedTuple):
    name: str
    ours_ms: float  # median
    peer: str
    peer_ms: float
    ratio: float  # median of ours / peer, round by round; below 1 is faster
    low: float  # quartiles of that ratio
    high: float
    peak_mb: float  # tensors allocated by ours at its peak beyond the inputs
    peer_peak_mb: float
    roofline: float  # share of the time the ceilings allow: the bound's time / ours; 0 where flops and bytes are unknown


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes of tensor storage alive at once that were allocated inside the call, by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = call()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    del kept
    return peak


def ceilings(seconds: float = 1.5) -> tuple[float, float]:
    """This machine's float32 GEMM rate (FLOP/s) and copy bandwidth (bytes/s, read plus write), medians."""
    a, x = torch.randn(1024, 1024), torch.randn(32 << 20)
    y = torch.empty_like(x)
    gemm, copy, end = [], [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(gemm) < 5:
        gemm.append(2 * 1024**3 / _seconds(lambda: a @ a))
        copy.append(2 * x.numel() * 4 / _seconds(lambda: y.copy_(x)))
    return statistics.median(gemm), statistics.median(copy)


def measure(case: Case, gemm: float, copy: float) -> Row:
    """Ours and the peer in turn, so that a slow moment of the machine hits both."""
    case.ours(), case.peer()
    ours, peers, end = [], [], time.perf_counter() + BUDGET
    while len(ours) < 3 or (len(ours) < ROUNDS and time.perf_counter() < end):
        if len(ours) % 2:
            mine, theirs = _seconds(case.ours), _seconds(case.peer)
        else:
            theirs, mine = _seconds(case.peer), _seconds(case.ours)
        ours.append(mine)
        peers.append(theirs)
    ratios = sorted(mine / theirs for mine, theirs in zip(ours, peers, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    bound = max(case.flops / gemm, case.bytes / copy)
    return Row(
        case.name, statistics.median(ours) * 1e3, case.peer_name, statistics.median(peers) * 1e3, middle, low, high,
        peak_bytes(case.ours) / 1e6, peak_bytes(case.peer) / 1e6, bound / statistics.median(ours),
    )  # fmt: skip


def families() -> list[str]:
    package = import_module("memlens.bench")
    return [
        item.name
        for item in iter_modules(package.__path__)
        if hasattr(import_module(f"memlens.bench.{item.name}"), "cases")
    ]


def bench(*, family: str | None = None, threads: int = 2) -> int:
    """Measure every case of a family, or all; print the table and write the rows to build/bench.csv.

    Raises:
        ValueError: a family without benchmarks.
    """
    known = families()
    if family:
        check.one_of("bench", known, family=family)
    torch.set_num_threads(threads)
    console, rows = Console(), {name: [] for name in ([family] if family else known)}
    gemm, copy = ceilings()
    machine = f"{platform.machine()}, {threads} threads, GEMM {gemm / 1e9:.0f} GFLOP/s, copy {copy / 1e9:.0f} GB/s"
    console.print(f"torch {torch.__version__}, {machine}")
    for name, measured in rows.items():
        for case in import_module(f"memlens.bench.{name}").cases():
            measured.append(row := measure(case, gemm, copy))
            console.print(f"{row.name}: {row.ours_ms:.1f} ms, {row.ratio:.2f} x {row.peer}", soft_wrap=True)
    _write(rows, machine)
    console.print(_table([row for measured in rows.values() for row in measured]))
    return 0


def _table(rows: list[Row]) -> Table:
    table = Table(
        "case", "ours ms", "peer", "peer ms", "ratio (quartiles)", "peak MB", "peer's", "of roofline", pad_edge=False
    )
    for row in rows:
        table.add_row(
            row.name, f"{row.ours_ms:.2f}", row.peer, f"{row.peer_ms:.2f}",
            f"{row.ratio:.2f} ({row.low:.2f}-{row.high:.2f})",
            f"{row.peak_mb:.1f}", f"{row.peer_peak_mb:.1f}", f"{row.roofline:.0%}" if row.roofline else "",
        )  # fmt: skip
    return table


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _write(rows: dict[str, list[Row]], machine: str) -> None:
    path, text = root() / "build" / "bench.csv", StringIO()
    about = machine, torch.__version__, " ".join(f"{name}={_version(name)}" for name in PACKAGES)
    columns = ["family", *Row._fields, "machine", "torch", "packages"]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(_others(path, rows))
    for family, measured in rows.items():
        writer.writerows(dict(zip(columns, (family, *row, *about), strict=True)) for row in measured)
    replace_text(path, text.getvalue())


def _others(path: Path, rows: dict[str, list[Row]]) -> list[dict[str, str]]:
    """The stored rows of families that are not in `rows`; a row that names no family is told by its case."""
    if not path.exists():
        return []
    cases = {row.name for measured in rows.values() for row in measured}
    with path.open(newline="", encoding="utf-8") as file:
        stored = list(csv.DictReader(file))
    return [row for row in stored if (row["family"] not in rows if row.get("family") else row["name"] not in cases)]
