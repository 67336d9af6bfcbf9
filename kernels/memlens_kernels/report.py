"""Compile every shipped tile ahead of time, with no GPU, and say what it costs: `python -m memlens_kernels.report`.

A tracked table, so that a change of registers, shared memory or instructions shows in the diff; a spill fails. Run it
without TRITON_INTERPRET: the switch is read when a kernel is decorated.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import NamedTuple

from memlens_kernels.tile import Tile

__all__ = ["TARGETS", "Row", "compile_tile", "modules", "report"]


class Limits(NamedTuple):
    backend: str
    arch: int | str
    warp: int
    shared: int  # bytes one program may hold
    shared_unit: int  # bytes of one multiprocessor
    registers: int  # 32-bit registers of one multiprocessor
    warps: int  # resident warps of one multiprocessor
    programs: int  # resident programs of one multiprocessor


# NVIDIA: CUDA C++ programming guide, table of technical specifications.
# AMD: CDNA3 ISA reference; four SIMDs of 512 registers for each of 64 lanes.
TARGETS = {
    "sm_80": Limits("cuda", 80, 32, 163 * 1024, 164 * 1024, 65536, 64, 32),
    "sm_90": Limits("cuda", 90, 32, 227 * 1024, 228 * 1024, 65536, 64, 32),
    "sm_100": Limits("cuda", 100, 32, 227 * 1024, 228 * 1024, 65536, 64, 32),
    "gfx942": Limits("hip", "gfx942", 64, 64 * 1024, 64 * 1024, 4 * 512 * 64, 32, 32),
}
MATRIX = re.compile(r"\b(HMMA|IMMA|HGMMA|IGMMA|QGMMA|UTC[A-Z]*MMA|v_mfma_\w+)\b")


class Row(NamedTuple):
    kernel: str
    tile: str
    target: str
    warps: int
    stages: int
    registers: int  # per thread
    spills: int  # NVIDIA: bytes per thread stored to local memory; AMD: vector registers spilled to scratch
    stack: int  # bytes per thread
    shared: int  # bytes per program
    matrix: int  # tensor-core instructions in the code
    occupancy: float  # resident warps over the most that fit, from registers and shared memory
    flops: int  # of one program
    bytes: int  # of one program
    intensity: float  # FLOP per byte
    at: str


def modules() -> list[str]:
    """The kernel modules: those that list their tiles."""
    found = [f"memlens_kernels.{item.name}" for item in iter_modules(import_module("memlens_kernels").__path__)]
    return [
        name for name in found if name not in (__name__, "memlens_kernels.report") and hasattr(import_module(name), "tiles")
    ]


def _nvidia(cubin: bytes) -> tuple[int, int, int, str]:
    """Registers, spill bytes, stack bytes and the disassembly of a cubin, by the tools that triton ships."""
    tools = Path(import_module("triton.backends.nvidia").__path__[0]) / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
        sass = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    fields = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout))
    widths = re.findall(r"\bSTL(?:\.\w+)*?(?:\.(64|128))?\s", sass)
    spills = sum(int(width or 32) // 8 for width in widths)
    return int(fields["REG"]), spills, int(fields["STACK"]), sass


def _amd(assembly: str) -> tuple[int, int, int, str]:
    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    return field("vgpr_count"), field("vgpr_spill_count"), field("private_segment_fixed_size"), assembly


def _occupancy(limits: Limits, registers: int, shared: int, warps: int) -> float:
    """Share of a multiprocessor's warps that can be resident; registers come in units of 8 a thread."""
    per_program = -(-registers // 8) * 8 * limits.warp * warps
    fit = [limits.programs, limits.warps // warps, limits.registers // max(1, per_program)]
    if shared:
        fit.append(limits.shared_unit // (shared + 1024))  # 1 KB of each program is the system's
    return min(fit) * warps / limits.warps


def compile_tile(tile: Tile, target: str) -> Row:
    """One row: the tile compiled for the target.

    Raises:
        RuntimeError: the interpreter is switched on, so there is nothing to compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("report: TRITON_INTERPRET=1 replaces the kernels by Python; unset it and run again")
    limits = TARGETS[target]
    hints = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(tile.signature) if name in tile.aligned}
    source = ASTSource(tile.kernel, tile.signature, tile.constants, hints)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    built = triton.compile(source, target=GPUTarget(limits.backend, limits.arch, limits.warp), options=options)
    read = _nvidia(built.asm["cubin"]) if limits.backend == "cuda" else _amd(built.asm["amdgcn"])
    registers, spills, stack, code = read
    shared = built.metadata.shared
    return Row(
        tile.kernel.__name__, tile.label, target, tile.warps, tile.stages, registers, spills, stack, shared,
        len(MATRIX.findall(code)), round(_occupancy(limits, registers, shared, tile.warps), 3), tile.flops, tile.bytes,
        round(tile.flops / tile.bytes, 2), tile.at,
    )  # fmt: skip


def _rows_of(job: tuple[str, int, str]) -> Row:
    module, index, target = job
    return compile_tile(import_module(module).tiles()[index], target)


def report(workers: int | None = None) -> list[Row]:
    """Every tile for every target, sorted."""
    jobs = [
        (name, index, target)
        for name in modules()
        for index, tile in enumerate(import_module(name).tiles())
        for target in tile.targets
    ]
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        return sorted(pool.map(_rows_of, jobs))


def faults(rows: list[Row]) -> Iterator[str]:
    """What must not be shipped: a spill, or more shared memory than one program may hold."""
    for row in rows:
        if row.spills:
            yield f"{row.kernel} [{row.tile}] {row.target}: {row.spills} bytes spilled, {row.registers} registers"
        if row.shared > TARGETS[row.target].shared:
            fit = TARGETS[row.target].shared
            yield f"{row.kernel} [{row.tile}] {row.target}: {row.shared} bytes of shared memory, {fit} fit"


def as_text(rows: list[Row]) -> str:
    lines = [",".join(Row._fields)]
    lines += [",".join(f'"{field}"' if "," in str(field) else str(field) for field in row) for row in rows]
    return "\n".join(lines) + "\n"


def main(path: Path, *, check: bool) -> int:
    rows = report()
    bad = list(faults(rows))
    text, old = as_text(rows), path.read_text(encoding="utf-8") if path.exists() else ""
    changed = sum(line not in old.splitlines() for line in text.splitlines()) if text != old else 0
    if text != old and not check:
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.write_text(text, encoding="utf-8", newline="\n")
        partial.replace(path)
    before = max(0, len(list(csv.reader(old.splitlines()))) - 1)
    print(f"{len(rows)} rows, {before} before, {changed} changed; {len(bad)} faults")
    for line in bad:
        print(f"  {line}")
    if check and text != old:
        print(f"  {path.name} is not current; run `make kernels` and look at the diff")
    return int(bool(bad) or (check and text != old))


if __name__ == "__main__":
    here = Path(__file__).resolve().parents[1] / "report.csv"
    raise SystemExit(main(here, check="--check" in sys.argv))
