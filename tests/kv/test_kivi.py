"""KIVI: residual sizes, streaming equals one shot, bounds, and what eviction may and may not do."""

import pytest
import torch

from memlens.attention.exact import attend
from memlens.kv import storage
from memlens.kv.kivi import kivi, kivi_append, kivi_attend, kivi_prefill, kivi_read
from memlens.kv.quantize import dequantize

GROUP, RESIDUAL = 8, 16


@pytest.fixture
def kv(generator):
    return torch.randn(2, 2, 100, 16, generator=generator), torch.randn(2, 2, 100, 16, generator=generator)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 100])
def test_the_residual_is_what_the_paper_says(length, kv):
    state = kivi_prefill(*(x[:, :, :length] for x in kv), 2, GROUP, RESIDUAL)
    assert state.k.tail.shape[2] == length % RESIDUAL
    assert state.v.tail.shape[2] == min(length, RESIDUAL)
    close_tail = kv[0][:, :, length - length % RESIDUAL : length]
    assert torch.equal(state.k.tail, close_tail)


def test_after_every_step_the_residual_is_bounded_and_streaming_equals_one_shot(kv):
    k, v = kv
    state = kivi_prefill(k[:, :, :5], v[:, :, :5], 2, GROUP, RESIDUAL)
    for i in range(5, 100):
        state = kivi_append(state, k[:, :, i : i + 1], v[:, :, i : i + 1])
        assert state.k.tail.shape[2] <= RESIDUAL - 1
        assert state.v.tail.shape[2] <= RESIDUAL
        if i % 20 == 0:
            once = kivi_prefill(k[:, :, : i + 1], v[:, :, : i + 1], 2, GROUP, RESIDUAL)
            assert all(torch.equal(a, b) for a, b in zip(storage.tensors(state), storage.tensors(once), strict=True))


def test_what_is_packed_is_within_half_a_step(kv):
    state = kivi_prefill(*kv, 4, GROUP, RESIDUAL)
    for side, x, axis in ((state.k, kv[0], -2), (state.v, kv[1], -1)):
        error = (dequantize(side.packed, torch.float32) - x[:, :, : side.packed.shape[2]]).abs()
        assert bool((error.unflatten(axis, (-1, GROUP)).amax(axis) <= side.packed.scale.float() / 2 * (1 + 1e-5)).all())


@pytest.mark.parametrize("form", ["reference", "torch"])
def test_eight_bits_are_near_and_sixteen_exact(form, kv, generator, assert_close):
    q = torch.randn(2, 4, 1, 16, generator=generator)
    want = attend(q, *kv, causal=False, return_lse=True)
    near = kivi_attend(q, kivi_prefill(*kv, 8, GROUP, RESIDUAL), form=form)
    assert float((near.out - want.out).norm() / want.out.norm()) < 1e-2
    assert_close(kivi_attend(q, kivi_prefill(*kv, 16, GROUP, RESIDUAL), form=form), want)


def test_a_large_channel_is_kinder_to_keys_grouped_along_the_tokens(kv):
    """What the paper is about: a channel that is large for every token."""
    k, v = kv
    k[..., 3] += 40.0
    by_channel, by_token = (
        (kivi_read(kivi((2, 16), group=GROUP, residual=RESIDUAL, axes=axes).commit(None, k, v))[0] - k)[..., 4:8].norm()
        for axes in ((-2, -1), (-1, -1))
    )
    assert by_channel < 0.2 * by_token


def test_values_are_never_rounded_twice(kv, generator):
    """Values that survive many evictions are those of one quantisation, whichever tokens went."""
    fmt = kivi(2, group=GROUP, residual=RESIDUAL)
    held, live = None, torch.empty(2, 2, 0, dtype=torch.int64)
    for i in range(100):
        live, idx = torch.cat((live, torch.full((2, 2, 1), i)), -1), None
        if i >= 50:
            drop = torch.randint(0, live.shape[-1], (2, 2, 1), generator=generator)
            if i % 3:  # the heads lose as many, one an old token, another a new one
                drop[:, 0] = live.shape[-1] - 1
            left = torch.ones_like(live).scatter(-1, drop, 0).nonzero()[:, -1].view(2, 2, -1)
            idx, live = left, live.gather(-1, left)
        held = fmt.commit(held, *(x[:, :, i : i + 1] for x in kv), idx)
    once = dequantize(fmt.commit(None, *kv).v.packed, torch.float32)
    v = kivi_read(held)[1]
    for got, token in zip(v.flatten(0, 1), live.flatten(0, 1), strict=True):
        assert got.shape[0] == token.numel()
    packed = live < once.shape[2] - RESIDUAL
    want = storage.take(torch.cat((once, kv[1][:, :, once.shape[2] :]), 2), live)
    plain = storage.take(kv[1], live)
    apart = torch.minimum((v - want).abs().amax(-1), (v - plain).abs().amax(-1))
    assert float(apart[packed].max()) < 1e-3
    assert int(packed.sum()) > 40


def test_whole_groups_keep_their_codes_when_others_are_grouped_anew(kv):
    fmt = kivi(2, group=GROUP, residual=RESIDUAL)
    held = fmt.commit(None, *kv)  # keys: 96 packed, 4 in the tail
    first = kivi_read(held)[0]
    keep = torch.tensor([i for i in range(100) if not 8 <= i < 40 or i % 2]).expand(2, 2, -1)  # groups 1 to 4 lose half
    after = fmt.commit(held, *(x[:, :, :1] for x in kv), torch.cat((keep, torch.full((2, 2, 1), 100)), -1))
    got = kivi_read(after)[0]
    whole = (keep[0, 0] < 8) | ((keep[0, 0] >= 40) & (keep[0, 0] < 64))
    torch.testing.assert_close(got[:, :, :-1][:, :, whole], first[:, :, keep[0, 0][whole]], rtol=1e-4, atol=1e-4)
    capacity = after.k.packed.shape[2] + after.k.tail.shape[2]
    assert capacity - fmt.count(after) < RESIDUAL  # what holes may cost


@pytest.mark.parametrize(
    "change, words",
    [
        ({"bits": 5}, "bits='5'"),
        ({"bits": 0}, "bits='0'"),
        ({"group": 8, "residual": 20}, "residual=20 is no multiple of group=8"),
        ({"group": 8, "residual": 8}, "codes_in_a_word=16"),
        ({"axes": (-2, 0)}, "axis='0'"),
        ({"residual": 0}, "residual=0"),
    ],
)
def test_bad_formats_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        kivi(**{"bits": 2, "group": 8, "residual": 16, **change})


def test_bad_tensors_are_refused_and_the_state_is_unharmed(kv):
    state = kivi_prefill(*kv, 2, GROUP, RESIDUAL)
    before = kivi_read(state)
    bad = torch.full((2, 2, 16, 16), torch.nan)
    with pytest.raises(ValueError, match="finite numbers"):
        kivi_append(state, bad, bad)
    assert all(torch.equal(a, b) for a, b in zip(kivi_read(state), before, strict=True))
    with pytest.raises(ValueError, match="no multiple of group=32"):
        kivi_prefill(*kv, 2, 32, 64)
    with pytest.raises(ValueError, match="kv_heads"):
        kivi_attend(torch.zeros(2, 3, 1, 16), state)
