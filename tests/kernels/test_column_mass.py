"""The column-mass kernels in the interpreter, against the reference and against torch's softmax."""

import pytest
import torch

from memlens.kv.score import column_mass

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("interpreted")
SIZES = [(1, 2, 2, 1, 1, 8), (2, 4, 2, 63, 63, 24), (1, 4, 1, 5, 130, 16), (1, 3, 3, 20, 77, 40), (1, 2, 1, 130, 130, 64)]
STATISTICS = [("sum", None), ("mean", None), ("max", None), ("last", None), ("count_above", 0.02), ("count_below", "1/t")]
MARGIN = {
    torch.float32: {},
    torch.float16: {"rtol": 1e-4, "atol": 1e-4},
}  # both sides read the same halves and sum in float32


def inputs(sizes, dtype, generator):
    batch, heads, kv_heads, rows, length, dim = sizes
    shapes = (heads, rows), (kv_heads, length)
    return [torch.randn(batch, h, n, dim, generator=generator).to(dtype) for h, n in shapes]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_statistic_gives_the_reference(sizes, dtype, generator, assert_close):
    q, k = inputs(sizes, dtype, generator)
    for reduce, threshold in STATISTICS:
        want, got = (
            column_mass(q, k, reduce=reduce, threshold=threshold, group="none", form=form)
            for form in ("reference", "triton")
        )
        if threshold is None:
            assert_close(got, want, **MARGIN[dtype])
        else:  # a probability within rounding of its threshold may fall on either side
            assert float((got - want).abs().max()) <= 1
            assert float((got != want).float().mean()) <= 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_padding_is_out_of_the_softmax(dtype, generator, assert_close):
    q, k = inputs((2, 4, 2, 40, 70, 16), dtype, generator)
    alive = torch.arange(70) >= torch.tensor([[0], [45]])  # the first rows of the second sequence see nothing
    for group in ("mean", "max", "sum"):
        want, got = (column_mass(q, k, alive=alive, group=group, form=form) for form in ("reference", "triton"))
        assert_close(got, want, **MARGIN[dtype])
        assert bool((got[1, :, :45] == 0).all())


def test_an_lse_from_the_forward_pass_is_used(generator, assert_close):
    q, k = inputs((1, 4, 2, 33, 50, 16), torch.float32, generator)
    lse = torch.randn(1, 4, 33, generator=generator) + 4
    want, got = (column_mass(q, k, lse=lse, form=form) for form in ("reference", "triton"))
    assert_close(got, want)
    assert float((got - column_mass(q, k)).abs().max()) > 0.01  # not the rows' own lse


def test_strided_inputs(generator, assert_close):
    q, k = inputs((2, 4, 2, 33, 50, 16), torch.float32, generator)
    odd = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    assert not odd[0].is_contiguous()
    assert_close(column_mass(*odd, form="triton"), column_mass(q, k, form="reference"))
    wide = [torch.stack((x, x), -1)[..., 0] for x in (q, k)]  # not even the last axis is dense
    assert_close(column_mass(*wide, form="triton"), column_mass(q, k, form="reference"))
