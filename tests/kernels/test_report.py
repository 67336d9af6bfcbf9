"""The compile report's arithmetic by hand, and that the stored table has a row for every tile and target."""

import csv
from importlib import import_module
from itertools import product
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


def attention_picks():
    """(kernel, width, block_q, block_k, warps, stages, dim, causal, mask, target) of what the attention launchers take.

    A tile does not depend on `causal`: under a mask it is compiled without, over blocks with it.
    """
    from memlens_kernels.attention import MAX_DIM, block_dim
    from memlens_kernels.attention_config import config

    dims = {max(64, block_dim(dim)) for dim in range(1, MAX_DIM + 1)}  # a smaller dim has the tile of 64
    calls = ((True, False), (False, False), (False, True))
    for name, dim, width, (causal, mask), on in product(("forward", "dkdv", "dq"), dims, (2, 4), calls, TARGETS):
        picked = config(name, dim, width, on, masked=mask)
        yield f"{name}_kernel", width, *picked, dim, causal, mask, on
        if causal:
            shrunk = picked._replace(block_q=min(64, picked.block_q), block_k=min(64, picked.block_k))
            yield f"block_{name}_kernel", width, *shrunk, dim, causal, mask, on


def linear_picks():
    """(kernel, width, chunk, value block, warps, dim, decay, delta, target) of every call with long chunks and wide values."""
    from memlens_kernels.linear import DTYPES, MAX_KEY, grads_plan, max_key, plan

    sizes = product(("fp32", "bf16"), (64, MAX_KEY), (0, 1, 2), (False, True), TARGETS)
    for dtype, dim, decay, delta, on in sizes:
        if dim > max_key(channel=decay == 2, dtype=DTYPES[dtype]):
            continue
        p = plan(dim, dim, channel=decay == 2, dtype=DTYPES[dtype])
        wide = grads_plan(p, key_dim=dim, dtype=DTYPES[dtype], delta=delta, hip=on == "gfx942")
        of = dict.fromkeys(("states", "d_states"), (p, delta)) | dict.fromkeys(("read", "written"), (p, None))
        for name, (tile, rule) in (of | {"grads": (wide, delta)}).items():
            yield f"{name}_kernel", 4 if dtype == "fp32" else 2, *tile, dim, decay, rule, on


def compiled(tile):
    """An attention or linear tile as `attention_picks` and `linear_picks` name it, for each of its targets."""
    c, width = tile.constants, 4 if "*fp32" in (tile.signature.get("q"), tile.signature.get("k")) else 2
    if "CAUSAL" in c and "BLOCK_K" in c:
        named = c["BLOCK_Q"], c["BLOCK_K"], tile.warps, tile.stages, c["DIM"], c["CAUSAL"], c.get("MASK", False)
    elif "DECAY" in c:
        named = c["C"], c["BV"], tile.warps, c["KEY"], c["DECAY"], c.get("DELTA")
    else:
        return set()
    return {(tile.kernel.__name__, width, *named, on) for on in tile.targets}


def test_every_tile_has_its_rows():
    stored = {(row["kernel"], row["tile"], row["target"]) for row in csv.DictReader(TABLE.open(encoding="utf-8"))}
    shipped, named = set(), set()
    for name in report.modules():
        for tile in import_module(name).tiles():
            shipped |= {(tile.kernel.__name__, tile.label, target) for target in tile.targets}
            named |= compiled(tile)
            assert set(tile.targets) <= set(TARGETS)
            assert tile.flops > 0
            assert tile.bytes > 0
    assert shipped == stored
    assert {*attention_picks(), *linear_picks()} <= named


def test_the_interpreter_cannot_be_compiled(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset it"):
        report.compile_tile(None, "sm_80")
