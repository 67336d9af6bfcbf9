"""Exact attention: the reference against softmax written out, every form against the reference, then what must hold."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from memlens import backend
from memlens.attention import fused, tiled
from memlens.attention.exact import attend
from memlens.attention.io import largest_tensor
from memlens.attention.merge import merge

FAST = pytest.mark.parametrize("form", ["fused", "tiles"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
SHAPES = {  # batch, heads, kv heads, q_len, k_len, dim, value_dim
    "one": (2, 2, 2, 1, 1, 40, 40),
    "odd": (2, 4, 2, 17, 17, 64, 64),
    "long": (1, 2, 1, 130, 257, 40, 24),
    "decode": (1, 4, 2, 1, 130, 64, 64),
    "more queries": (1, 2, 2, 40, 23, 8, 16),
}
CALLS = {
    "causal": {},
    "full": {"causal": False},
    "offset 0": {"q_offset": 0},
    "offset behind": {"q_offset": -3},
    "offset far": {"q_offset": 1000},
    "scaled": {"scale": 0.3},
    "mask": {"mask": "random"},
    "padding": {"mask": "keys", "causal": False},
    "empty rows": {"mask": "rows"},
    "bias": {"bias": "full"},
    "bias of a key": {"bias": "keys", "causal": False},
}


@pytest.fixture
def fast(monkeypatch):
    """`fast(form)`: attend in the torch form, by the fused operator or by the tiles."""

    def pick(form):
        if form == "tiles":
            monkeypatch.setattr(fused, "serves", lambda *tensors: False)
            monkeypatch.setattr(tiled, "ROWS", 32)
            monkeypatch.setattr(tiled, "KEYS", 48)
        else:
            monkeypatch.setattr(fused, "ROWS", 32)
        return partial(attend, form="torch")

    return pick


def options(name, shape, generator):
    """The keyword arguments of a call, its words turned into tensors, and the bias apart."""
    (batch, heads, _, q_len, k_len, *_), given = shape, dict(CALLS[name])
    masks = {"random": (batch, heads, q_len, k_len), "keys": (1, 1, 1, k_len), "rows": (q_len, 1)}
    if "mask" in given:
        given["mask"] = torch.rand(masks[given["mask"]], generator=generator) < 0.6
    bias = given.pop("bias", None)
    return given, [] if bias is None else [torch.randn((1, heads, q_len, k_len) if bias == "full" else (k_len,))]


def with_bias(fn, **given):
    return lambda q, k, v, *bias: fn(q, k, v, bias=bias[0] if bias else None, return_lse=True, **given)


def written_out(q, k, v, *, causal=True, mask=None, bias=None, scale=None, q_offset=None, return_lse=True):
    """Softmax attention in five lines of torch with the whole matrix; NaN where a row is empty."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale) + (0 if bias is None else bias)
    offset = k.shape[2] - q.shape[2] if q_offset is None else q_offset
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(offset) if causal else torch.tensor(True)
    scores = scores.masked_fill(~(seen if mask is None else seen & mask), -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("call", CALLS)
def test_reference_is_softmax_written_out(shape, call, qkv, through, generator, assert_close):
    inputs = qkv(*SHAPES[shape], dtype=torch.float64)
    given, bias = options(call, SHAPES[shape], generator)
    inputs += [x.double() for x in bias]
    got = through(with_bias(attend, form="reference", **given), *inputs)
    want = with_bias(written_out, **given)(*inputs)
    whole = want[0].isfinite().all(-1)
    assert_close(got[0][whole], want[0][whole])
    assert_close(got[1], want[1])
    if whole.all():
        assert_close(got, through(with_bias(written_out, **given), *inputs))


@FAST
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("call", CALLS)
def test_torch_form_is_the_reference(form, shape, call, qkv, through, generator, assert_close, fast):
    inputs = qkv(*SHAPES[shape], dtype=torch.float64)
    given, bias = options(call, SHAPES[shape], generator)
    inputs += [x.double() for x in bias]
    want = through(with_bias(attend, form="reference", **given), *inputs)
    assert_close(through(with_bias(fast(form), **given), *inputs), want)


@FAST
@pytest.mark.parametrize("length", [1, 17, 130, 257])
@pytest.mark.parametrize("dim", [40, 64])
def test_float32_is_near_float64(form, length, dim, qkv, through, fast):
    inputs = qkv(1, 4, 2, length, length, dim)
    got = through(with_bias(fast(form)), *inputs)
    want = through(with_bias(attend, form="reference"), *(x.double() for x in inputs))
    for one, other in zip(got, want, strict=True):
        assert (one - other).abs().max() < 2e-5


@FAST
@DTYPES
def test_half_precision_is_no_worse_than_sdpa(form, dtype, qkv, fast):
    q, k, v = qkv(1, 4, 4, 130, 130, 64, dtype=dtype)
    truth = attend(*(x.double() for x in (q, k, v)), form="reference")
    out, lse = fast(form)(q, k, v, return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    peer = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert (out - truth).abs().mean() <= 1.5 * (peer - truth).abs().mean()


@pytest.mark.parametrize("form", ["reference", "torch"])
@pytest.mark.parametrize("call", ["causal", "mask", "empty rows", "bias"])
def test_gradcheck(form, call, qkv, generator):
    shape = (1, 2, 1, 5, 7, 4, 3)
    given, bias = options(call, shape, generator)
    leaves = [x.double().requires_grad_() for x in (*qkv(*shape), *bias)]

    def fn(*inputs):
        out, lse = with_bias(attend, form=form, **given)(*inputs)
        return out, lse[lse > -torch.inf]

    assert torch.autograd.gradcheck(fn, leaves)


@pytest.mark.parametrize("form", ["reference", "fused", "tiles"])
def test_an_empty_row_gives_nothing(form, qkv, fast):
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 2, 6, 6, 8))
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[3] = False
    fn = partial(attend, form="reference") if form == "reference" else fast(form)
    out, lse = fn(q, k, v, mask=mask, return_lse=True)
    assert (out[:, :, 3] == 0).all()
    assert (lse[:, :, 3] == -torch.inf).all()
    grads = torch.autograd.grad(out[:, :, 3].sum() + lse[:, :, 3].sum(), (q, k, v))
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("form", ["reference", "torch"])
def test_no_keys_and_no_queries(form, qkv):
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 1, 3, 0, 4))
    out, lse = attend(q, k, v, form=form, return_lse=True)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    assert torch.autograd.grad(out.sum(), q)[0].abs().sum() == 0
    assert attend(*qkv(1, 2, 1, 0, 5, 4), form=form).shape == (1, 2, 0, 4)


@FAST
@pytest.mark.parametrize("split", [1, 64, 129])
def test_keys_split_anywhere_and_merged_are_the_whole(form, split, qkv, through, assert_close, fast):
    fn = fast(form)

    def parts(q, k, v):
        left = fn(q, k[:, :, :split], v[:, :, :split], q_offset=0, return_lse=True)
        right = fn(q, k[:, :, split:], v[:, :, split:], q_offset=-split, return_lse=True)
        return merge(*left, *right)

    inputs = qkv(1, 4, 2, 130, 130, 40)
    assert_close(through(parts, *inputs), through(partial(fn, q_offset=0, return_lse=True), *inputs))


@FAST
def test_probabilities_sum_to_one(form, qkv, assert_close, fast):
    q, k, _ = qkv(1, 2, 2, 33, 33, 16)
    values = torch.eye(33).expand(1, 2, 33, 33)
    shares, lse = fast(form)(q, k, values, return_lse=True)  # row i of the output is row i of the probabilities
    assert_close(shares.sum(-1), torch.ones(1, 2, 33))
    scores = (q @ k.mT * 16**-0.5).masked_fill(~torch.ones(33, 33, dtype=torch.bool).tril(), -torch.inf)
    assert_close((scores - lse[..., None]).exp(), shares)


@FAST
def test_the_order_of_keys_does_not_matter_without_the_diagonal(form, qkv, generator, assert_close, fast):
    q, k, v = qkv(1, 4, 2, 20, 50, 16)
    order = torch.randperm(50, generator=generator)
    want = fast(form)(q, k, v, causal=False, return_lse=True)
    assert_close(tuple(fast(form)(q, k[:, :, order], v[:, :, order], causal=False, return_lse=True)), tuple(want))


@FAST
def test_one_decoded_row_is_the_last_row_of_the_prompt(form, qkv, assert_close, fast):
    q, k, v = qkv(1, 4, 2, 65, 65, 16)
    assert_close(fast(form)(q[:, :, -1:], k, v), fast(form)(q, k, v)[:, :, -1:])


@FAST
def test_any_strides(form, qkv, assert_close, fast):
    q, k, v = qkv(2, 4, 2, 33, 33, 16)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    scattered = [torch.stack((x, x), -1)[..., 0] for x in (q, k, v)]  # neighbours two apart
    want = fast(form)(q, k, v)
    assert_close(fast(form)(*turned), want)
    assert_close(fast(form)(*scattered), want)


@FAST
def test_memory_is_linear_in_the_length(form, qkv, fast):
    def elements(length, **given):
        q, k, v = (x.requires_grad_() for x in qkv(1, 1, 1, length, length, 32))
        return largest_tensor(lambda: fast(form)(q, k, v, **given).sum().backward())

    assert elements(1024) <= 2 * elements(512) + 1
    padding = torch.ones(1, 1, 1, 1024, dtype=torch.bool)
    assert elements(1024, mask=padding) < 1024 * 1024 / 16


def test_the_gradient_of_a_bias_is_summed_where_it_is_broadcast(qkv, assert_close):
    q, k, v = qkv(2, 2, 1, 9, 9, 8)
    small = torch.randn(2, 1, 1, requires_grad=True)
    full = small.detach().expand(2, 2, 9, 9).clone().requires_grad_()
    dout = torch.randn(2, 2, 9, 8)
    got, want = (torch.autograd.grad(attend(q, k, v, bias=bias), bias, dout)[0] for bias in (small, full))
    assert_close(got, want.sum((0, 2, 3)).reshape(2, 1, 1))


@pytest.mark.parametrize("form", ["reference", "torch"])
def test_a_bias_of_minus_infinity_is_a_mask(form, qkv, through, generator, assert_close):
    inputs = qkv(1, 2, 1, 9, 9, 8)
    mask = torch.rand(9, 9, generator=generator) < 0.5
    hidden = torch.zeros(9, 9).masked_fill(~mask, -torch.inf)
    got = through(partial(attend, bias=hidden, return_lse=True, form=form), *inputs)
    assert_close(got, through(partial(attend, mask=mask, return_lse=True, form=form), *inputs))


def test_refusals(qkv):
    q, k, v = qkv(1, 4, 3, 8, 8, 16)
    with pytest.raises(ValueError, match=r"heads=4 is no multiple of kv_heads=3"):
        attend(q, k, v)
    k, v = k[:, :2], v[:, :2]
    with pytest.raises(ValueError, match=r"k has shape \(1, 2, 8, 12\); expected .*dim=16"):
        attend(q, k[..., :12], v)
    with pytest.raises(TypeError, match=r"mask is torch.int64; expected a bool mask"):
        attend(q, k, v, mask=torch.ones(8, 8, dtype=torch.long))
    with pytest.raises(TypeError, match=r"a bool belongs in mask"):
        attend(q, k, v, bias=torch.ones(8, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask has shape \(3, 8, 8\); expected one that broadcasts to .*\(1, 4, 8, 8\)"):
        attend(q, k, v, mask=torch.ones(3, 8, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"bias has shape \(7, 8\)"):
        attend(q, k, v, bias=torch.zeros(7, 8))
    with pytest.raises(ValueError, match=r"mixed dtypes"):
        attend(q, k.double(), v)
    with pytest.raises(ValueError, match=r"did you mean 'triton'"):
        attend(q, k, v, form="tritn")


def test_triton_says_why_it_cannot(qkv, monkeypatch):
    q, k, v = qkv(1, 2, 2, 8, 8, 16)
    with pytest.raises(ValueError, match=r"a bias with form='triton'; expected a bool mask or none; use form='torch'"):
        attend(q, k, v, bias=torch.zeros(8, 8), form="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"form='triton' cannot run"):
        attend(q, k, v, form="triton")
    assert backend.explain("attend", q, k, v) == ("torch", "tensors are on cpu")
