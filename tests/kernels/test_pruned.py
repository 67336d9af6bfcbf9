"""The kernel over two layouts of keys, in the interpreter: against the reference, at odd sizes, with outputs full of NaN."""

import pytest
import torch

from memlens.kv.channels import attend_pruned, think

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("interpreted")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}


def tensors(generator, dtype, length, dim, value_dim, heads, kv_heads, rows):
    shapes = (heads, rows, dim), (kv_heads, length, dim), (kv_heads, length, value_dim)
    return [torch.randn(2, *shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "length, tail, dim, value_dim, heads, kv_heads, rows, lam",
    [
        (1, 0, 8, 8, 1, 1, 1, 0.4), (1, 5, 8, 8, 2, 2, 1, 0.4), (63, 31, 10, 6, 6, 2, 3, 0.4), (130, 0, 64, 64, 3, 1, 1, 0.4),
        (600, 33, 16, 24, 4, 2, 2, 0.9), (513, 32, 16, 16, 2, 1, 1, 0.0),
    ],
)  # fmt: skip
def test_it_gives_the_reference(length, tail, dim, value_dim, heads, kv_heads, rows, lam, dtype, generator, assert_close):
    q, k, v = tensors(generator, dtype, length, dim, value_dim, heads, kv_heads, rows)
    cp = think(k, q, lam, tail)
    got = attend_pruned(q, cp, v, form="triton")
    want = attend_pruned(
        q.float(), cp._replace(k_small=cp.k_small.float(), tail=cp.tail.float()), v.float(), form="reference"
    )
    assert got.out.dtype == dtype
    assert_close(got.out.float(), want.out, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert_close(got.lse, want.lse, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("span", [7, 40, 64])
def test_every_output_is_written_whatever_the_span(span, generator, assert_close):
    from memlens.attention.merge import merge_many
    from memlens_kernels.pruned import decode_pruned

    q, k, v = tensors(generator, torch.float32, 75, 12, 20, 2, 2, 5)
    cp = think(k, q, 0.3, 18)
    parts = -(-75 // span)
    out, lse = torch.full((parts, 2, 2, 5, 20), torch.nan), torch.full((parts, 2, 2, 5), torch.nan)
    got = decode_pruned(q, *cp, v, scale=12**-0.5, span=span, out=out, lse=lse)
    assert got[0] is out
    assert bool(out.isfinite().all())
    assert bool(lse.isfinite().all())
    whole = merge_many(list(zip(out, lse, strict=True)))
    assert_close(whole, attend_pruned(q, cp, v, form="reference"), rtol=2e-5, atol=2e-5)


def test_sizes_beyond_the_kernel_are_refused(generator):
    q, k, v = tensors(generator, torch.float32, 4, 8, 300, 2, 1, 1)
    with pytest.raises(ValueError, match="at most 256"):
        attend_pruned(q, think(k, q, 0.4, 1), v, form="triton")


def test_every_tile_names_all_arguments():
    from memlens_kernels.pruned import pruned_kernel, tiles

    for tile in tiles():
        assert list(tile.signature) == list(pruned_kernel.arg_names)
        assert {name for name, kind in tile.signature.items() if kind == "constexpr"} == set(tile.constants)
