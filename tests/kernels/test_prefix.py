"""The fused prefix and private decoding kernel in the interpreter, against attention over the joined keys."""

import pytest
import torch

from memlens.attention.exact import attend
from memlens.attention.prefix import prefix_attend

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("interpreted")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
HALF = {"rtol": 2e-3, "atol": 2e-3}  # weights are rounded to half before they meet the values
# requests, heads, kv heads, new tokens, prefix, own, dim, value dim
SIZES = [
    (1, 1, 1, 1, 1, 1, 8, 8), (3, 6, 2, 1, 65, 7, 24, 40), (5, 4, 1, 3, 17, 33, 16, 16), (2, 9, 3, 2, 1030, 600, 16, 32),
    (30, 2, 2, 1, 40, 5, 16, 16), (2, 4, 2, 1, 0, 9, 16, 16), (2, 8, 1, 8, 20, 8, 16, 16),
]  # fmt: skip


@pytest.fixture
def launches(monkeypatch):
    from memlens_kernels import prefix

    seen, real = [], prefix.prefix_parts
    monkeypatch.setattr(prefix, "prefix_parts", lambda *args, **options: seen.append(1) or real(*args, **options))
    return seen


def inputs(sizes, dtype, generator):
    requests, heads, kv_heads, fresh, pre, own, dim, value_dim = sizes
    shapes = [
        (kv_heads, pre, dim),
        (kv_heads, pre, value_dim),
        (requests, kv_heads, own, dim),
        (requests, kv_heads, own, value_dim),
    ]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((requests, heads, fresh, dim), *shapes)]


def joined(q, k_pre, v_pre, k_own, v_own, own_mask=None, **options):
    """The definition: every request attends to a copy of the prefix and its own keys."""
    requests, pre = len(q), k_pre.shape[1]
    k, v = (torch.cat((x.expand(requests, *x.shape), y), 2) for x, y in ((k_pre, k_own), (v_pre, v_own)))
    mask = None if own_mask is None else torch.cat((own_mask.new_ones(requests, pre), own_mask), 1)[:, None, None]
    return attend(q, k, v, mask=mask, return_lse=True, form="reference", **options)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@DTYPES
def test_it_is_attention_over_the_joined_keys(sizes, dtype, generator, assert_close, launches):
    given = inputs(sizes, dtype, generator)
    got, want = prefix_attend(*given, scale=0.4, return_lse=True, form="triton"), joined(*given, scale=0.4)
    assert launches == [1]
    assert_close(got.out, want.out, **({} if dtype == torch.float32 else HALF))
    assert_close(got.lse, want.lse, **({} if dtype == torch.float32 else {"rtol": 1e-4, "atol": 1e-4}))


@DTYPES
def test_padding_among_the_own_keys(dtype, generator, assert_close, launches):
    q, k_pre, v_pre, k_own, v_own = inputs((3, 4, 2, 1, 20, 530, 16, 16), dtype, generator)
    mask = torch.arange(530) >= torch.tensor([[0], [3], [529]])
    k_own, v_own = (torch.where(mask[:, None, :, None], x, 500.0) for x in (k_own, v_own))
    for pre in (20, 0):
        given = q, k_pre[:, :pre], v_pre[:, :pre], k_own, v_own
        got = prefix_attend(*given, own_mask=mask, return_lse=True, form="triton")
        want = joined(*given, own_mask=mask)
        assert_close(got.out, want.out, **({} if dtype == torch.float32 else HALF))
        assert_close(got.lse, want.lse, **({} if dtype == torch.float32 else {"rtol": 1e-4, "atol": 1e-4}))
    assert launches == [1, 1]


@pytest.mark.parametrize("span", [64, 128])
def test_every_part_is_written(span, generator, assert_close):
    from memlens.attention.merge import merge_many
    from memlens_kernels.prefix import prefix_parts

    q, *rest = inputs((3, 2, 2, 1, 200, 130, 16, 16), torch.float32, generator)
    rows = q.transpose(0, 1).contiguous()
    outs, lses = prefix_parts(rows, *rest, fresh=1, alive=None, scale=0.25, span=span)
    assert len(outs) == -(-200 // span) + -(-130 // span)
    assert not bool(outs.isnan().any() | lses.isnan().any())
    out, lse = merge_many(list(zip(outs, lses, strict=True)))
    assert_close((out.transpose(0, 1), lse.transpose(0, 1)), joined(q, *rest, scale=0.25))


def test_strides_gradients_and_many_rows(generator, assert_close, launches):
    given = inputs((2, 4, 2, 2, 11, 9, 16, 16), torch.float32, generator)
    columns = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in given]
    assert_close(prefix_attend(*columns, form="triton"), joined(*given).out)
    assert launches == [1]
    leaf = given[0].clone().requires_grad_()
    prefix_attend(leaf, *given[1:], form="triton").sum().backward()  # by the kernels that have a backward
    assert leaf.grad is not None
    many = inputs((2, 8, 1, 9, 11, 9, 16, 16), torch.float32, generator)
    assert_close(prefix_attend(*many, form="triton"), joined(*many).out)
    assert launches == [1]


def test_bad_calls_are_refused(generator):
    given = inputs((2, 4, 2, 2, 11, 9, 16, 16), torch.float32, generator)
    with pytest.raises(TypeError, match="bool"):
        prefix_attend(*given, own_mask=torch.ones(2, 9), form="triton")
    with pytest.raises(ValueError, match="own=1"):
        prefix_attend(*given[:3], *(x[:, :, :1] for x in given[3:]), form="triton")
    with pytest.raises(ValueError, match="no multiple of kv_heads"):
        prefix_attend(given[0][:, :3], *given[1:], form="triton")


def test_the_tiles_name_every_argument():
    from memlens_kernels.prefix import tiles

    labels = [tile.label for tile in tiles()]
    assert len(set(labels)) == len(labels)
    for tile in tiles():
        assert list(tile.signature) == list(tile.kernel.arg_names)
        assert set(tile.constants) == {name for name, kind in tile.signature.items() if kind == "constexpr"}
