"""The packing and the packed-attention kernels in the interpreter, against the torch forms and plain attention."""

import pytest
import torch

from memlens.attention.exact import attend
from memlens.kv.kivi import kivi, kivi_attend
from memlens.kv.mikv import mixed
from memlens.kv.packed import packed_attend
from memlens.kv.quantize import affine_quantize, dequantize
from memlens.quant.core import container

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("interpreted")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])


def words(p):
    from memlens_kernels.packed import Words

    return Words(*p[:3], container(p.bits), p.axis, p.group)


@pytest.mark.parametrize("meta", [torch.float32, torch.float16])
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@DTYPES
def test_packing_gives_the_torch_form_bit_for_bit(dtype, bits, axis, meta, generator):
    x = torch.randn(1, 2, 64, 96, generator=generator) * 3
    x[:, 1, :, :32] += 40.0
    x[:, :, 32:, 32:64] = 0.5  # constant groups, either way
    x = x.to(dtype)
    one, two = (affine_quantize(x, bits, axis=axis, group=32, meta=meta, form=form) for form in ("torch", "triton"))
    assert all(torch.equal(a, b) for a, b in zip(one[:3], two[:3], strict=True))


@pytest.mark.parametrize(
    "shape, axis", [((1, 1, 1, 32), -1), ((1, 3, 33, 64), -1), ((2, 1, 64, 1), -2), ((1, 2, 32, 80), -2)]
)
def test_packing_writes_every_output_and_nothing_beside_it(shape, axis, generator):
    from memlens_kernels.packed import pack_buffers, quantize_pack

    x = torch.randn(shape, generator=generator)
    buffers = pack_buffers(x, 2, axis, 32, torch.float16)
    room = [torch.full((b.numel() + 64,), 77 if b.dtype == torch.int32 else torch.nan, dtype=b.dtype) for b in buffers]
    out = tuple(r[: b.numel()].view(b.shape) for r, b in zip(room, buffers, strict=True))
    quantize_pack(x, bits=2, levels=3, axis=axis, group=32, meta=torch.float16, out=out)
    want = affine_quantize(x, 2, axis=axis, group=32, meta=torch.float16, form="torch")
    assert all(torch.equal(a, b) for a, b in zip(out, want[:3], strict=True))
    for r, b in zip(room, buffers, strict=True):
        assert (r[b.numel() :] == 77).all() if b.dtype == torch.int32 else r[b.numel() :].isnan().all()


@pytest.mark.parametrize(
    "key_bits, value_bits, axis", [(2, 2, -2), (4, 8, -2), (8, 1, -2), (1, 4, -1), (2, 4, -1), (8, 2, -1)]
)
@pytest.mark.parametrize("dim, value_dim, group", [(64, 32, 32), (48, 48, 16)])
@DTYPES
def test_decode_is_attention_over_what_was_packed(
    dtype, key_bits, value_bits, axis, dim, value_dim, group, generator, assert_close
):
    if group * min(key_bits if axis == -1 else 32, value_bits) % 32:
        pytest.skip("a group that does not fill a word is refused, see below")
    q, k, v, tokens = packed_case(dtype, key_bits, value_bits, axis, dim, value_dim, group, generator)
    got = packed_attend(q, k, v, tokens=tokens, form="triton")
    keys, values = dequantize(k, dtype)[:, :, :tokens], dequantize(v, dtype)[:, :, :tokens]
    assert_close(got, attend(q, keys, values, causal=False, return_lse=True), **({} if dtype == torch.float32 else HALF))


HALF = {"rtol": 5e-3, "atol": 5e-3}  # the scales go into q before the product, which is one more rounding


def packed_case(dtype, key_bits, value_bits, axis, dim, value_dim, group, generator):
    q = torch.randn(2, 6, 1, dim, generator=generator).to(dtype)
    k, v = (torch.randn(2, 2, 96, d, generator=generator).to(dtype) for d in (dim, value_dim))
    keys = affine_quantize(k, key_bits, axis=axis, group=group, meta=torch.float16)
    return q, keys, affine_quantize(v, value_bits, axis=-1, group=group, meta=torch.float16), 83


@pytest.mark.parametrize("tokens, span", [(1, 128), (128, 128), (129, 128), (300, 128), (300, 512)])
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_spans_are_merged_and_every_output_is_written(tokens, span, rows, generator, assert_close):
    from memlens.attention.merge import merge_many
    from memlens_kernels.packed import decode_packed

    q = torch.randn(2, 2, rows, 32, generator=generator)
    k, v = (torch.randn(2, 2, 320, 32, generator=generator) for _ in range(2))
    k, v = affine_quantize(k, 4, axis=-2, group=32), affine_quantize(v, 4, axis=-1, group=32)
    parts = -(-320 // span)
    out, lse = torch.full((parts, 2, 2, rows, 32), torch.nan), torch.full((parts, 2, 2, rows), torch.nan)
    decode_packed(q, words(k), words(v), tokens=tokens, scale=0.3, span=span, out=out, lse=lse)
    assert not bool(out.isnan().any() | lse.isnan().any())
    assert bool((lse[-(-tokens // span) :] == -torch.inf).all())
    want = attend(q, dequantize(k)[:, :, :tokens], dequantize(v)[:, :, :tokens], causal=False, scale=0.3, return_lse=True)
    assert_close(merge_many(list(zip(out, lse, strict=True))), want)


@DTYPES
def test_holes_and_values_in_another_order(dtype, generator, assert_close):
    q, k, v, _ = packed_case(dtype, 2, 2, -2, 64, 64, 32, generator)
    rank = torch.stack([torch.randperm(96, generator=generator) for _ in range(4)]).view(2, 2, 96).to(torch.int32)
    rank = torch.where(rank < 70, rank, -1)
    rank[0, 0, :5] = 500  # beyond the values: not there either
    count = int((rank[0, 0] >= 0).sum())
    got = packed_attend(q, k, v, tokens=70, rank=rank, form="triton")
    assert_close(
        got, packed_attend(q, k, v, tokens=70, rank=rank, form="torch"), **({} if dtype == torch.float32 else HALF)
    )
    assert count >= 60


@DTYPES
@pytest.mark.parametrize("axis, span", [(-2, 128), (-1, 512)])
@pytest.mark.parametrize("holes", [False, True])
def test_what_each_token_got_comes_out_of_the_same_pass(dtype, axis, span, holes, generator, assert_close):
    q, k, v, tokens = packed_case(dtype, 4, 4, axis, 64, 64, 32, generator)
    rank = None
    if holes:
        rank = torch.stack([torch.randperm(96, generator=generator) for _ in range(4)]).view(2, 2, 96).to(torch.int32)
        rank[0, 0, :5] = 500  # beyond the values: not there
    rest = tuple(torch.randn(2, 2, 5, 64, generator=generator).to(dtype) for _ in "kv")
    options, slack = {"rank": rank, "rest": rest, "tally": True}, {} if dtype == torch.float32 else HALF
    got = packed_attend(q, k, v, tokens=tokens, form="triton", **options)
    assert got.score.shape == (2, 6, tokens + 5)
    assert_close(got, packed_attend(q, k, v, tokens=tokens, form="reference", **options), **slack)


def test_every_score_is_written_and_an_empty_slot_is_minus_infinity(generator, assert_close):
    from memlens_kernels.packed import decode_packed, score_buffer

    q = torch.randn(2, 2, 3, 32, generator=generator)
    k, v = (torch.randn(2, 2, 320, 32, generator=generator) for _ in range(2))
    k, v = affine_quantize(k, 4, axis=-2, group=32), affine_quantize(v, 4, axis=-1, group=32)
    scores = score_buffer(q, words(k)).fill_(torch.nan)
    decode_packed(q, words(k), words(v), tokens=300, scale=0.3, span=128, scores=scores)
    assert_close(scores[..., :300], 0.3 * q @ dequantize(k)[:, :, :300].mT)
    assert bool((scores[..., 300:] == -torch.inf).all())


@DTYPES
@pytest.mark.parametrize("length", [20, 64, 131])
def test_kivi_and_mikv_attend_through_the_kernel(dtype, length, generator, assert_close):
    q = torch.randn(1, 6, 2, 64, generator=generator).to(dtype)
    k, v = (torch.randn(1, 2, length, 64, generator=generator).to(dtype) for _ in range(2))
    slack = {} if dtype == torch.float32 else HALF
    state = kivi(2, group=32, residual=32).commit(None, k, v)
    assert_close(kivi_attend(q, state, form="triton"), kivi_attend(q, state, form="reference"), **slack)
    fmt = mixed(0.2, hi=8, lo=2)
    held = fmt.commit(None, k, v, score=torch.rand(1, 2, length, generator=generator), query_peak=q.abs().amax(2)[:, :2])
    assert_close(fmt.attend(q, held, form="triton"), fmt.attend(q, held, form="reference"), **slack)


def test_a_state_with_holes_attends_through_the_kernel(generator, assert_close):
    fmt, q = kivi(4, group=16, residual=32), torch.randn(1, 4, 1, 32, generator=generator)
    k, v = (torch.randn(1, 2, 121, 32, generator=generator) for _ in range(2))
    held = fmt.commit(None, k[:, :, :120], v[:, :, :120])
    idx = torch.rand(1, 2, 121, generator=generator).topk(100, -1).indices.sort(-1).values
    held = fmt.commit(held, k[:, :, 120:], v[:, :, 120:], idx)
    assert held.k.slots is not None
    assert_close(kivi_attend(q, held, form="triton"), kivi_attend(q, held, form="reference"))


def test_what_the_kernel_does_not_take_is_refused(generator):
    q, k, v, _ = packed_case(torch.float32, 2, 2, -2, 64, 64, 32, generator)
    with pytest.raises(ValueError, match="grouped along the tokens"):
        packed_attend(q, k, k, form="triton")
    small = affine_quantize(torch.randn(2, 2, 96, 64, generator=generator), 2, axis=-2, group=8)
    with pytest.raises(ValueError, match="groups of 8 tokens.*form='torch'"):
        packed_attend(q, small, v, form="triton")
    odd = affine_quantize(torch.randn(2, 2, 96, 48, generator=generator), 2, axis=-1, group=24)
    with pytest.raises(ValueError, match="groups of 24 channels"):
        packed_attend(q, k, odd, form="triton")
    with pytest.raises(ValueError, match="the kernel of affine_quantize does not take this call"):
        affine_quantize(torch.zeros(1, 1, 8, 8), 2, axis=-1, group=8, form="triton")


def test_the_tiles_name_every_argument():
    from memlens_kernels.packed import tiles

    labels = [tile.label for tile in tiles()]
    assert len(set(labels)) == len(labels)
    for tile in tiles():
        assert list(tile.signature) == list(tile.kernel.arg_names)
        assert set(tile.constants) == {name for name, kind in tile.signature.items() if kind == "constexpr"}
        assert tile.bytes > 0 < tile.flops
