"""MiKV: nothing is absent, exact in the limits, a balancer that changes no product, and demotion that is one-way."""

import pytest
import torch
from kv_presets import prompt

from memlens.attention.exact import attend
from memlens.kv import storage
from memlens.kv.cache import continue_with, prefill
from memlens.kv.mikv import channel_balancer, mikv, mikv_split, mixed
from memlens.kv.policies import h2o
from memlens.kv.quantize import Packed, affine_quantize


@pytest.fixture
def kv(generator):
    return torch.randn(2, 2, 40, 16, generator=generator), torch.randn(2, 2, 40, 16, generator=generator)


def test_the_split_by_hand():
    score = torch.tensor([[[5.0, 1.0, 4.0, 0.0, 2.0, 0.0, 3.0, 0.0, 0.0, 0.0]]])
    assert mikv_split(score, 0.4).tolist() == [[[0, 2, 8, 9]]]
    assert mikv_split(score, 0.4, recent_share=0.0).tolist() == [[[0, 2, 4, 6]]]
    assert mikv_split(score, 0.0).shape == (1, 1, 0)
    assert mikv_split(score, 1.0).tolist() == [[list(range(10))]]


def test_the_balancer_by_hand_and_on_a_zero_channel():
    q, k = torch.zeros(1, 2, 3, 2), torch.zeros(1, 1, 3, 2)
    q[0, 1, 2, 0], k[0, 0, 1, 0] = -8.0, 2.0  # the largest of both query heads
    assert channel_balancer(q, k).tolist() == [[[2.0, 1.0]]]


def test_the_balancer_changes_no_product_and_ignores_scale(kv, generator, assert_close):
    k, _ = kv
    q = torch.randn(2, 4, 9, 16, generator=generator)
    b = channel_balancer(q, k)
    wide = b.repeat_interleave(2, 1)[:, :, None]
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(2, 1))
    balanced = torch.einsum("bhqd,bhkd->bhqk", q / wide, (k * b[:, :, None]).repeat_interleave(2, 1))
    assert_close(balanced, scores)
    c = 2.0 ** torch.randint(-3, 4, (16,), generator=generator)
    scaled = channel_balancer(q / c, k * c)
    assert_close(scaled * c, b)
    one, two = (affine_quantize(x, 2, axis=-1, group=8).codes for x in (k * b[:, :, None], k * c * scaled[:, :, None]))
    assert torch.equal(one, two)


@pytest.mark.parametrize("fmt", [mixed(0.3, hi=16, lo=16), mixed(1.0, hi=16, lo=2)], ids=["16 bits", "all important"])
def test_exact_in_the_limits(fmt, kv, generator, assert_close):
    q = torch.randn(2, 4, 2, 16, generator=generator)
    score = torch.rand(2, 2, 40, generator=generator)
    held = fmt.commit(None, *kv, score=score, query_peak=q.abs().amax(2)[:, :2])
    assert_close(fmt.attend(q, held), attend(q, *kv, causal=False, return_lse=True))


@pytest.mark.parametrize("hi", [16, 8])
def test_no_token_is_ever_absent_and_demotion_is_one_way(hi, kv, generator):
    fmt = mixed(0.25, hi=hi, lo=4, group=8, balancer=False)
    held, was_low = None, torch.zeros(2, 2, 0, dtype=torch.bool)
    for i in range(40):
        score = torch.rand(2, 2, i + 1, generator=generator)
        held = fmt.commit(held, *(x[:, :, i : i + 1] for x in kv), score=score)
        assert fmt.count(held) == i + 1
        assert held.important.shape[-1] == round(0.25 * (i + 1))
        low = torch.ones(2, 2, i + 1, dtype=torch.bool).scatter(-1, held.important.long(), False)
        assert not bool((was_low & ~low[..., :i]).any())
        was_low = low
    k, v = fmt.read(held, torch.float32)
    important = ~was_low
    for got, x in ((k, kv[0]), (v, kv[1])):
        error = (got - x).abs().amax(-1)
        assert float(error[important].max()) < (1e-6 if hi == 16 else 0.03)
        assert 0.03 < float(error[was_low].max()) < 0.5


def test_important_tokens_are_those_of_the_score(kv, generator):
    score = torch.rand(2, 2, 40, generator=generator)
    held = mixed(0.2, balancer=False).commit(None, *kv, score=score)
    assert torch.equal(held.important.long(), mikv_split(score, 0.2))
    assert isinstance(held.low[0], Packed)
    assert torch.equal(held.high[0], storage.take(kv[0], held.important))


def test_nothing_kept_low_is_h2o(llama, assert_close):
    ids = prompt(30)
    one, two = (prefill(llama, ids[:, :25], policy).cache for policy in (mikv(0.4, lo=0, prompt=25), h2o(5, 5)))
    assert_close(continue_with(llama, one, ids[:, 25:]), continue_with(llama, two, ids[:, 25:]))
    assert one.held == two.held == [10] * 3


@pytest.mark.parametrize("r, hi, lo", [(0.25, 16, 2), (0.5, 8, 4), (0.0, 16, 2)])
def test_bits_per_element_are_the_formula(r, hi, lo, kv):
    group, fmt = 8, mixed(r, hi=hi, lo=lo, group=8, balancer=False)
    sizes = fmt.size((1, 2, 40, 16), itemsize=2)
    bits = 8 * (sizes["payload"] + sizes.get("scales", 0)) / (2 * 2 * 40 * 16)
    high = hi if hi == 16 else hi + 32 / group
    assert bits == r * high + (1 - r) * (lo + 32 / group)


def test_the_model_forgets_less_than_by_eviction(llama):
    ids = prompt(60)
    with torch.no_grad():
        want = llama(ids).logits[:, 50:]
    errors = {}
    for name, policy in {"evict": mikv(0.2, lo=0, prompt=50), "2": mikv(0.2, lo=2), "8": mikv(0.2, lo=8)}.items():
        got = continue_with(llama, prefill(llama, ids[:, :50], policy).cache, ids[:, 50:])
        errors[name] = float((got - want).norm())
    assert errors["8"] < errors["2"] < errors["evict"]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda kv: mixed(0.2, hi=2, lo=4), "hi=2"),
        (lambda kv: mixed(0.2, lo=5), "bits='5'"),
        (lambda kv: mixed(1.2), "r=1.2"),
        (lambda kv: mikv(0.2, lo=0), "lo=0 without prompt"),
        (lambda kv: mixed(0.2, balancer=False).commit(None, *kv), "no score"),
        (lambda kv: mixed(0.2).commit(None, *kv, score=torch.zeros(2, 2, 40)), "balancer without queries"),
    ],
)
def test_bad_calls_are_refused(call, words, kv):
    with pytest.raises(ValueError, match=words):
        call(kv)
