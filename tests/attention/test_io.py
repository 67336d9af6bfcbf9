"""The traffic formulas against loops that count, and the bound that the paper proves."""

import pytest
import torch

from memlens.attention.exact import attend
from memlens.attention.io import ALGORITHMS, attention_io, largest_tensor, traced

SIZES = [(64, 16, 1024), (100, 16, 999), (37, 8, 100), (128, 32, 4096), (96, 64, 20000), (50, 24, 3000)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_the_formula_is_what_the_loop_counts(size, algo, qkv, assert_close):
    n, d, sram = size
    q, k, v = (x[0, 0] for x in qkv(1, 1, 1, n, n, d, dtype=torch.float64))
    out, counted = traced(q, k, v, sram, algo)
    assert_close(out, attend(q[None, None], k[None, None], v[None, None], causal=False, form="reference")[0, 0])
    want = attention_io(n, d, sram, algo)
    assert counted == {name: want[name] for name in counted}


@pytest.mark.parametrize("algo", ["flash1", "flash2"])
def test_skipped_blocks_are_not_moved(algo, qkv, generator):
    q, k, v = (x[0, 0] for x in qkv(1, 1, 1, 64, 64, 16))
    visible = torch.zeros(4, 4, dtype=torch.bool)
    visible.view(-1)[torch.randperm(16, generator=generator)[:4]] = True
    _, counted = traced(q, k, v, 1024, algo, visible=visible)
    assert counted["total"] == attention_io(64, 16, 1024, algo, density=0.25)["total"]


def test_formulas_by_hand():
    assert attention_io(8, 2, 16, "standard")["total"] == 4 * 8 * 2 + 4 * 64
    plan = attention_io(8, 2, 16, "flash1")  # 2 keys a block, so 4 passes
    assert (plan["block_k"], plan["total"]) == (2, 2 * 16 + 4 * (3 * 16 + 32))
    assert attention_io(8, 2, 16, "flash2", block_q=4)["total"] == 2 * 16 + 8 + 2 * 2 * 16


def test_twice_the_fast_memory_halves_the_traffic_of_flash1():
    small, large = (attention_io(2**14, 64, sram, "flash1")["total"] for sram in (2**14, 2**15))
    assert small / large == pytest.approx(2, rel=0.02)


def test_the_largest_tensor_is_seen_in_both_directions():
    x = torch.ones(4, 5, requires_grad=True)
    assert largest_tensor(lambda: x.sum()) == 1
    assert largest_tensor(lambda: (x * 2).sum().backward()) == 20
    assert largest_tensor(lambda: x.repeat(3, 1)[:1]) == 60  # a view keeps its storage


def test_refusals():
    with pytest.raises(ValueError, match=r"did you mean 'flash"):
        attention_io(8, 2, 16, "flash3")
    with pytest.raises(ValueError, match=r"density=0.5 with standard"):
        attention_io(8, 2, 16, "standard", density=0.5)
    with pytest.raises(ValueError, match=r"sram=0"):
        attention_io(8, 2, 0, "flash1")
    x = torch.zeros(8, 2)
    with pytest.raises(ValueError, match=r"expected \(4, 4\) blocks"):
        traced(x, x, x, 16, "flash1", visible=torch.ones(2, 2, dtype=torch.bool))
