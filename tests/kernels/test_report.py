"""The compile report's arithmetic by hand, and that the stored table has a row for every tile and target."""

import csv
from importlib import import_module
from pathlib import Path

import pytest

from memlens_kernels import report
from memlens_kernels.tile import TARGETS

TABLE = Path(__file__).parents[2] / "kernels" / "report.csv"
ROW = report.Row("k", "fp16 D64", "sm_80", 4, 2, 128, 0, 0, 65536, 32, 0.125, 1000, 100, 10.0, "length 4096")


def test_a_spill_or_too_much_shared_memory_is_a_fault():
    assert list(report.faults([ROW])) == []
    (spilled,) = report.faults([ROW._replace(spills=16)])
    assert "16 bytes spilled" in spilled
    (large,) = report.faults([ROW._replace(shared=164 * 1024)])
    assert "166912 fit" in large


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [
        (128, 0, 4, 16 / 64),  # 65536 / (128 * 128) = 4 programs of 4 warps
        (32, 0, 4, 1.0),  # 16 programs of 4 warps are all 64
        (32, 81 * 1024, 4, 8 / 64),  # 164 / 82 = 2 programs
        (32, 0, 1, 32 / 64),  # at most 32 programs
        (129, 0, 8, 8 / 64),  # rounded up to 136: 65536 / (136 * 256) = 1
    ],
)
def test_occupancy_by_hand(registers, shared, warps, expected):
    assert report._occupancy(report.TARGETS["sm_80"], registers, shared, warps) == expected


def test_every_tile_has_its_rows():
    stored = {(row["kernel"], row["tile"], row["target"]) for row in csv.DictReader(TABLE.open(encoding="utf-8"))}
    shipped = set()
    for name in report.modules():
        for tile in import_module(name).tiles():
            shipped |= {(tile.kernel.__name__, tile.label, target) for target in tile.targets}
            assert set(tile.targets) <= set(TARGETS)
            assert tile.flops > 0
            assert tile.bytes > 0
    assert shipped == stored


def test_the_interpreter_cannot_be_compiled(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset it"):
        report.compile_tile(None, "sm_80")
