"""Features whose inner product is a polynomial, and attention with the weight 1 + s + s²/2."""

import math

import pytest
import torch
from memory_cases import results

from memlens.attention.exact import attend
from memlens.attention.masks import stream_mask
from memlens.cost.memory import state_bytes
from memlens.memory.based import taylor_attention, taylor_weight
from memlens.memory.features import feature_count, poly_features, taylor_features, unpacked_taylor_features
from memlens.memory.hybrid import MixerSpec, based_spec
from memlens.memory.linear import linear_attention


def draw(*shape, generator, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("coef", [[2.0], [0.0, 1.0], [1.0, 0.5, 0.25, 3.0], [0.1] * 5])
def test_features_multiply_to_the_polynomial(dim, coef, generator, assert_close):
    x, y = draw(7, dim, generator=generator), draw(7, dim, generator=generator)
    got = poly_features(x, coef) @ poly_features(y, coef).mT
    assert_close(got, sum(c * (x @ y.mT) ** i for i, c in enumerate(coef)))
    assert poly_features(x, coef).shape[-1] == feature_count(dim, len(coef) - 1)


@pytest.mark.parametrize("dim", [1, 4, 16])
def test_packed_and_unpacked_features_agree_and_give_the_taylor_weight(dim, generator, assert_close):
    q, k = draw(9, dim, generator=generator), draw(9, dim, generator=generator)
    s = q @ k.mT / math.sqrt(dim)
    packed = taylor_features(q) @ taylor_features(k).mT
    assert_close(packed, unpacked_taylor_features(q) @ unpacked_taylor_features(k).mT)
    assert_close(packed, 1 + s + s**2 / 2)
    assert_close(packed, taylor_weight(s))
    assert packed.min() >= 0.5 - 1e-12


def test_the_third_order_is_closer_to_exp(generator):
    q, k = 0.5 * draw(50, 8, generator=generator), 0.5 * draw(50, 8, generator=generator)
    want = (q @ k.mT / math.sqrt(8)).exp()
    errors = [(taylor_features(q, order=i) @ taylor_features(k, order=i).mT - want).abs().max() for i in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2]


def test_features_refuse_what_has_no_root():
    with pytest.raises(ValueError, match="coef"):
        poly_features(torch.ones(2), [1.0, -0.5])
    with pytest.raises(ValueError, match="dim=0"):
        taylor_features(torch.ones(2, 0))
    with pytest.raises(ValueError, match="order=-1"):
        taylor_features(torch.ones(2), order=-1)


def leaves_of(length, dim, generator, *, dtype=torch.float32):
    heads, kv_heads, value = 4, 2, 10
    leaves = {
        "q": draw(2, heads, length, dim, generator=generator),
        "k": draw(2, kv_heads, length, dim, generator=generator),
    }
    leaves["v"] = draw(2, kv_heads, length, value, generator=generator)
    before = linear_attention(*(taylor_features(draw(2, heads, 3, dim, generator=generator)) for _ in "qk"),
                              draw(2, heads, 3, value, generator=generator), normalize=True)[1]  # fmt: skip
    leaves.update(S=before.S, z=before.z)
    return {name: x.to(dtype).requires_grad_() for name, x in leaves.items()}


def by_features(q, k, v, *, state, form=None):
    return linear_attention(taylor_features(q), taylor_features(k), v, normalize=True, state=state, form="reference")


@pytest.mark.parametrize("form", ["reference", "torch"])
@pytest.mark.parametrize("length, dim", [(1, 16), (63, 5), (130, 16)])
def test_every_form_is_features_and_linear_attention(form, length, dim, generator, assert_close):
    leaves = leaves_of(length, dim, generator)
    want = results(by_features, leaves, {})
    assert_close(
        results(taylor_attention, leaves, {}, form=form, **({"chunk": 32} if form == "torch" else {})),
        want,
        rtol=1e-4,
        atol=5e-5,
    )


def test_without_a_state_it_is_the_masked_quotient(generator, assert_close):
    q, k, v = (draw(1, 2, 50, 6, generator=generator) for _ in range(3))
    weight = (1 + (s := q @ k.mT / 6**0.5) + s**2 / 2).tril()
    got, _ = taylor_attention(q, k, v, chunk=16)
    assert_close(got, weight / weight.sum(-1, keepdim=True) @ v)


def test_masked_tokens_leave_no_trace_in_the_state(generator, assert_close):
    q, k, v = (draw(1, 2, 40, 6, generator=generator) for _ in range(3))
    mask = torch.rand(1, 40, generator=generator) > 0.4  # a masked key is zero, whose weight would be 1
    got, state = taylor_attention(q, k, v, mask=mask, chunk=16)
    want, last = taylor_attention(*(x[:, :, mask[0]] for x in (q, k, v)), chunk=16)
    assert_close((got[:, :, mask[0]], *state), (want, *last))


def test_taylor_attention_refuses(generator):
    q, v = torch.zeros(1, 2, 5, 0), torch.zeros(1, 2, 5, 3)
    with pytest.raises(ValueError, match="feature_dim=0"):
        taylor_attention(q, q, v)
    wide = torch.zeros(1, 2, 5, 17)
    with pytest.raises(ValueError, match="feature_dim=17 with form='triton'"):
        taylor_attention(wide, wide, v, form="triton")


def test_a_window_of_the_whole_length_is_full_attention(generator, assert_close):
    q, k, v = (draw(1, 2, 20, 8, generator=generator) for _ in range(3))
    assert_close(attend(q, k, v, mask=stream_mask(20, 20, sink=0, recent=20)), attend(q, k, v))
    narrow = attend(q, k, v, mask=stream_mask(20, 20, sink=0, recent=4))
    assert_close(narrow[:, :, 10:11], attend(q[:, :, 10:11], k[:, :, 7:11], v[:, :, 7:11]))


def test_the_layer_list_is_the_one_of_the_360m_model():
    kinds = [spec.kind for spec in based_spec()]
    assert [i for i, kind in enumerate(kinds) if kind == "linear"] == [1, 6, 11, 16, 21]
    assert [i for i, kind in enumerate(kinds) if kind == "window"] == [2, 7, 12, 17, 22]
    assert kinds.count("conv") == 17
    with pytest.raises(ValueError, match="feature_dim=0"):
        based_spec(27, 64, 0)


def test_state_bytes_by_hand():
    softmax = MixerSpec("softmax", 64, 1)
    assert state_bytes(softmax, 128) == 2 * 128 * 64 * 4
    assert state_bytes(softmax, 128, cache_bytes=2) == 2 * 128 * 64 * 2
    window = softmax._replace(kind="window", window=16)
    assert state_bytes(window, 8) == state_bytes(softmax, 8)
    assert state_bytes(window, 10_000) == 2 * 16 * 64 * 4
    linear = MixerSpec("linear", 64, 1, feature_dim=16)
    assert state_bytes(linear, 0) == state_bytes(linear, 10_000) == 153 * 65 * 4
    assert state_bytes(linear._replace(heads=4, kernel=4), 5) == 4 * 153 * 17 * 4 + 3 * (2 * 64 + 64) * 4
    assert state_bytes(MixerSpec("mamba", 64, states=16, expand=2, kernel=4), 5) == 128 * 16 * 4 + 3 * 128 * 4
    assert state_bytes([softmax, linear], 128) == state_bytes(softmax, 128) + state_bytes(linear, 128)
    with pytest.raises(ValueError, match="length=-1"):
        state_bytes(softmax, -1)
    with pytest.raises(ValueError, match="did you mean"):
        state_bytes(softmax._replace(kind="windows"), 1)
