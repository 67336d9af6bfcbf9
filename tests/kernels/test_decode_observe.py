"""The decoding kernels that observe, in the interpreter, against attention and `column_mass`."""

import pytest
import torch

from memlens.kv.observe import decode_observe

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("interpreted")
SIZES = [(1, 2, 2, 1, 8, 8), (2, 6, 2, 63, 24, 40), (1, 4, 1, 130, 16, 16), (1, 9, 3, 77, 64, 64), (1, 3, 1, 1030, 32, 16)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
HALF = {"rtol": 2e-3, "atol": 2e-3}  # weights are rounded to half before they meet the values


def inputs(sizes, dtype, generator):
    batch, heads, kv_heads, length, dim, value_dim = sizes
    shapes = (heads, 1, dim), (kv_heads, length, dim), (kv_heads, length, value_dim)
    return [torch.randn(batch, *shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("group", ["mean", "max", "sum", "none"])
@DTYPES
def test_the_kernel_gives_the_reference(sizes, group, dtype, generator, assert_close):
    q, k, v = inputs(sizes, dtype, generator)
    shape = (sizes[0], sizes[1] if group == "none" else sizes[2], sizes[3])
    score = torch.rand(shape, generator=generator)
    kept = score.clone()
    for before in (None, score):
        got, want = (decode_observe(q, k, v, before, group=group, form=form) for form in ("triton", "reference"))
        assert_close(got.out, want.out, **({} if dtype == torch.float32 else HALF))
        assert_close(got[1:], want[1:], **({} if dtype == torch.float32 else {"rtol": 1e-4, "atol": 1e-4}))
    assert torch.equal(score, kept)  # the caller's own is left as it was


@DTYPES
def test_keys_that_are_not_alive_get_nothing(dtype, generator, assert_close):
    q, k, v = inputs((3, 4, 2, 600, 16, 16), dtype, generator)
    alive = torch.arange(600) >= torch.tensor([0, 530, 600])[:, None, None]  # a whole span dead, and a row of padding alone
    alive = alive.expand(3, 2, 600)
    k, v = (torch.where(alive[..., None], x, 1000.0) for x in (k, v))
    got, want = (decode_observe(q, k, v, alive=alive, form=form) for form in ("triton", "reference"))
    assert_close(got.out, want.out, **({} if dtype == torch.float32 else HALF))
    assert_close(got[1:], want[1:], **({} if dtype == torch.float32 else {"rtol": 1e-4, "atol": 1e-4}))
    assert not bool(got.score[~alive].any())
    assert not bool(got.out[2].any())
    assert bool((got.lse[2] == -torch.inf).all())


@pytest.mark.parametrize("length, span", [(1, 64), (64, 64), (65, 64), (200, 128)])
def test_every_part_is_written_and_the_scores_once(length, span, generator, assert_close):
    from memlens.attention.exact import attend
    from memlens.attention.merge import merge_many
    from memlens_kernels.decode_observe import decode_parts

    q, k, v = inputs((2, 2, 2, length, 24, 24), torch.float32, generator)
    outs, lses, scores = decode_parts(q, k, v, alive=None, scale=0.3, span=span)
    assert len(outs) == -(-length // span)
    assert not any(bool(x.isnan().any()) for x in (outs, lses, scores))
    assert_close(scores, 0.3 * q @ k.transpose(-1, -2))
    assert_close(merge_many(list(zip(outs, lses, strict=True))), attend(q, k, v, scale=0.3, return_lse=True))


def test_strides_do_not_matter(generator, assert_close):
    q, k, v = inputs((2, 4, 2, 33, 16, 16), torch.float32, generator)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    columns = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
    want = decode_observe(q, k, v, form="torch")
    assert_close(decode_observe(*turned, form="triton"), want)
    assert_close(decode_observe(*columns, form="triton"), want)


def test_the_tiles_name_every_argument():
    from memlens_kernels.decode_observe import tiles

    labels = [tile.label for tile in tiles()]
    assert len(set(labels)) == len(labels)
    for tile in tiles():
        assert list(tile.signature) == list(tile.kernel.arg_names)
        assert set(tile.constants) == {name for name, kind in tile.signature.items() if kind == "constexpr"}
