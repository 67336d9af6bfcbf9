"""The nearest-key kernel in the interpreter, against the reference and against torch's cosine."""

import pytest
import torch

from memlens.kv.merge import nearest_by_cosine

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("interpreted")
SIZES = [(1, 1, 1, 1, 8), (2, 2, 63, 5, 24), (1, 3, 7, 130, 16), (1, 1, 130, 77, 40), (2, 1, 17, 33, 128)]


def keys(sizes, dtype, generator):
    batch, heads, evicted, kept, dim = sizes
    return [torch.randn(batch, heads, n, dim, generator=generator).to(dtype) for n in (evicted, kept)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_is_torchs_cosine(sizes, dtype, generator, assert_close):
    gone, keep = keys(sizes, dtype, generator)
    table = torch.cosine_similarity(gone.float()[:, :, :, None], keep.float()[:, :, None], dim=-1)
    for form in ("triton", "torch", "reference"):
        assign, sim = nearest_by_cosine(gone, keep, form=form)
        assert assign.dtype == torch.int64
        assert_close(sim, table.amax(-1))
        assert_close(table.gather(-1, assign[..., None])[..., 0], table.amax(-1))  # one as near, where two are
        clear = table.topk(min(2, table.shape[-1]), -1).values
        clear = (clear[..., 0] - clear[..., -1] > 1e-5) | (table.shape[-1] == 1)
        assert torch.equal(assign[clear], table.argmax(-1)[clear])


def test_ties_zeros_and_strides(generator):
    keep = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, -1.0]]).repeat(20, 1)[None, None]
    gone = torch.tensor([[[[3.0, 0.0], [0.0, 0.0], [0.0, 5.0]]]])
    for at in (slice(None), slice(0, 4)):
        assign, sim = nearest_by_cosine(gone, keep[:, :, at], form="triton")
        assert assign[0, 0].tolist() == [1, 0, 1]
        assert sim[0, 0].tolist() == [1.0, -1.0, 0.0]
    gone, keep = keys((1, 2, 20, 9, 16), torch.float32, generator)
    turned = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (gone, keep)]
    for one, two in zip(
        nearest_by_cosine(*turned, form="triton"), nearest_by_cosine(gone, keep, form="torch"), strict=True
    ):
        torch.testing.assert_close(one, two)
    assert nearest_by_cosine(gone[:, :, :0], keep, form="triton")[0].shape == (1, 2, 0)
